"""``saec train``: fine-tune a multimodal LLM on the rows of ``saec data sft``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saec.cli.options import JsonOption

if TYPE_CHECKING:
    from saec.evaluate.table import Table
    from saec.train.loop import TrainResult
    from saec.train.steps import Watcher


def train(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG.toml]", help="Settings, as --show prints them.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Settings that ship: saec-qwen2.5-vl-7b, loupe, tiny.", show_default=False),
    ] = None,
    train_file: Annotated[
        Path | None, typer.Option("--train", metavar="FILE", help="Rows to learn from.", show_default=False)
    ] = None,
    val_file: Annotated[
        Path | None, typer.Option("--val", metavar="FILE", help="Rows to evaluate on.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Run folder; a stopped run is resumed.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="key=value", help="One setting; may be repeated.", show_default=False),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the settings as commented TOML and exit.")] = False,
    json_: JsonOption = False,
) -> None:
    """Fine-tune a multimodal LLM by LoRA or QLoRA; a run that was stopped or killed goes on by the same command.

    The folder then holds best/ and last/ (adapters to serve), train.json, the loss curve, and trained_on.txt.
    """
    from saec.errors import BadInput
    from saec.train.config import load_train_settings, to_toml

    settings = load_train_settings(config, preset=preset, overrides=set_ or ())
    if show:
        print(to_toml(settings), end="")
        return
    if train_file is None or val_file is None or out is None:
        raise BadInput("--train, --val and --out are needed", fix="write the rows with saec data sft")
    require_extra()
    from saec.train.loop import train as run
    from saec.train.steps import Interrupted

    try:
        with watching() as watcher:
            result = run(settings, train_file, val_file, out, watcher=watcher)
    except Interrupted as stopped:
        say_error(f"{stopped}; the same command goes on from there")
        raise KeyboardInterrupt from None
    _tell(result, out, json_=json_)


def require_extra() -> None:
    """Refuse to train without the packages that it takes."""
    from importlib.util import find_spec

    from saec.errors import BadInput

    missing = [name for name in ("torch", "transformers", "peft", "matplotlib") if find_spec(name) is None]
    if missing:
        raise BadInput(f"training needs {', '.join(missing)}", fix='pip install "saec[train]"')


def say_error(text: str) -> None:
    """Print a line beside what a program would read."""
    from saec.cli.console import console

    console(stderr=True).print(text)


@contextmanager
def watching() -> Iterator[Watcher]:
    """A progress bar on a terminal; in a log file a line now and then."""
    import logging

    from rich.logging import RichHandler
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from saec.cli.console import console

    error = console(stderr=True)
    figures = TextColumn("loss {task.fields[loss]:.4f}  lr {task.fields[lr]:.2e}  {task.fields[speed]:.2f} images/s")
    columns = (BarColumn(), MofNCompleteColumn(), figures, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error, disable=not error.is_terminal) as bars:
        handler = RichHandler(console=error, show_time=False, show_path=False)
        logging.getLogger("saec.train").addHandler(handler)
        try:
            yield _Bar(bars)
        finally:
            logging.getLogger("saec.train").removeHandler(handler)


class _Bar:
    """Shows a run as a :class:`~saec.train.loop.Watcher`."""

    _EVERY = 50
    """Steps between two lines where there is no terminal."""

    def __init__(self, bars: Any) -> None:
        self._bars, self._task = bars, None

    def said(self, text: str) -> None:
        self._bars.console.print(text)

    def stepped(self, step: int, total: int, entry: dict[str, Any]) -> None:
        loss, lr, speed = entry["loss"], entry["lr"], entry["images_per_s"]
        if self._task is None:
            self._task = self._bars.add_task("", total=total, loss=loss, lr=lr, speed=speed)
        self._bars.update(self._task, completed=step, loss=loss, lr=lr, speed=speed)
        if self._bars.disable and (step % self._EVERY == 0 or step == total):
            self.said(f"step {step}/{total}  loss {loss:.4f}  lr {lr:.2e}  {speed:.2f} images/s")


def _tell(result: TrainResult, out: Path, *, json_: bool) -> None:
    from saec.cli.console import print_json, print_tables, say, say_path

    if json_:
        print_json({"out": str(out), "release_folder": str(result.release), **result.summary})
        return
    if result.repeated:
        say("This run is finished; nothing was done.")
    print_tables(_table(result.summary))
    say_path(f"Release ({result.summary['release']})", result.release)


def _table(summary: Mapping[str, Any]) -> Table:
    from saec.evaluate.table import Cell, Table

    columns = ("epoch", "product", "n", "auroc", "accuracy", "balanced_accuracy")
    rows: list[Mapping[str, Cell]] = []
    for entry in summary["epochs"]:
        products = entry["per_product"] if len(entry["per_product"]) > 1 else {}
        for product, found in {"all": entry, **products}.items():
            figures = {key: found[key] for key in columns[2:]}
            rows.append({"epoch": entry["epoch"] + 1, "product": product, **figures})
    memory = summary["memory"]
    gpu = "" if memory["gpu_peak_mb"] is None else f", {memory['gpu_peak_mb']:.0f} MB on the GPU"
    notes = [
        f"{summary['steps']} steps in {summary['train_seconds']:.0f} s; {summary['trainable_weights']:,} weights learn",
        f"memory at most {memory['rss_peak_mb']:.0f} MB resident{gpu}",
    ]
    return Table(f"Fine-tuned {summary['model']}", columns, rows, notes)
