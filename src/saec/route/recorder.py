"""From the stages to the disk, and from the disk to the supervisor."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from saec.fleet.ledger import Ledger, Receipt
from saec.route.crew import Crew
from saec.types import Heatmap, Verdict


@dataclass(frozen=True, slots=True)
class Durable:
    """A verdict reached the disk ``at`` this time of the run's clock, or did not (``error``).

    ``began`` is when a local verdict's deadline began to run, ``None`` for an amendment.
    """

    verdict: Verdict
    final: bool
    began: float | None
    at: float
    fresh: bool
    error: BaseException | None


class Recorder:
    """Hands verdicts to the ledger and tells the crew's supervisor when each is durable. Thread-safe."""

    def __init__(self, ledger: Ledger, crew: Crew[Durable], clock: Callable[[], float]) -> None:
        self._ledger = ledger
        self._crew = crew
        self._clock = clock
        self._lock = threading.Lock()
        self.written = 0
        """Verdicts handed over so far: the supervisor has to hear of each."""

    def local(self, verdict: Verdict, *, final: bool, heatmap: Heatmap | None, began: float) -> Future[Receipt]:
        """Record a local verdict; the future resolves once it is durable."""
        receipt = self._ledger.record_local(verdict, pending_cloud=not final, heatmap=heatmap)
        self._track(receipt, verdict, final=final, began=began)
        return receipt

    def amend(self, verdict: Verdict) -> None:
        """Record a final verdict.

        Raises:
            ValueError: it holds something that cannot be recorded.
        """
        self._track(self._ledger.amend(verdict), verdict, final=True, began=None)

    def _track(self, receipt: Future[Receipt], verdict: Verdict, *, final: bool, began: float | None) -> None:
        with self._lock:
            self.written += 1

        def on_disk(receipt: Future[Receipt]) -> None:
            error = receipt.exception()
            fresh = error is None and receipt.result().fresh
            self._crew.tell(Durable(verdict, final, began, self._clock(), fresh, error))

        receipt.add_done_callback(on_disk)
