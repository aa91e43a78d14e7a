"""What a run leaves behind besides its adapters: the settings it began with, the loss curve, and the summary."""

from __future__ import annotations

import json
import resource
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from saec import __version__
from saec.data.hashing import sha256_file
from saec.data.manifest import write_atomic
from saec.errors import BadInput
from saec.fleet.sqlite_file import lock
from saec.train.checkpoint import Position
from saec.train.config import TrainSettings, first_difference, make_train_settings
from saec.train.files import read_lines
from saec.vlm.trained import BEGUN, TRAINED_ON, WEIGHTS, read_record
from saec.vlm.trained import RUN as SUMMARY

LOG, EVALUATIONS = "train.log.jsonl", "eval.jsonl"

_LOCK = f"{BEGUN}.lock"
_FREE = ("checkpoint_every", "release_dtype", "threads")  # may differ in a resumed run


def hashes_of(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of the fine-tuning files, by name.

    Raises:
        BadInput: one cannot be read.
    """
    return {name: _digest(file) for name, file in files.items()}


def check_run(out: Path, settings: TrainSettings, data: Mapping[str, str]) -> dict[str, Any] | None:
    """Check that ``out`` is free for a run or holds this very one; return its summary if it is finished.

    Raises:
        BadInput: the folder holds something else, or a run with another setting or other data, which is named.
    """
    if not (out / BEGUN).exists():
        if out.is_file() or (out.is_dir() and any(not path.name.startswith(_LOCK) for path in out.iterdir())):
            raise BadInput("the folder is not empty and no training run", where=out, fix="choose another folder")
        return None
    begun = read_record(out / BEGUN)
    former = make_train_settings(begun.get("settings", {}), where=str(out / BEGUN))
    key = first_difference(former, settings, free=_FREE)
    if key is not None:
        raise BadInput(
            f"this run was begun with {key}={getattr(former, key)!r}",
            where=out,
            fix=f"keep {key} to resume it, or choose another folder",
        )
    changed = next((name for name in data if begun.get("data", {}).get(name) != data[name]), None)
    if changed is not None:
        raise BadInput(f"this run was begun with other data: {changed}", where=out, fix="choose another --out")
    return read_record(out / SUMMARY) if (out / SUMMARY).exists() else None


@contextmanager
def begun(out: Path, settings: TrainSettings, data: Mapping[str, str], learnt: str) -> Iterator[None]:
    """Write what the run begins with, unless it is there, and keep other processes out of its folder meanwhile.

    ``learnt`` lists the images that train, as :func:`learnt` does.

    Raises:
        BadInput: another process is at work in it.
        OSError: it cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        holder = lock(out / BEGUN)
    except sqlite3.OperationalError as error:
        fix = "wait for the other process that trains here, or choose another folder"
        raise BadInput(f"the run's folder cannot be taken ({error})", where=out, fix=fix) from None
    start = {"version": __version__, "settings": settings.model_dump(mode="json"), "data": dict(data)}
    with closing(holder):
        for name, text in ((BEGUN, json.dumps(start, indent=1) + "\n"), (TRAINED_ON, learnt)):
            if not (out / name).exists():
                write_atomic(out / name, text)
        yield


def learnt(images: Iterable[tuple[str, str]]) -> str:
    """List images, each a SHA-256 and a part id, as ``sha256sum`` does: the ``exclude=`` of the holdout builders."""
    return "".join(f"{sha256}  {part_id}\n" for sha256, part_id in images)


def _digest(file: Path) -> str:
    try:
        return sha256_file(file)
    except OSError as error:
        raise BadInput("cannot read the fine-tuning file", where=file, fix=error.strerror or "check the path") from None


def summary_of(
    model: str, release: Path, settings: TrainSettings, data: Mapping[str, Any], weights: int, at: Position
) -> dict[str, Any]:
    """Return what any finished run says of itself. ``release`` is its adapter's folder, ``weights`` how many learnt."""
    return {
        "format": "saec-train/1",
        "version": __version__,
        "model": model,
        "release": release.name,
        "adapter_sha256": sha256_file(release / WEIGHTS),
        "settings": settings.model_dump(mode="json"),
        "data": dict(data),
        "trainable_weights": weights,
        "steps": at.step,
        "train_seconds": round(at.seconds, 3),
        "memory": peak_memory(),
    }


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """Write ``train.json``, the mark of a finished run."""
    write_atomic(out / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def peak_memory() -> dict[str, float | None]:
    """Return the largest memory of this process so far: resident, and on the GPU (``None`` without one), in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    gpu = torch.cuda.max_memory_reserved() / 1e6 if torch.cuda.is_initialized() else None
    return {"rss_peak_mb": resident, "gpu_peak_mb": gpu}


def draw_losses(out: Path) -> None:
    """Draw ``loss.png`` from the log: the loss of every step, its running mean, and the AUROC after each epoch."""
    log, evaluations = read_lines(out / LOG), read_lines(out / EVALUATIONS)
    steps, losses = [entry["step"] for entry in log], [entry["loss"] for entry in log]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="loss of a step")
    axes.plot(steps, _smooth(losses), color="tab:blue", label="running mean")
    axes.set(xlabel="optimizer step", ylabel="cross-entropy of the answer", ylim=(0, None))
    ranked = [(entry["step"], entry["auroc"]) for entry in evaluations if entry["auroc"] is not None]
    if ranked:
        right = axes.twinx()
        right.plot(*zip(*ranked, strict=True), color="tab:red", marker="o", label="validation AUROC")
        right.set(ylabel="validation AUROC", ylim=(0.5, 1))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(out / "loss.png", dpi=110)


def _smooth(values: Sequence[float]) -> list[float]:
    share, mean, smoothed = 0.95, 0.0, []
    for count, value in enumerate(values, start=1):
        mean = share * mean + (1 - share) * value
        smoothed.append(mean / (1 - share**count))  # as Adam does: the mean does not start at zero
    return smoothed
