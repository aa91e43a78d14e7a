"""``saec learn distill``: teach an adapter by a larger model, on parts that were judged."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from saec.cli.options import ConfigOption, JsonOption, SetOption


def distill(
    student: Annotated[Path, typer.Option(metavar="ADAPTER", help="Adapter folder of saec train.", show_default=False)],
    teacher: Annotated[
        str,
        typer.Option(metavar="MODEL[+ADAPTER]", help="Who teaches: a model, with its adapter.", show_default=False),
    ],
    samples: Annotated[
        Path,
        typer.Option(
            metavar="FILE.jsonl",
            help="Judged parts as fine-tuning rows; p_defect is a teacher's label, a label without it a person's.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Run folder; a stopped run resumes.", show_default=False)
    ],
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
    from saec.learn.distill import Judged, load_teacher
    from saec.learn.distill import distill as run
    from saec.train.rows import read_rows
    from saec.train.steps import Interrupted

    settings = settings_of(config, set_)
    model, _, adapter = teacher.partition("+")
    chosen = {"model": model, "adapter": Path(adapter) if adapter else None}
    master = settings.mllm.model_copy(update=chosen)
    parts = [Judged.of(row) for row in read_rows(samples)]
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
