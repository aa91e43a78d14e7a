"""One arm of :mod:`saec.evaluate.bench_vlm`, in a process of its own: its start and its memory are part of the figures.

``python -m saec.evaluate.bench_vlm_arm`` reads a :class:`Job` from stdin and writes a :class:`Reading` to stdout, both
as JSON.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
from pydantic import BaseModel, Field

from saec.config import MllmSettings
from saec.data.decode import read_image
from saec.types import Query
from saec.vlm.prompt import Ask, Question, build_question


class Cell(BaseModel):
    """One image to ask about; ``anomaly_map`` is the station's, as a ``.npy`` file."""

    image: Path
    product: str
    anomaly_map: Path | None = None


class Job(BaseModel):
    """What an arm does: decide about all cells, and answer about the first ``answers`` of them.

    ``bundle`` is what ONNX Runtime runs; without one, torch runs the model of ``settings``.
    """

    settings: MllmSettings
    bundle: Path | None
    cells: list[Cell] = Field(min_length=1)
    answers: int
    tokens: int


class Reading(BaseModel):
    """What an arm measured. ``ms`` holds samples by stage; ``cold_s`` and ``embedded_s`` end with the first decision.

    ``cold_s`` begins with the process, ``embedded_s`` with loading, the imports done. ``peak_mb`` is ``None`` where the
    system does not tell it.
    """

    model_id: str
    cold_s: float
    embedded_s: float
    load_s: float
    steady_mb: float
    peak_mb: float | None
    p_defect: list[float]
    ms: dict[str, list[float]]


class Arm(Protocol):
    """A runtime with its model loaded."""

    model_id: str

    def decide(self, question: Question) -> tuple[float, float]:
        """Return P(defect) and the milliseconds in the vision tower."""
        ...

    def evidence(self, question: Question, *, again: bool, max_tokens: int) -> object:
        """Answer the question for evidence; ``again``: about the picture that was decided about last."""
        ...

    def decode_ms(self, question: Question, tokens: int) -> float | None:
        """Return the milliseconds of one token of an answer, without its first."""
        ...


def measure(job: Job) -> Reading:
    """Load the arm, put all questions to it, one at a time, and return the figures."""
    load = _torch(job.settings) if job.bundle is None else _onnx(job.bundle, job.settings.threads)
    begun = time.perf_counter()
    arm = load()
    load_s = time.perf_counter() - begun
    p_defect: list[float] = []
    ms: dict[str, list[float]] = {"decision": [], "vision": [], "prefill": []}
    cold_s = embedded_s = 0.0
    for number, cell in enumerate(job.cells):
        question = _question(cell, job.settings)
        asked = time.perf_counter()
        p, vision_ms = arm.decide(question)
        decision_ms = (time.perf_counter() - asked) * 1e3
        p_defect.append(p)
        if number == 0:  # it warms up what the others find warm
            cold_s, embedded_s = time.time() - psutil.Process().create_time(), time.perf_counter() - begun
            continue
        ms["decision"].append(decision_ms)
        ms["vision"].append(vision_ms)
        ms["prefill"].append(decision_ms - vision_ms)
        if number <= job.answers:
            _answer(arm, question, job, ms)
    memory = psutil.Process().memory_info().rss / 2**20
    return Reading(
        model_id=arm.model_id,
        cold_s=cold_s,
        embedded_s=embedded_s,
        load_s=load_s,
        steady_mb=memory,
        peak_mb=_peak_mb(),
        p_defect=p_defect,
        ms=ms,
    )


def _answer(arm: Arm, question: Question, job: Job, ms: dict[str, list[float]]) -> None:
    """Time the first token with and without what deciding about the picture left, a whole answer, and a token of it."""
    kinds = {"second question": (True, 1), "first token": (False, 1), "evidence": (True, job.settings.evidence_tokens)}
    for name, (again, tokens) in kinds.items():
        begun = time.perf_counter()
        arm.evidence(question, again=again, max_tokens=tokens)
        ms.setdefault(name, []).append((time.perf_counter() - begun) * 1e3)
    each = arm.decode_ms(question, job.tokens)
    if each is not None:
        ms.setdefault("decode", []).append(each)


def _question(cell: Cell, settings: MllmSettings) -> Question:
    image = read_image(cell.image)
    heatmap = None if cell.anomaly_map is None else np.load(cell.anomaly_map, allow_pickle=False)
    size = (image.shape[1], image.shape[0])
    return build_question(Query(cell.image.name, cell.product, image, size, anomaly_map=heatmap), Ask.LABEL, settings)


def _onnx(bundle: Path, threads: int) -> Callable[[], Arm]:
    from saec.vlm.edge.vlm import OnnxVlm, Seen

    class Onnx:
        def __init__(self) -> None:
            self._vlm = OnnxVlm.load(bundle, threads=threads)
            self._seen: Seen | None = None
            self.model_id = self._vlm.model_id

        def decide(self, question: Question) -> tuple[float, float]:
            timing_ms: dict[str, float] = {}
            decision, self._seen = self._vlm.decide(question, timing_ms)
            return decision.p_defect, timing_ms["vision"]

        def evidence(self, question: Question, *, again: bool, max_tokens: int) -> object:
            return self._vlm.evidence(question, self._seen if again else None, max_tokens=max_tokens)

        def decode_ms(self, question: Question, tokens: int) -> float | None:
            text = f"Product: {question.product}. It is defective. What is wrong, as JSON?"
            answer = self._vlm.stream(question.part, text, max_tokens=tokens)
            for _ in answer:
                pass
            return answer.timing_ms["decode"] / (answer.tokens - 1) if answer.tokens > 1 else None

    return Onnx


def _torch(settings: MllmSettings) -> Callable[[], Arm]:
    from saec.evaluate.bench_vlm_torch import Torch

    return lambda: Torch(settings)


def _peak_mb() -> float | None:
    """Return the largest resident memory of this process; unlike getrusage's it holds nothing of the parent's."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # whatever a library prints
        found = measure(Job.model_validate_json(sys.stdin.read()))
    print(found.model_dump_json())
