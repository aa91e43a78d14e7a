"""The cloud's stages: questions out, amendments and fallbacks in. Every question ends in exactly one of them, or stays
pending in the ledger for a resumed run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from saec.config import CloudSettings
from saec.fleet.ledger import Pending, Receipt
from saec.route.ask import Asker, NoOpinion
from saec.route.breaker import Stopped
from saec.route.budget import SharedBudget
from saec.route.channel import Channel
from saec.route.crew import Crew
from saec.route.local import Ask, Decode, LocalJudge, read_part
from saec.route.recorder import Durable, Recorder
from saec.route.stats import BusyMeter
from saec.route.verdicts import amended_verdict, fallback_verdict
from saec.types import Opinion, Part, Reason, Verdict


@dataclass(frozen=True, slots=True)
class Question:
    """A part on its way to the cloud. It is asked only once ``receipt`` says that its local verdict is durable."""

    ask: Ask
    local: Verdict
    receipt: Future[Receipt]
    queued: float


class CloudSide:
    """Asks what comes out of ``questions``, several at a time."""

    def __init__(
        self,
        asker: Asker | None,
        judge: LocalJudge,
        decode: Decode,
        settings: CloudSettings,
        *,
        budget: SharedBudget,
        recorder: Recorder,
        questions: Channel[Question],
        crew: Crew[Durable],
        clock: Callable[[], float],
        stopping: threading.Event,
    ) -> None:
        """``asker`` is ``None`` where there is no cloud."""
        self._asker, self._judge, self._decode, self._settings = asker, judge, decode, settings
        self._budget, self._recorder, self._questions, self._crew = budget, recorder, questions, crew
        self._clock, self._stopping = clock, stopping
        self._lock = threading.Lock()
        self._in_flight: dict[str, tuple[Question, float]] = {}
        self._threads = 0

    def start(self, pending: list[Pending]) -> None:
        """Start the stages; ``pending`` are the questions that an interrupted run left open."""
        self._crew.spawn("requeue", partial(self._requeue, pending))
        if self._asker is not None:
            for _ in range(self._settings.in_flight):
                self._spawn(self._asker, None)

    def replace_hung_threads(self) -> None:
        """Leave threads alone whose client ignores its deadline: it must not hold up the run. Supervisor only."""
        if self._asker is None:
            return
        limit = 1.5 * self._settings.timeout_s + 1
        with self._lock:
            hung = {name: entry for name, entry in self._in_flight.items() if self._clock() - entry[1] > limit}
            for name in hung:
                del self._in_flight[name]
        for name, entry in hung.items():
            self._crew.forget(name)
            self._spawn(self._asker, entry)

    def _spawn(self, asker: Asker, hung: tuple[Question, float] | None) -> None:
        name = f"cloud-{self._threads}"
        self._threads += 1
        self._crew.spawn(name, partial(self._ask_all, asker, name, hung))

    def _ask_all(self, asker: Asker, name: str, hung: tuple[Question, float] | None) -> None:
        if hung is not None:
            self._settle(*hung, NoOpinion(Reason.CLOUD_TIMEOUT, "the client did not keep its deadline"))
        for question in self._questions:
            if self._stopping.is_set():
                continue  # it stays pending in the ledger
            if not question.receipt.result().fresh:
                self._budget.settle(uplink_bytes=0, cloud_s=0.0)
                continue  # the same part came before, and was asked about then
            begun = self._clock()
            with self._lock:
                self._in_flight[name] = (question, begun)
            try:
                outcome = asker.ask(question.ask.query)
            except Stopped:
                continue
            finally:
                with self._lock:
                    given_up = self._in_flight.pop(name, None) is None
            if given_up:
                return  # another thread has taken this one's place and settled its question
            self._settle(question, begun, outcome)

    def _settle(self, question: Question, begun: float, outcome: Opinion | NoOpinion) -> None:
        local, ask, now = question.local, question.ask, self._clock()
        timings = {"wait_cloud": (begun - question.queued) * 1000, "cloud": (now - begun) * 1000}
        if isinstance(outcome, NoOpinion):
            self._fall_back(local, outcome, timings)
            return
        verdict = amended_verdict(local, outcome, ask.thresholds, ask.fusion, timings)
        try:
            self._recorder.amend(verdict)
        except ValueError as error:
            text = f"the answer cannot be recorded: {error}"
            self._fall_back(local, NoOpinion(Reason.CLOUD_BAD_ANSWER, text, outcome.uplink_bytes), timings)
            return
        self._budget.settle(uplink_bytes=outcome.uplink_bytes, cloud_s=now - begun)

    def _fall_back(self, local: Verdict, none: NoOpinion, timings_ms: dict[str, float]) -> None:
        verdict = fallback_verdict(local, none.reason, none.error, timings_ms, uplink_bytes=none.uplink_bytes)
        self._recorder.amend(verdict)
        self._budget.settle(uplink_bytes=none.uplink_bytes, cloud_s=timings_ms.get("cloud", 0.0) / 1000)

    def _requeue(self, pending: list[Pending]) -> None:
        """Put the questions again that an interrupted run left open; the edge does not judge these parts again."""
        try:
            for each in pending:
                if self._stopping.is_set():
                    return
                again = self._ask_again(each)
                if isinstance(again, NoOpinion):
                    self._fall_back(each.verdict, again, {})
                    continue
                receipt: Future[Receipt] = Future()
                receipt.set_result(Receipt(each.seq))
                self._questions.put(Question(again, each.verdict, receipt, self._clock()))
        finally:
            self._questions.close()

    def _ask_again(self, pending: Pending) -> Ask | NoOpinion:
        local = pending.verdict
        if self._asker is None:
            return NoOpinion(Reason.CLOUD_UNREACHABLE, "the run was resumed without a cloud")
        part = Part(local.part_id, local.product, Path(local.path), local.truth)
        decoded = read_part(part.path, self._decode, self._clock, BusyMeter(self._clock))
        if decoded.image is None:
            return NoOpinion(Reason.UNREADABLE, f"the image can no longer be read: {decoded.error}")
        if decoded.sha256 != local.sha256:
            return NoOpinion(Reason.UNREADABLE, "the image has changed since its local verdict")
        return self._judge.ask(part, decoded.image, pending.heatmap, local.evidence, local.edge_p_defect)
