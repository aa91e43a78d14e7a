"""What a run costs: wall time, processor time, memory and energy, sampled every 0.2 s (the interval of SAEC, §5)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import psutil

from saec.evaluate.energy import CounterUnavailable, EnergyProbe, Nvml, Rapl

EnergyStatus = Literal["measured", "estimated", "unavailable"]
MB = 1e6


@dataclass(frozen=True, slots=True)
class Energy:
    """Energy of a run. ``joules`` is ``None`` exactly when ``status`` is "unavailable"; ``detail`` says what the
    figure covers, or why there is none."""

    status: EnergyStatus
    joules: float | None
    detail: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What the meter saw between entering and leaving. Memory is resident, of this process and its children, in
    10⁶ bytes; ``gpu_utilisation`` in percent and ``gpu_w`` in W are means over the samples, ``gpu_peak_mb`` is the most
    GPU memory in use, whoever used it."""

    wall_s: float
    cpu_s: float | None
    rss_mean_mb: float | None
    rss_peak_mb: float | None
    energy: Energy
    gpu_utilisation: float | None
    gpu_w: float | None
    samples: int
    problems: tuple[str, ...] = ()
    gpu_peak_mb: float | None = None


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """Resident bytes and processor seconds of this process and its children."""

    rss: int
    cpu_s: float


def own_use() -> ProcessUse:
    """Read this process and all its living children; the time of ended children is in their parent's own account."""
    me = psutil.Process()
    rss, cpu_s = 0, 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            with process.oneshot():
                rss += process.memory_info().rss
                t = process.cpu_times()
        except psutil.NoSuchProcess:
            continue  # it ended between the listing and the reading
        cpu_s += t.user + t.system + getattr(t, "children_user", 0.0) + getattr(t, "children_system", 0.0)
    return ProcessUse(rss, cpu_s)


class Meter:
    """Measure the block under ``with``; :meth:`reading` is the result afterwards.

    >>> with Meter(probes=()) as meter:
    ...     pass
    >>> meter.reading().energy.status
    'unavailable'

    Args:
        probes: energy counters; by default NVML and RAPL, whichever work here. Pass :class:`Estimate` to ask for an
            estimate.
        interval_s: time between samples.
        use: how memory and processor time are read.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        probes: Sequence[EnergyProbe] | None = None,
        *,
        interval_s: float = 0.2,
        use: Callable[[], ProcessUse] = own_use,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._probes: list[EnergyProbe] = [Nvml(), Rapl()] if probes is None else list(probes)
        self._interval_s, self._use, self._clock = interval_s, use, clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="saec-meter", daemon=True)
        self._problems: dict[str, str] = {}
        self._uses: list[ProcessUse] = []
        self._live: list[EnergyProbe] = []
        self._begin_s = self._end_s = 0.0

    def __enter__(self) -> Self:
        for probe in self._probes:
            try:
                probe.start()
                self._live.append(probe)
            except CounterUnavailable as error:
                self._problems[probe.name] = str(error)
        self._begin_s = self._clock()
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._end_s = self._sample()

    def reading(self) -> Reading:
        """Return the figures of the finished block."""
        uses, gpu = self._uses, next((p for p in self._live if isinstance(p, Nvml)), None)
        return Reading(
            wall_s=self._end_s - self._begin_s,
            cpu_s=max(0.0, uses[-1].cpu_s - uses[0].cpu_s) if uses else None,
            rss_mean_mb=_mean([u.rss / MB for u in uses]),
            rss_peak_mb=max(u.rss for u in uses) / MB if uses else None,
            energy=self._energy(),
            gpu_utilisation=_mean([s.utilisation for s in gpu.samples]) if gpu else None,
            gpu_w=_mean([s.watts for s in gpu.samples]) if gpu else None,
            samples=len(uses),
            problems=tuple(f"{name}: {why}" for name, why in self._problems.items()),
            gpu_peak_mb=max((s.memory / MB for s in gpu.samples if s.memory), default=None) if gpu else None,
        )

    def _energy(self) -> Energy:
        if not self._live:
            why = "; ".join(f"{name}: {text}" for name, text in self._problems.items()) or "no counter asked for"
            return Energy("unavailable", None, why)
        # A sum with one estimated term is an estimate.
        status: EnergyStatus = "estimated" if any(p.kind == "estimated" for p in self._live) else "measured"
        return Energy(status, sum(p.joules() for p in self._live), " + ".join(p.covers for p in self._live))

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _sample(self) -> float:
        elapsed_s = (now := self._clock()) - self._begin_s
        try:
            self._uses.append(self._use())
        except psutil.Error as error:
            self._problems["process"] = str(error)
        for probe in list(self._live):
            try:
                probe.sample(elapsed_s)
            except CounterUnavailable as error:
                # Half a run's energy is no figure for the run: the probe is dropped and the reason kept.
                self._live.remove(probe)
                self._problems[probe.name] = str(error)
        return now


def mwh_per_correct(joules: float | None, correct: int | None) -> float | None:
    """Energy per correct decision in mWh: mean W × wall s × 1000/3600 / correct (SAEC, §5), with J = W × s."""
    return None if joules is None or not correct else joules * 1000 / 3600 / correct


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
