"""What a run measures about itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType


class BusyMeter:
    """Busy time of a stage: the union of the intervals in which at least one worker was inside. Thread-safe.

    >>> with meter: work()
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """``clock`` gives monotonic seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._inside = 0
        self._since = 0.0
        self._total = 0.0
        self._used = False

    def __enter__(self) -> None:
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

    ``*_s`` are seconds: ``wall_s`` from first to last, the others busy seconds (unions of intervals; ``None``: the stage
    never ran). ``local_s`` is the union of decoding, scene and edge: the edge-side branch.
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
    deadline_ms: float
    deadline_misses: int
    uplink_bytes: int
    wall_s: float
    decode_s: float | None
    scene_s: float | None
    edge_s: float | None
    local_s: float | None
    cloud_s: float | None
    circuit_opened: int
    """How often the circuit breaker opened."""
    interrupted: bool
    """The run was stopped before its source ended."""

    @property
    def overlap(self) -> float | None:
        """How much of the shorter branch was hidden behind the longer one.

        With L = ``local_s``, C = ``cloud_s`` and W = ``wall_s``: (L + C − W) / min(L, C), cut to [0, 1]. 1: the wall time is
        that of the longer branch; 0: they ran one after the other; ``None``: one of them did not run.
        """
        if not self.local_s or not self.cloud_s:
            return None
        hidden = self.local_s + self.cloud_s - self.wall_s
        return min(1.0, max(0.0, hidden / min(self.local_s, self.cloud_s)))
