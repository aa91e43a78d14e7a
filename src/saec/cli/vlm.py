"""``saec vlm``: a VLM for the edge, from its checkpoint to graphs, to a device's binary, and to an answer."""

from __future__ import annotations

import typer

from saec.cli import vlm_ask, vlm_compile, vlm_export, vlm_graphs, vlm_quantize

app = typer.Typer(
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
