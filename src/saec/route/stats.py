"""What a run measures about itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from saec.types import Label, Verdict, Where


class BusyMeter:
    """Busy time of a stage: the union of the intervals in which at least one worker was inside. Thread-safe.

    Workers enter and leave it as a context manager, several at a time.
    """

    def __init__(self, clock: Callable[[], float], *, within: BusyMeter | None = None) -> None:
        """``clock`` gives monotonic seconds; who is inside this meter is also inside ``within``."""
        self._clock = clock
        self._within = within
        self._lock = threading.Lock()
        self._inside = 0
        self._since = 0.0
        self._total = 0.0
        self._used = False

    def __enter__(self) -> None:
        if self._within is not None:
            self._within.__enter__()
        with self._lock:
            if self._inside == 0:
                self._since = self._clock()
            self._inside += 1
            self._used = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._total += self._clock() - self._since
        if self._within is not None:
            self._within.__exit__(kind, error, trace)

    @property
    def seconds(self) -> float | None:
        """Busy seconds so far, or ``None`` if nobody ever was inside."""
        with self._lock:
            if not self._used:
                return None
            return self._total + (self._clock() - self._since if self._inside else 0.0)


@dataclass(frozen=True, slots=True)
class PipelineStats:
    """One call of :func:`saec.route.pipeline.inspect_stream`. Counts are of this call, not of a run it resumed.

    ``*_s`` are seconds: ``wall_s`` from first to last, the others busy seconds (unions of intervals; ``None``: the
    stage never ran). ``local_s`` is the union of decoding, scene and edge: the edge-side branch.
    """

    parts: int
    """Parts that got their local verdict."""
    skipped: int
    """Parts that the ledger already had."""
    requeued: int
    """Questions that an earlier, interrupted run had left open."""
    unreadable: int
    escalated: int
    """Parts handed to the cloud stage."""
    answered: int
    """Verdicts amended or confirmed by the cloud."""
    fallbacks: int
    left_pending: int
    """Questions left open for a resumed run."""
    explained: int
    """Rejects that a model on the edge was asked to put into words, in time or not."""
    left_unexplained: int
    """Explanations left open for a resumed run."""
    deadline_ms: float
    deadline_misses: int
    uplink_bytes: int
    wall_s: float
    decode_s: float | None
    scene_s: float | None
    edge_s: float | None
    local_s: float | None
    cloud_s: float | None
    busy_s: float | None
    """The union of both branches."""
    explain_s: float | None
    circuit_opened: int
    """How often the circuit breaker opened."""
    interrupted: bool
    """The run was stopped before its source ended."""

    @property
    def overlap(self) -> float | None:
        """How much of the shorter branch was hidden behind the longer one.

        With L = ``local_s``, C = ``cloud_s`` and B = ``busy_s``, the union of the two: (L + C − B) / min(L, C). 1: the
        shorter branch cost no time of its own; 0: one branch always waited for the other; ``None``: one did not run.
        """
        if not self.local_s or not self.cloud_s or not self.busy_s:
            return None
        return min(1.0, max(0.0, (self.local_s + self.cloud_s - self.busy_s) / min(self.local_s, self.cloud_s)))


@dataclass(slots=True)
class Tally:
    """Counts of the verdicts that reached the disk. Kept by one thread."""

    parts: int = 0
    unreadable: int = 0
    escalated: int = 0
    answered: int = 0
    fallbacks: int = 0
    explained: int = 0
    deadline_misses: int = 0
    uplink_bytes: int = 0

    def local(self, verdict: Verdict, *, final: bool, late: bool) -> None:
        """Count a local verdict; ``final`` is false where a cloud question is open."""
        self.parts += 1
        self.unreadable += verdict.label is Label.UNREADABLE
        self.escalated += not final
        self.deadline_misses += late

    def amended(self, verdict: Verdict) -> None:
        """Count what became of a cloud question."""
        self.answered += verdict.where is Where.CLOUD
        self.fallbacks += verdict.where is Where.FALLBACK
        self.uplink_bytes += verdict.uplink_bytes
