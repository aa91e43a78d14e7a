"""An exported VLM in ONNX Runtime against the same model in torch: speed, memory, start, and whether they agree.

Every arm runs in a process of its own, one after the other on the same threads and the same questions, round by round:
a machine that is busy for a while is so for all of them. Both runtimes get one question at a time. What is compared
with a target is the ratio of medians over all rounds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saec.config import MllmSettings
from saec.errors import BadInput
from saec.evaluate.bench_vlm_arm import Cell, Job, Reading
from saec.evaluate.run_record import cpu_name
from saec.evaluate.table import Cell as TableCell
from saec.evaluate.table import Table

TORCH = "torch"
TAU = 0.5
"""Labels are compared at this P(defect): the likelier of the two answers."""

STAGES = {
    "vision": "vision, ms",
    "prefill": "prefill, ms",
    "decision": "decision, ms",
    "first token": "first token, ms",
    "second question": "first token of a second question, ms",
    "decode": "decode, ms a token",
    "evidence": "evidence after a decision, ms",
}
FIGURES = {
    "load_s": "load, s",
    "embedded_s": "load and first decision, s",
    "cold_s": "process start to first decision, s",
    "steady_mb": "memory, MB",
    "peak_mb": "memory, peak, MB",
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure is held against: at least or at most ``value``."""

    name: str
    value: float
    at_least: bool

    def text(self) -> str:
        """Return it as a table shows it."""
        return f"{'≥' if self.at_least else '≤'} {self.value:.3g}"


DECISION = Target("decision, times as fast as torch", 2, True)
DECODE = Target("decode, times as fast as torch", 3, True)
MEMORY = Target("memory, share of torch's", 0.5, False)
COLD = Target("process start to first decision, s", 3, False)
SECOND = Target("first token, second question : first", 1 / 3, False)
AGREEMENT = Target("same label as torch, %", 99, True)


@dataclass(frozen=True, slots=True)
class Measured:
    """All rounds of one arm."""

    readings: Sequence[Reading]

    def stage(self, name: str) -> float | None:
        """Return the median milliseconds of a stage."""
        samples = [ms for reading in self.readings for ms in reading.ms.get(name, ())]
        return float(np.median(samples)) if samples else None

    def figure(self, name: str) -> float | None:
        """Return the median of a figure that each round has one of."""
        values = [getattr(reading, name) for reading in self.readings]
        return None if None in values or not values else float(np.median(values))

    @property
    def p_defect(self) -> NDArray[np.float64]:
        """P(defect) of all cells [n]."""
        return np.array([p for reading in self.readings for p in reading.p_defect])


def bench_vlm(
    bundles: Mapping[str, Path],
    settings: MllmSettings,
    cells: Sequence[Cell],
    *,
    torch: bool,
    rounds: int = 3,
    answers: int = 3,
    tokens: int = 32,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Table, Table]:
    """Measure ``bundles`` (by precision) of the model of ``settings``, and that model in torch unless told otherwise.

    Each round asks about its own share of the cells, and for answers about ``answers`` of them; the decoding speed is
    that of ``tokens`` tokens. Both runtimes take ``settings.threads`` threads.

    Returns:
        A table of stages, and one of ratios beside their targets.

    Raises:
        BadInput: too few cells, or an arm that fails.
    """
    if rounds < 1 or len(cells) < 2 * rounds:
        raise BadInput("nothing to measure", where=f"{len(cells)} images, {rounds} rounds", fix="at least 2 a round")
    arms: dict[str, Path | None] = {**({TORCH: None} if torch else {}), **bundles}
    readings: dict[str, list[Reading]] = {name: [] for name in arms}
    for number in range(rounds):
        of_round = list(cells[number::rounds])
        for place, (name, bundle) in enumerate(arms.items()):
            if progress is not None:
                progress("rounds of all arms", number * len(arms) + place, rounds * len(arms))
            job = Job(settings=settings, bundle=bundle, cells=of_round, answers=answers, tokens=tokens)
            readings[name].append(_run(name, job))
    measured = {name: Measured(found) for name, found in readings.items()}
    notes = [
        f"{settings.threads} threads, batch 1, medians of {rounds} rounds over {len(cells)} images; each round of each "
        "arm in a process of its own",
        *(f"{name}: {found.readings[0].model_id}" for name, found in measured.items()),
    ]
    if not torch:
        notes.append("no torch arm: it is not installed, or the model is given as a bundle; nothing is compared")
    return _stages(measured, settings, notes), _ratios(measured)


def _run(name: str, job: Job) -> Reading:
    """Run one arm in a process of its own, with its number of threads said to every library that asks."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(job.settings.threads))
    command = [sys.executable, "-m", "saec.evaluate.bench_vlm_arm"]
    done = subprocess.run(  # noqa: S603 - our own interpreter
        command,
        input=job.model_dump_json(),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **threads, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise BadInput(f"the arm failed ({said[-1]})", where=name)
    return Reading.model_validate_json(done.stdout)


def _stages(measured: Mapping[str, Measured], settings: MllmSettings, notes: Sequence[str]) -> Table:
    rows: list[Mapping[str, TableCell]] = [
        {"stage": text, **{arm: found.stage(name) for arm, found in measured.items()}} for name, text in STAGES.items()
    ]
    rows += [
        {"stage": text, **{arm: found.figure(name) for arm, found in measured.items()}}
        for name, text in FIGURES.items()
    ]
    return Table(f"{Path(settings.model).name} on {cpu_name()}", ("stage", *measured), rows, notes)


def _ratios(measured: Mapping[str, Measured]) -> Table:
    torch = measured.get(TORCH, Measured(()))
    onnx = {name: found for name, found in measured.items() if name != TORCH}
    figures: Mapping[Target, Callable[[Measured], float | None]] = {
        DECISION: lambda found: _over(torch.stage("decision"), found.stage("decision")),
        DECODE: lambda found: _over(torch.stage("decode"), found.stage("decode")),
        MEMORY: lambda found: _over(found.figure("steady_mb"), torch.figure("steady_mb")),
        COLD: lambda found: found.figure("cold_s"),
        SECOND: lambda found: _over(found.stage("second question"), found.stage("first token")),
        AGREEMENT: lambda found: _apart(found, torch).get("agreement"),
    }
    rows: list[Mapping[str, TableCell]] = [
        {"figure": target.name, "target": target.text(), **{name: of(found) for name, found in onnx.items()}}
        for target, of in figures.items()
    ]
    for name in ("largest", "mean"):
        apart = {arm: _apart(found, torch).get(name) for arm, found in onnx.items()}
        rows.append({"figure": f"{name} difference of P(defect) to torch's", **apart})
    return Table("Against torch", ("figure", "target", *onnx), rows)


def _apart(one: Measured, other: Measured) -> dict[str, float]:
    """Return how far two arms' answers to the same questions are apart; nothing, where one has none."""
    if not one.readings or not other.readings:
        return {}
    p, q = one.p_defect, other.p_defect
    difference = np.abs(p - q)
    return {
        "agreement": 100 * float(((p >= TAU) == (q >= TAU)).mean()),
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
    }


def _over(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other
