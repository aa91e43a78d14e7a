"""The explainer's stage: rejects that nobody has put into words yet, one at a time, in the order of their parts.

Its queue is the ledger: whatever waits there costs no memory, makes no other stage wait, and survives a killed process.
A sentence that comes late, or not at all, leaves the verdict as it was, boxes included, with the reason on record.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from saec.config import ExplainSettings
from saec.fleet.ledger import Ledger, Pending
from saec.route.crew import Crew
from saec.route.local import Decode
from saec.route.query import build_query
from saec.route.recorder import Durable, Recorder
from saec.route.stats import BusyMeter
from saec.route.verdicts import explained_verdict, unexplained_verdict
from saec.types import Evidence, Explainer, Explanation, Query, Verdict

EXPLAIN = "explain"
"""Name of the stage."""

HUNG_S = 60.0
"""So many seconds after its budget, an explainer that has not come back holds up the run no longer."""


class _ChangedSince(Exception):
    pass


class ExplainSide:
    """Asks the explainer about each reject without words, until :meth:`finish` and until none is left."""

    def __init__(
        self,
        explainer: Explainer | None,
        decode: Decode,
        settings: ExplainSettings,
        *,
        ledger: Ledger,
        recorder: Recorder,
        crew: Crew[Durable],
        clock: Callable[[], float],
        stopping: threading.Event,
    ) -> None:
        """``explainer`` is ``None`` where nobody explains; then nothing here does anything."""
        self._explainer, self._decode, self._budget_s = explainer, decode, settings.budget_ms / 1000
        self._ledger, self._recorder, self._crew = ledger, recorder, crew
        self._clock, self._stopping = clock, stopping
        self._news, self._last = threading.Event(), threading.Event()
        self._since: float | None = None
        self.busy = BusyMeter(clock)

    def start(self) -> None:
        """Start the stage, with what an interrupted run has left."""
        explainer = self._explainer
        if explainer is not None:
            self._crew.spawn(EXPLAIN, lambda: self._explain_all(explainer))

    def wake(self) -> None:
        """Look again: there is another reject, or the run is stopping."""
        self._news.set()

    def finish(self) -> None:
        """End once nothing is left: no more rejects will come."""
        self._last.set()
        self._news.set()

    def forget_if_hung(self) -> None:
        """Leave an explainer alone that does not come back; what it has not explained stays open. Supervisor only."""
        since = self._since
        if since is not None and self._clock() - since > self._budget_s + HUNG_S:
            self._crew.forget(EXPLAIN)

    def _explain_all(self, explainer: Explainer) -> None:
        while not self._stopping.is_set():
            last = self._last.is_set()  # looked at before the ledger: what came in between is found there
            pending = self._ledger.next_unexplained()
            if pending is not None:
                verdict = self._explain(explainer, pending)
                self._crew.result(self._recorder.explain(pending.seq, verdict))
            elif last:
                return
            else:
                self._news.wait()
                self._news.clear()

    def _explain(self, explainer: Explainer, pending: Pending) -> Verdict:
        begun = self._since = self._clock()
        deadline = begun + self._budget_s
        said: Evidence | None = None
        late, why = False, "the model said nothing"
        try:
            with self.busy:
                said = explainer.explain(self._query(pending), deadline=deadline)
            late = said is None or self._clock() > deadline
        except Exception as error:  # noqa: BLE001 - recorded in the part's verdict, which stands whatever this is
            why = f"{type(error).__name__}: {error}"
        self._since = None
        verdict, model_id, ms = pending.verdict, explainer.model_id, (self._clock() - begun) * 1000
        if late:
            why = f"no sentence within {self._budget_s:g} s"
            return unexplained_verdict(verdict, Explanation.LATE, why, model_id, ms)
        if said is None or not (said.kind or said.text):
            return unexplained_verdict(verdict, Explanation.FAILED, why, model_id, ms)
        return explained_verdict(verdict, said, model_id, ms)

    def _query(self, pending: Pending) -> Query:
        """Return the question about a part: its file is read again, which takes a hundredth of an answer's time."""
        verdict = pending.verdict
        sha256, image = self._decode(Path(verdict.path))
        if sha256 != verdict.sha256:
            raise _ChangedSince("the image has changed since its verdict")
        return build_query(
            verdict.part_id,
            verdict.product,
            image,
            heatmap=pending.heatmap,
            evidence=verdict.evidence,
            p_defect=verdict.edge_p_defect,
            uplink="image",
        )
