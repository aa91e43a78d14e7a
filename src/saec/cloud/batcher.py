"""Dynamic batching: many waiting requests, one model that is best fed in groups.

Pure asyncio, knows nothing of HTTP or images. The work runs in one thread, one batch at a time; while it runs the next
batch gathers. The queue is bounded: what does not fit is refused at once with an honest time to come back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Q = TypeVar("Q")
A = TypeVar("A")
T = TypeVar("T")

_FIRST_GUESS_S = 1.0
_SMOOTHING = 0.3
_FULL = "the queue is full"
_TOO_LONG = "the queue is too long for the deadline"


class Overloaded(Exception):
    """The queue is full, or too long for this query's deadline; ``retry_after_s`` is when, at the observed pace, it
    will have been worked off."""

    def __init__(self, what: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"{what}, come back in {retry_after_s:.2f} s")


class Expired(Exception):
    """The deadline passed before there was an answer."""


class Draining(Exception):
    """The service is shutting down and takes no more work."""


class WorkFailed(Exception):
    """The work on a whole batch failed; the message says how."""


@dataclass(frozen=True, slots=True)
class Answered(Generic[A]):
    """One answer and what it cost: seconds waiting in the queue, seconds of its batch's work, size of that batch."""

    value: A
    queue_s: float
    work_s: float
    batch: int


@dataclass(eq=False, slots=True)
class _Entry(Generic[Q, A]):
    query: Q
    deadline: float
    arrived: float
    answer: asyncio.Future[Answered[A]] = field(repr=False)
    begun: float | None = None
    """When its work began."""


