"""``saec learn distill``: teach an adapter by a larger model, on parts that were judged."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saec.cli.options import ConfigOption, JsonOption, SetOption
from saec.errors import BadInput

if TYPE_CHECKING:
    from saec.config import Settings
    from saec.learn.distill import Judged


def distill(
    student: Annotated[Path, typer.Option(metavar="ADAPTER", help="Adapter folder of saec train.", show_default=False)],
    teacher: Annotated[
        str,
        typer.Option(metavar="MODEL[+ADAPTER]", help="Who teaches: a model, with its adapter.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Run folder; a stopped run resumes.", show_default=False)
    ],
    desk: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The parts that a cloud service has collected (cloud serve --learn).",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Or judged parts as fine-tuning rows; p_defect is a teacher's label, a label without it a person's.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Teach an adapter of a small model: by labels, and by what a teacher feels about the same parts.

    The folder then holds last/ (the taught adapter), train.json, and a log of every term of the loss. The same command
    goes on where it was stopped.
    """
    from saec.cli.console import print_json, say, say_path
    from saec.cli.options import settings_of
    from saec.cli.train import require_extra, say_error, watching

    require_extra()
    from saec.learn.distill import distill as run
    from saec.learn.distill import load_teacher
    from saec.train.steps import Interrupted

    settings = settings_of(config, set_)
    parts = _parts(desk, samples, settings)
    model, _, adapter = teacher.partition("+")
    chosen = {"model": model, "adapter": Path(adapter) if adapter else None}
    master = settings.mllm.model_copy(update=chosen)
    try:
        with watching() as watcher:
            load = partial(load_teacher, master)
            result = run(student, parts, out, settings.distill, teacher=load, watcher=watcher)
    except Interrupted as stopped:
        say_error(f"{stopped}; the same command goes on from there")
        raise KeyboardInterrupt from None
    if json_:
        print_json({"out": str(out), "release_folder": str(result.release), **result.summary})
        return
    told = result.summary
    done = "This run is finished; nothing was done." if result.repeated else f"{told['steps']} steps."
    say(f"{told['data']['n_train']} parts, taught by {told['teacher']}. {done}")
    say_path("Taught adapter", result.release)


def _parts(desk: Path | None, samples: Path | None, settings: Settings) -> list[Judged]:
    """Return what there is to learn from: what a desk holds, or the rows of a file."""
    from saec.cli.train import say_error
    from saec.learn.collected import collected
    from saec.learn.distill import Judged
    from saec.train.rows import read_rows

    if samples is not None and desk is None:
        return [Judged.of(row) for row in read_rows(samples)]
    if desk is None or samples is not None:
        raise BadInput("what are the samples?", fix="pass --desk DIR or --samples FILE.jsonl")
    found, bare = collected(desk, settings)
    if bare:
        say_error(f"{bare} samples came as tokens, without an image: an adapter cannot be taught with them.")
    if not found:
        raise BadInput("no part with an image and a label that counts", where=desk, fix="let stations learn once more")
    return [Judged(each.query, each.sha256, each.p_defect) for each in found]
