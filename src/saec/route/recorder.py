"""From the stages to the disk, and from the disk to the supervisor."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from saec.fleet.ledger import Ledger, Receipt
from saec.route.crew import Crew
from saec.route.verdicts import is_wordless
from saec.types import Heatmap, Verdict


@dataclass(frozen=True, slots=True)
class Durable:
    """A verdict reached the disk ``at`` this time of the run's clock, or did not (``error``).

    ``began`` is when a local verdict's deadline began to run, ``None`` for an amendment or an explanation.
    """

    verdict: Verdict
    final: bool
    began: float | None
    at: float
    fresh: bool
    error: BaseException | None


class Recorder:
    """Hands verdicts to the ledger and tells the crew's supervisor when each is durable. Thread-safe."""

    def __init__(self, ledger: Ledger, crew: Crew[Durable], clock: Callable[[], float], *, explains: bool) -> None:
        """With ``explains``, final verdicts without words wait for an explanation."""
        self._ledger = ledger
        self._crew = crew
        self._clock = clock
        self._explains = explains
        self._lock = threading.Lock()
        self.written = 0
        """Verdicts handed over so far: the supervisor has to hear of each."""

    def local(self, verdict: Verdict, *, final: bool, heatmap: Heatmap | None, began: float) -> Future[Receipt]:
        """Record a local verdict; the future resolves once it is durable."""
        unexplained = final and self._explains and is_wordless(verdict)
        receipt = self._ledger.record_local(verdict, pending_cloud=not final, unexplained=unexplained, heatmap=heatmap)
        self._track(receipt, verdict, final=final, began=began)
        return receipt

    def amend(self, verdict: Verdict) -> None:
        """Record a final verdict.

        Raises:
            ValueError: it holds something that cannot be recorded.
        """
        unexplained = self._explains and is_wordless(verdict)
        self._track(self._ledger.amend(verdict, unexplained=unexplained), verdict, final=True, began=None)

    def explain(self, seq: int, verdict: Verdict) -> Future[Receipt]:
        """Record what became of an explanation; the future resolves once it is durable."""
        receipt = self._ledger.explain(seq, verdict)
        self._track(receipt, verdict, final=True, began=None)
        return receipt

    def _track(self, receipt: Future[Receipt], verdict: Verdict, *, final: bool, began: float | None) -> None:
        with self._lock:
            self.written += 1

        def on_disk(receipt: Future[Receipt]) -> None:
            error = receipt.exception()
            fresh = error is None and receipt.result().fresh
            self._crew.tell(Durable(verdict, final, began, self._clock(), fresh, error))

        receipt.add_done_callback(on_disk)
