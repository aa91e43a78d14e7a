"""How fast a backend decides, over the size of its batches: no HTTP, no queue, no evidence.

One decision is one prefill: a forward pass over prompt and image with P(defect) at its end (SAEC §3). Every figure is
measured here and now; what this machine cannot measure is ``None``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice

from saec.cloud.backend import Computes, warm_up
from saec.errors import BadInput
from saec.evaluate.meter import Meter, Reading, mwh_per_correct
from saec.evaluate.metrics import percentiles
from saec.evaluate.run_record import cpu_name
from saec.evaluate.table import Cell, Table
from saec.types import Backend, Opinion, Query

SIZES = (1, 2, 4, 8, 16, 32)


def bench_batches(
    backend: Backend,
    queries: Sequence[Query],
    *,
    sizes: Sequence[int] = SIZES,
    seconds: float = 5.0,
    meter: Callable[[], Meter] = Meter,
) -> Table:
    """Put batches of each size to a backend for ``seconds``, after one that is not counted; the queries in turn.

    The backend is warmed up first. For decisions alone the queries must want no evidence: what was given nevertheless
    is counted in a note. A size that fails, such as one that the memory does not hold, ends the curve with a note.

    Raises:
        BadInput: nothing to ask, or the backend does not answer the smallest batch.
    """
    if not queries or not sizes or min(sizes) < 1 or seconds <= 0:
        raise BadInput("nothing to ask", fix="pass at least one image and one size of batches from 1 on")
    warm_up(backend)
    device = backend.device if isinstance(backend, Computes) else "cpu"
    device = cpu_name() if device == "cpu" else device
    rows: list[Mapping[str, Cell]] = []
    notes = [f"{seconds:g} s a size, {len(queries)} images in turn"]
    evidence = 0
    for size in sizes:
        try:
            _judge(backend, [queries[0]] * size)
            times, reading, asked = _measure(backend, queries, size, seconds, meter())
        except _NotAnswered as error:
            if not rows:
                raise BadInput(f"the backend does not answer ({error})", where=backend.model_id) from None
            notes.append(f"batches of {size}: {error}")
            break
        rows.append(_row(size, times, reading))
        evidence += asked
    if evidence:
        notes.append(f"{evidence} decisions were followed by evidence: these figures are not of decisions alone")
    notes.append(f"energy {reading.energy.status}: {reading.energy.detail}")
    return Table(f"Decisions of {backend.model_id} on {device}", tuple(rows[0]), rows, notes)


class _NotAnswered(Exception):
    pass


def _measure(
    backend: Backend, queries: Sequence[Query], size: int, seconds: float, meter: Meter
) -> tuple[list[float], Reading, int]:
    """Return the seconds of each batch, what they cost, and how many answers came with evidence."""
    turn = cycle(queries)
    times: list[float] = []
    evidence = 0
    with meter:
        begun = time.perf_counter()
        while (started := time.perf_counter()) - begun < seconds:
            opinions = _judge(backend, list(islice(turn, size)))
            times.append(time.perf_counter() - started)
            evidence += sum("evidence" in opinion.timing_ms for opinion in opinions)
    return times, meter.reading(), evidence


def _judge(backend: Backend, queries: Sequence[Query]) -> list[Opinion]:
    """Return the opinions on a batch.

    Raises:
        _NotAnswered: the batch, or one of its questions, failed.
    """
    try:
        answers = backend.judge(queries)
    except Exception as error:  # a model may fail in any way; the table says how
        raise _NotAnswered(_brief(error)) from error
    for answer in answers:
        if isinstance(answer, Exception):
            raise _NotAnswered(_brief(answer))
    return [answer for answer in answers if isinstance(answer, Opinion)]


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _row(size: int, times: Sequence[float], reading: Reading) -> dict[str, Cell]:
    decided = size * len(times)
    latency = percentiles([each * 1e3 for each in times]) or {}
    return {
        "batch": size,
        "decided": decided,
        "per_s": decided / sum(times),
        "p50_ms": latency.get("p50"),
        "p99_ms": latency.get("p99"),
        "gpu_percent": reading.gpu_utilisation,
        "gpu_w": reading.gpu_w,
        "gpu_mb": reading.gpu_peak_mb,
        "rss_mb": reading.rss_peak_mb,
        "mWh_each": mwh_per_correct(reading.energy.joules, decided),
    }
