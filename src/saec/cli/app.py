"""The ``saec`` command: its groups, its version, and how errors become one line and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from saec import __version__
from saec.cli import bench, cloud, config, data, demo, evaluate, fit, inspect, learn, models, train, vlm
from saec.cli.codes import GATE_FAILED, INTERRUPTED
from saec.errors import BadInput, GateFailed


class _Commands(TyperGroup):
    """Turns the errors that a user can act on into one line on stderr and an exit code; all others are bugs."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GateFailed as error:
            _say(f"gate failed: {error}")
            raise typer.Exit(GATE_FAILED) from None
        except BadInput as error:
            _say(f"error: {error}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(INTERRUPTED) from None


def _say(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr)


app = typer.Typer(
    name="saec",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Edge-cloud visual inspection: a light model judges every part, a calibrated router asks a larger one only "
    "about the parts worth it. Exit codes: 0 done, 1 a gate failed, 2 bad input.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"saec {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hold the options of ``saec`` itself."""


app.command("demo")(demo.demo)
app.add_typer(data.app, name="data")
app.command("fit")(fit.fit)
app.command("inspect")(inspect.inspect)
app.command("evaluate")(evaluate.evaluate)
app.command("sweep")(evaluate.sweep)
app.command("report")(evaluate.report)
app.add_typer(cloud.app, name="cloud")
app.command("train")(train.train)
app.add_typer(learn.app, name="learn")
app.add_typer(models.app, name="models")
app.add_typer(vlm.app, name="vlm")
app.add_typer(bench.app, name="bench")
app.add_typer(config.app, name="config")
