"""``saec vlm``: a VLM for the edge, from its checkpoint to graphs, to a device's binary, and to an answer."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from saec.cli import vlm_ask, vlm_compile, vlm_export, vlm_graphs, vlm_quantize, vlm_width
from saec.errors import BadInput

ASKING = ("e2e", "cache", "query")
"""What runs on a device; all else is done where models are exported."""


class _Verbs(TyperGroup):
    """Turns a package that is missing into one line with the extra that brings it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            extra = "vlm" if ctx.invoked_subcommand in ASKING else "export"
            raise BadInput(f"this needs {error.name}", fix=f"pip install 'saec[{extra}]'") from None


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    help="A VLM for the edge: export, check, quantise, compile, ask. MODEL is a name that saec models list shows, a "
    "checkpoint's folder, or a folder that export-decoder wrote.",
)

app.command("export-decoder")(vlm_export.export_decoder)
app.command("validate")(vlm_graphs.validate)
app.command("rename")(vlm_graphs.rename)
app.command("quantize")(vlm_quantize.quantize)
app.command("compile")(vlm_compile.compile_)
app.command("e2e")(vlm_ask.e2e)
app.command("cache")(vlm_ask.cache)
app.command("query")(vlm_ask.query)
app.command("profile")(vlm_compile.profile)
app.command("width")(vlm_width.width)
