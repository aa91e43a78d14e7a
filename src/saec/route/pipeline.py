"""The streaming pipeline: decode, scene, edge and cloud at the same time, and every verdict in the ledger.

::

    source ─> decode (n threads) ─> scene (1 thread) ─┐
         └─────────── in part order ──────────> edge (1) ─┬─> local verdict ─> ledger ─> caller
                                                          └─> questions ─> cloud (n) ─> amendment ─> ledger ─> caller
                                                ledger ─> rejects without words ─> explainer (1) ─> ledger ─> caller

Every arrow above the last row is a bounded queue; a full one makes the stage before it wait. Memory is bounded by the
queues' lengths, whatever the number of parts (a resumed run also holds the names of the recorded parts until it has
passed them).

When the cloud is slower than the line, escalated parts wait in the queue of questions while the edge goes on; when that
queue is full, the edge waits *between* parts, after handing over the local verdict. No cloud opinion is lost, and no
local verdict is late because of the cloud.

An explainer on the edge puts rejects into words that the cloud says nothing about: after their verdicts, beside all the
rest, at its own pace, and without a say in label or P(defect). Its queue is the ledger itself, so that nothing ever
waits for it but the end of the run.

Deadline: a part's clock starts when it has been taken from the source *and* the edge is free for it, and stops when its
local verdict is durable. On a line that delivers slower than the edge works this is the whole way from the file to the
ledger; on a folder of waiting files it is the pace at which verdicts come. A late verdict is counted, never dropped.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from saec.config import Settings
from saec.data.hashing import sha256_json
from saec.fleet.ledger import Ledger
from saec.fleet.slots import VERSION_ROLE
from saec.route.ask import Asker
from saec.route.budget import Budget, SharedBudget
from saec.route.channel import Channel
from saec.route.cloud_side import CloudSide, Question
from saec.route.crew import Crew
from saec.route.edge_side import EdgeSide
from saec.route.explain_side import EXPLAIN, ExplainSide
from saec.route.local import Decode, Edge, LocalJudge, Scene
from saec.route.recorder import Durable, Recorder
from saec.route.stats import BusyMeter, PipelineStats, Tally
from saec.route.verdicts import is_wordless
from saec.types import CloudClient, Explainer, Part, Verdict

OnVerdict = Callable[[Verdict, bool], None]
"""``(verdict, final)``, called in the caller's thread once the verdict is durable: local verdicts in part order
(``final`` is false while a cloud question is open), amendments and explanations as they come."""


def inspect_stream(
    parts: Iterable[Part],
    edge: Edge,
    *,
    decode: Decode,
    scene: Scene,
    cloud: CloudClient | None,
    settings: Settings,
    ledger: Ledger,
    explainer: Explainer | None = None,
    on_verdict: OnVerdict | None = None,
    clock: Callable[[], float] = time.monotonic,
    rng: random.Random | None = None,
) -> PipelineStats:
    """Inspect parts until the source ends; every part gets a durable local verdict, then the cloud amends.

    ``parts`` may be endless; it is iterated in a thread of its own. With a ledger that has verdicts already, the run is
    resumed: recorded parts are skipped, open questions are asked again, the budget goes on where it was, and the result
    is that of an undisturbed run. ``clock`` gives monotonic seconds, ``rng`` the jitter between retries. ``explainer``
    puts rejects into words where the cloud says nothing; it is neither warmed up nor closed here.

    Ctrl-C (or a ``KeyboardInterrupt`` from ``parts`` or ``on_verdict``) stops the intake: parts already taken get their
    local verdict, questions under way are waited for, all others, explanations too, stay open for a resumed run, and
    the stats come back with ``interrupted`` set. A second one raises at once; the ledger stays resumable.

    Raises:
        BadInput: the ledger belongs to another station or other routing settings, is damaged, or the disk is full.
        Exception: whatever ``parts`` raised (after all parts taken before it have their verdict), ``on_verdict``
            raised, or a stage crashed with.
    """
    ledger.bind(station=station_fingerprint(edge), settings=routing_fingerprint(settings))
    run = _Run(edge, decode, scene, cloud, explainer, settings, ledger, on_verdict, clock, rng or random.Random())
    return run.execute(parts)


def station_fingerprint(edge: Edge) -> str:
    """Return the hash of who judges, versions aside: a run goes on with the next version of its station, or with the
    one before, and each verdict says which version made it."""
    return sha256_json({role: name for role, name in edge.models.items() if role != VERSION_ROLE})


def routing_fingerprint(settings: Settings) -> str:
    """Return the hash of the settings that decide verdicts: not of timeouts, addresses and queue lengths."""
    route = settings.route.model_dump(
        include={"mode", "random_ratio", "seed", "budget_share", "budget_bytes", "budget_seconds"}
    )
    cloud = settings.cloud.model_dump(include={"uplink", "max_side", "jpeg_quality"})
    if settings.cloud.uplink == "tokens":
        cloud["tokens"] = settings.tokens.model_dump(mode="json")
    if settings.learn.audit_share > 0:
        route |= settings.learn.model_dump(include={"audit_share", "drift_share"})
    return sha256_json({"route": route, "cloud": cloud})


class _Run:
    """One run: its stages, and the loop that supervises them."""

    def __init__(
        self,
        edge: Edge,
        decode: Decode,
        scene: Scene,
        cloud: CloudClient | None,
        explainer: Explainer | None,
        settings: Settings,
        ledger: Ledger,
        on_verdict: OnVerdict | None,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._settings, self._ledger, self._on_verdict, self._clock = settings, ledger, on_verdict, clock
        self._stopping = threading.Event()
        self._interrupts = 0
        self._durable = 0
        self._tally = Tally()
        self._crew: Crew[Durable] = Crew(4 * settings.route.queue, on_failure=self._abort)
        self._recorder = Recorder(ledger, self._crew, clock, explains=explainer is not None)
        # The questions come from the edge and from an interrupted run.
        self._questions: Channel[Question] = Channel(settings.route.queue, producers=2)
        self._busy = BusyMeter(clock)
        self._local_busy = BusyMeter(clock, within=self._busy)
        self._cloud_busy = BusyMeter(clock, within=self._busy)
        self._asker: Asker | None = None
        if cloud is not None:
            wait = self._stopping.wait
            self._asker = Asker(cloud, settings.cloud, clock=clock, wait=wait, rng=rng, busy=self._cloud_busy)
        budget = SharedBudget(Budget.of(settings.route, ledger.spent()))
        self._judge = LocalJudge(edge, settings, None if cloud is None else budget, clock=clock)
        self._edge_side = EdgeSide(
            self._judge,
            decode,
            scene,
            settings.route,
            recorder=self._recorder,
            questions=self._questions,
            crew=self._crew,
            clock=clock,
            stopping=self._stopping,
            busy=self._local_busy,
        )
        self._cloud_side = CloudSide(
            self._asker,
            self._judge,
            decode,
            settings.cloud,
            budget=budget,
            recorder=self._recorder,
            questions=self._questions,
            crew=self._crew,
            clock=clock,
            stopping=self._stopping,
        )
        self._explain_side = ExplainSide(
            explainer,
            decode,
            settings.explain,
            ledger=ledger,
            recorder=self._recorder,
            crew=self._crew,
            clock=clock,
            stopping=self._stopping,
        )

    def execute(self, parts: Iterable[Part]) -> PipelineStats:
        begun = self._clock()
        pending = self._ledger.pending()
        with self._interrupts_counted():
            try:
                self._judge.remember(self._ledger.verdicts)
                self._cloud_side.start(pending)
                self._edge_side.start(parts, self._ledger.done_ids())
                self._explain_side.start()
                self._supervise()
            finally:
                self._abort()
                self._crew.dismiss()
        if self._crew.failure is not None:
            raise self._crew.failure
        if self._edge_side.source_error is not None:
            raise self._edge_side.source_error
        return self._stats(requeued=len(pending), wall_s=self._clock() - begun)

    def _supervise(self) -> None:
        failed_at: float | None = None
        while self._crew.alive() or self._durable < self._recorder.written:
            event = self._crew.next_event()
            try:
                if event is not None:
                    self._take(event)
            except KeyboardInterrupt:
                self._interrupted()
            except Exception as error:  # noqa: BLE001 - the caller's own callback failed: raised after the wind-up
                self._crew.fail(error)
            self._interrupts = max(self._interrupts, int(self._edge_side.interrupted))
            if self._interrupts and not self._stopping.is_set():
                self._stopping.set()
                self._edge_side.stop()
                self._explain_side.wake()
            if self._crew.failure is not None:
                self._crew.forget("source")
                failed_at = self._clock() if failed_at is None else failed_at
                if self._clock() - failed_at > self._settings.cloud.timeout_s + 1:
                    return  # a stage hangs in somebody else's code; its thread is a daemon
            self._cloud_side.replace_hung_threads()
            self._explain_side.forget_if_hung()
            if not self._crew.alive(besides=EXPLAIN) and self._durable == self._recorder.written:
                self._explain_side.finish()

    def _take(self, event: Durable) -> None:
        self._durable += 1
        if event.error is not None:
            self._crew.fail(event.error)
        if not event.fresh or self._crew.failure is not None:
            return
        if event.verdict.explanation is not None:
            self._tally.explained += 1
        elif event.began is None:
            self._tally.amended(event.verdict)
        else:
            late = (event.at - event.began) * 1000 > self._settings.route.deadline_ms
            self._tally.local(event.verdict, final=event.final, late=late)
        if event.final and is_wordless(event.verdict):
            self._explain_side.wake()
        if self._on_verdict is not None:
            self._on_verdict(event.verdict, event.final)

    @contextmanager
    def _interrupts_counted(self) -> Iterator[None]:
        """Count Ctrl-C instead of letting it strike anywhere: an event taken but not booked is waited for in vain."""
        previous = signal.getsignal(signal.SIGINT)
        ours = threading.current_thread() is threading.main_thread() and callable(previous)
        if ours:
            signal.signal(signal.SIGINT, lambda _signal, _frame: self._interrupted())
        try:
            yield
        finally:
            if ours:
                signal.signal(signal.SIGINT, previous)

    def _interrupted(self) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt

    def _abort(self) -> None:
        self._stopping.set()
        self._edge_side.abort()
        self._questions.abort()
        self._explain_side.wake()

    def _stats(self, *, requeued: int, wall_s: float) -> PipelineStats:
        tally, side, asker = self._tally, self._edge_side, self._asker
        return PipelineStats(
            parts=tally.parts,
            skipped=side.skipped,
            requeued=requeued,
            unreadable=tally.unreadable,
            escalated=tally.escalated,
            answered=tally.answered,
            fallbacks=tally.fallbacks,
            left_pending=requeued + tally.escalated - tally.answered - tally.fallbacks,
            explained=tally.explained,
            left_unexplained=self._ledger.count_unexplained(),
            deadline_ms=self._settings.route.deadline_ms,
            deadline_misses=tally.deadline_misses,
            uplink_bytes=tally.uplink_bytes,
            wall_s=wall_s,
            decode_s=side.decode_busy.seconds,
            scene_s=side.scene_busy.seconds,
            edge_s=self._judge.busy.seconds,
            local_s=self._local_busy.seconds,
            cloud_s=self._cloud_busy.seconds,
            busy_s=self._busy.seconds,
            explain_s=self._explain_side.busy.seconds,
            circuit_opened=0 if asker is None else asker.breaker.opened,
            interrupted=self._interrupts > 0,
        )
