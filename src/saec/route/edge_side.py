"""The edge's stages: source, decode, scene, edge. Each runs in its own thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

from saec.config import RouteSettings
from saec.route.channel import Channel, Closed
from saec.route.cloud_side import Question
from saec.route.crew import Crew
from saec.route.local import Decode, Decoded, LocalJudge, Scene, Scored, read_part, score_scene
from saec.route.recorder import Durable, Recorder
from saec.route.stats import BusyMeter
from saec.route.verdicts import printable
from saec.types import Part


@dataclass(frozen=True, slots=True)
class _Item:
    """A part on its way, taken from the source at this time of the run's clock."""

    part: Part
    taken: float
    decoded: Future[Decoded] = field(default_factory=Future)
    scored: Future[Scored] = field(default_factory=Future)


class EdgeSide:
    """Takes parts in, makes local verdicts in part order, and puts questions for the cloud into ``questions``."""

    def __init__(
        self,
        judge: LocalJudge,
        decode: Decode,
        scene: Scene,
        settings: RouteSettings,
        *,
        recorder: Recorder,
        questions: Channel[Question],
        crew: Crew[Durable],
        clock: Callable[[], float],
        stopping: threading.Event,
        busy: BusyMeter,
    ) -> None:
        """``busy`` measures the time in which any of these stages works."""
        self._judge, self._decode, self._scene = judge, decode, scene
        self._recorder, self._questions, self._crew = recorder, questions, crew
        self._clock, self._stopping, self._workers = clock, stopping, settings.decode_workers
        # Beyond the items in `order` there are at most one in the feeder's hand and one at the edge, so that the two
        # side queues are never full before it is.
        self._order: Channel[_Item] = Channel(settings.queue)
        self._todo: Channel[_Item] = Channel(settings.queue + 2)
        self._scenes: Channel[_Item] = Channel(settings.queue + 2, producers=settings.decode_workers)
        self._busy = busy
        self.decode_busy, self.scene_busy = BusyMeter(clock), BusyMeter(clock)
        self.skipped = 0
        self.interrupted = False
        self.source_error: Exception | None = None

    def start(self, parts: Iterable[Part], recorded: dict[str, int]) -> None:
        """Start the stages; ``recorded`` counts the verdicts that the ledger already has for each part."""
        self._crew.spawn("source", partial(self._feed, parts, recorded))
        for number in range(self._workers):
            self._crew.spawn(f"decode-{number}", self._decode_all)
        self._crew.spawn("scene", self._score_all)
        self._crew.spawn("edge", self._judge_all)

    def stop(self) -> None:
        """Take nothing more in; what was taken goes on to its local verdict."""
        self._crew.forget("source")  # it may be waiting for a next part that never comes
        self._todo.close()
        self._order.close()

    def abort(self) -> None:
        """Drop everything and wake everybody."""
        for channel in (self._todo, self._order, self._scenes):
            channel.abort()

    def _feed(self, parts: Iterable[Part], recorded: dict[str, int]) -> None:
        try:
            for part in parts:
                if self._stopping.is_set():
                    return
                name = printable(part.part_id)
                if name in recorded:
                    recorded[name] -= 1
                    if recorded[name] == 0:
                        del recorded[name]
                    self.skipped += 1
                    continue
                item = _Item(part, self._clock())
                self._todo.put(item)
                self._order.put(item)
        except KeyboardInterrupt:
            self.interrupted = True
        except Closed:
            return
        except Exception as error:  # noqa: BLE001 - raised once all parts taken before it have their verdict
            self.source_error = error
        finally:
            self._todo.close()
            self._order.close()

    def _decode_all(self) -> None:
        try:
            for item in self._todo:
                with self._busy:
                    decoded = read_part(item.part.path, self._decode, self._clock, self.decode_busy)
                item.decoded.set_result(decoded)
                if decoded.image is not None and self._judge.wants_scene(item.part.product):
                    self._scenes.put(item)
                else:
                    item.scored.set_result(Scored(None, None, None))
        finally:
            self._scenes.close()

    def _score_all(self) -> None:
        for item in self._scenes:
            image = item.decoded.result().image
            if image is not None:
                with self._busy:
                    scored = score_scene(image, self._scene, self._clock, self.scene_busy)
                item.scored.set_result(scored)

    def _judge_all(self) -> None:
        try:
            free = self._clock()
            for item in self._order:
                self._judge_one(item, began=max(item.taken, free))
                free = self._clock()
        finally:
            self._questions.close()

    def _judge_one(self, item: _Item, *, began: float) -> None:
        decoded = self._crew.result(item.decoded)
        waited_ms = (self._clock() - decoded.at) * 1000
        with self._busy:
            judged = self._judge.judge(item.part, decoded, partial(self._crew.result, item.scored))
        timings = {"wait_edge": waited_ms, "local": (self._clock() - began) * 1000}
        verdict = replace(judged.verdict, timings_ms={**judged.verdict.timings_ms, **timings})
        receipt = self._recorder.local(verdict, final=judged.ask is None, heatmap=judged.heatmap, began=began)
        if judged.ask is not None:
            # Blocks while the cloud is behind, but only after this part's local verdict was handed over.
            self._questions.put(Question(judged.ask, verdict, receipt, self._clock()))