class Batcher(Generic[Q, A]):
    """Gathers queries into batches of at most ``max_batch``, waiting at most ``max_wait_s`` for one to fill.

    ``work`` gets the queries and returns one answer or exception for each. Deadlines are seconds on ``time.monotonic``,
    the clock of the event loop.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Q]], Sequence[A | Exception]],
        *,
        max_batch: int,
        max_wait_s: float,
        max_queue: int,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._work = work
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._max_queue = max_queue
        self._on_batch = on_batch
        self._waiting: deque[_Entry[Q, A]] = deque()
        self._running: list[_Entry[Q, A]] = []
        self._admitted = 0
        self._seconds_each: float | None = None
        self._pace_of_full = False
        self._freed = 0.0  # when the last batch was done
        self._arrival = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saec-cloud-backend")
        self._loop_task: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        """Admitted queries that no batch has taken yet."""
        return self._admitted - len(self._running)

    @property
    def at_hand(self) -> int:
        """Admitted queries that have no answer yet, those in work included."""
        return self._admitted

    def start(self) -> None:
        """Begin to serve; call from inside the event loop."""
        self._loop_task = asyncio.get_running_loop().create_task(self._serve(), name="saec-cloud-batcher")

    @contextmanager
    def admit(self, deadline: float = math.inf) -> Iterator[None]:
        """Hold a place in the queue for one query: taken before its body is read, so that memory is bounded as well.

        Raises:
            Overloaded: all places are taken, or at the pace observed so far its turn comes after the deadline.
            Draining: the service is shutting down.
        """
        if self._draining:
            raise Draining
        if self.depth >= self._max_queue:
            raise Overloaded(_FULL, self.retry_after_s())
        if not self._in_time(deadline):
            raise Overloaded(_TOO_LONG, self.retry_after_s())
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    def retry_after_s(self) -> float:
        """Return how long the work at hand will take at the pace observed so far (1 s before anything was observed)."""
        if self._seconds_each is None:
            return _FIRST_GUESS_S
        return max(0.001, self._admitted * self._seconds_each)

    def _in_time(self, deadline: float) -> bool:
        """Say whether a query that came now would be answered by ``deadline``.

        Who need not wait for a batch may always try; so may all, until a full batch has shown the pace of a full queue.
        """
        if self._seconds_each is None or not self._pace_of_full or self._admitted < self._max_batch:
            return True
        # A batch more than what is ahead: the query's own is answered as a whole.
        return time.monotonic() + (self._admitted + self._max_batch) * self._seconds_each <= deadline

    async def submit(self, query: Q, *, deadline: float) -> Answered[A]:
        """Wait for the answer to an admitted query. Cancelling this call takes the query out of the queue.

        Raises:
            Expired: no answer by ``deadline``.
            Overloaded: none either, and waiting for other queries' work took most of the time.
            Draining: shut down before its turn.
            WorkFailed: the batch failed as a whole.
            Exception: what the work returned in this query's place.
        """
        if self._draining:
            raise Draining
        loop = asyncio.get_running_loop()
        entry: _Entry[Q, A] = _Entry(query, deadline, time.monotonic(), loop.create_future())
        self._waiting.append(entry)
        self._idle.clear()
        self._arrival.set()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await entry.answer
        except TimeoutError:
            if entry.answer.done() and not entry.answer.cancelled() and entry.answer.exception() is not None:
                raise  # the work's own TimeoutError, not our deadline
            raise self._too_late(entry) from None
        finally:
            if entry.answer.done() and not entry.answer.cancelled():
                entry.answer.exception()  # seen, even when the caller left in the same moment
            for place in (self._waiting, self._running):
                if entry in place:
                    place.remove(entry)

    def _too_late(self, entry: _Entry[Q, A]) -> Overloaded | Expired:
        """Return what kept a query from being answered in time: others before it, or its own work."""
        begun = entry.begun
        if begun is None:
            waited_for_others = bool(self._running) or entry.arrived < self._freed
        else:
            waited_for_others = begun - entry.arrived > time.monotonic() - begun
        return Overloaded(_TOO_LONG, self.retry_after_s()) if waited_for_others else Expired()

    async def in_work_thread(self, function: Callable[[], T]) -> T:
        """Run something between batches in the thread of the work, such as its warm-up."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def drain(self, grace_s: float) -> None:
        """Take no more work, finish what waits, stop. After ``grace_s`` seconds what is left gets :class:`Draining`."""
        self._draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("shut down with %d questions unanswered", len(self._waiting) + len(self._running))
        left = [*self._waiting, *self._running]
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        for entry in left:
            _fail(entry, Draining())
        self._idle.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _serve(self) -> None:
        while True:
            batch = await self._gather()
            if batch:
                await self._run(batch)
                # From the end of the last batch or the first arrival: what lies between two batches slows a queue too.
                self._learn_pace(time.monotonic() - max(self._freed, batch[0].arrived), len(batch))
                self._freed = time.monotonic()
            if not self._waiting:
                self._idle.set()

    async def _gather(self) -> list[_Entry[Q, A]]:
        """Wait for a query, then for company, and return the batch without those that nobody waits for any more."""
        while not self._waiting:
            self._arrival.clear()
            await self._arrival.wait()
        closes = self._waiting[0].arrived + self._max_wait_s
        while len(self._waiting) < self._max_batch and not self._draining and (left := closes - time.monotonic()) > 0:
            self._arrival.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrival.wait()
            except TimeoutError:
                break
        batch: list[_Entry[Q, A]] = []
        while self._waiting and len(batch) < self._max_batch:
            entry = self._waiting.popleft()
            if entry.deadline <= time.monotonic():
                _fail(entry, self._too_late(entry))
            elif not entry.answer.done():
                batch.append(entry)
        return batch

    async def _run(self, batch: list[_Entry[Q, A]]) -> None:
        self._running = list(batch)
        self._on_batch(len(batch))
        begun = time.monotonic()
        for entry in batch:
            entry.begun = begun
        queries = [entry.query for entry in batch]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._work, queries)
            if len(answers) != len(batch):
                raise WorkFailed(f"{len(answers)} answers to {len(batch)} questions")
        except Exception as error:  # whatever a model throws fails its batch, never the service
            logger.exception("a batch of %d failed", len(batch))
            failure = error if isinstance(error, WorkFailed) else WorkFailed(f"{type(error).__name__}: {error}")
            for entry in batch:
                _fail(entry, failure)
            return
        finally:
            self._running = []
        spent = time.monotonic() - begun
        for entry, answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                _fail(entry, answer)
            elif not entry.answer.done():
                entry.answer.set_result(Answered(answer, begun - entry.arrived, spent, len(batch)))

    def _learn_pace(self, seconds: float, size: int) -> None:
        """Smooth the seconds for each query.

        A query alone may cost a model as much as a full batch, so that the pace of quiet hours says little about a full
        queue: once a full batch was seen, smaller ones count only when they were even faster.
        """
        full, last, each = size == self._max_batch, self._seconds_each, seconds / size
        if last is None or (full and not self._pace_of_full):
            self._seconds_each = each
        elif full or not self._pace_of_full or each < last:
            self._seconds_each = last + _SMOOTHING * (each - last)
        self._pace_of_full |= full


def _fail(entry: _Entry[Q, A], error: Exception) -> None:
    if not entry.answer.done():
        entry.answer.set_exception(error)
