"""Batching, bounds, deadlines and failures, without HTTP."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from saec.cloud.batcher import Answered, Batcher, Draining, Expired, Overloaded, WorkFailed

Work = Callable[[Sequence[int]], Sequence[int | Exception]]


class Recorder:
    """Doubles numbers; ``gate`` holds the work back until it is set."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, numbers: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(numbers))
        assert self.gate.wait(5)
        if 666 in numbers:
            raise RuntimeError("out of memory")
        return [KeyError("odd one") if number == 13 else number * 2 for number in numbers]


@asynccontextmanager
async def running(
    work: Work, max_batch: int = 4, max_wait_s: float = 0.02, max_queue: int = 100
) -> AsyncIterator[Batcher[int, int]]:
    batcher = Batcher(work, max_batch=max_batch, max_wait_s=max_wait_s, max_queue=max_queue)
    batcher.start()
    try:
        yield batcher
    finally:
        await batcher.drain(1.0)


async def ask(batcher: Batcher[int, int], number: int, within_s: float = 5.0) -> Answered[int]:
    deadline = time.monotonic() + within_s
    with batcher.admit(deadline):
        return await batcher.submit(number, deadline=deadline)


async def test_queries_that_come_together_share_batches_and_get_their_own_answers() -> None:
    work = Recorder()
    async with running(work) as batcher:
        answers = await asyncio.gather(*(ask(batcher, i) for i in range(10)))
    assert [answer.value for answer in answers] == [2 * i for i in range(10)]
    assert [len(batch) for batch in work.batches] == [4, 4, 2]
    assert answers[0].batch == 4
    assert all(answer.queue_s >= 0 and answer.work_s >= 0 for answer in answers)


async def test_a_lone_query_waits_no_longer_than_the_stated_time() -> None:
    async with running(Recorder(), max_wait_s=0.05) as batcher:
        begun = time.monotonic()
        await ask(batcher, 1)
    assert 0.04 <= time.monotonic() - begun < 1.0


async def test_a_full_queue_refuses_with_a_wait_learnt_from_the_pace() -> None:
    work = Recorder()
    async with running(work, max_batch=1, max_wait_s=0, max_queue=2) as batcher:
        with batcher.admit(), pytest.raises(Overloaded) as first, batcher.admit(), batcher.admit():
            pass
        assert first.value.retry_after_s == 1.0
        work.gate.clear()
        asked = [asyncio.create_task(ask(batcher, 0))]
        await asyncio.sleep(0.1)
        work.gate.set()
        await asked[0]

        work.gate.clear()
        asked = []
        for i in range(3):  # one is being worked on, two wait
            asked.append(asyncio.create_task(ask(batcher, i)))
            await asyncio.sleep(0.01)
        with pytest.raises(Overloaded) as refused:
            await ask(batcher, 9)
        assert refused.value.retry_after_s >= 0.25
        assert refused.value.retry_after_s != 1.0
        work.gate.set()
        await asyncio.gather(*asked)
        assert (await ask(batcher, 5)).value == 10
        assert batcher.depth == 0


async def test_a_query_whose_turn_would_come_too_late_is_refused_at_once() -> None:
    def work(numbers: Sequence[int]) -> list[int | Exception]:
        time.sleep(0.2)
        return list(numbers)

    async with running(work, max_batch=2, max_wait_s=0.0) as batcher:
        await ask(batcher, 0)  # alone: says nothing of the pace of a full batch
        burst = [asyncio.create_task(ask(batcher, i)) for i in range(6)]
        await asyncio.sleep(0.3)  # one full batch is done, another runs, one waits
        begun = time.monotonic()
        with pytest.raises(Overloaded, match="too long for the deadline") as refused:
            await ask(batcher, 6, within_s=0.3)
        assert time.monotonic() - begun < 0.1
        assert 0.2 <= refused.value.retry_after_s < 1.0
        assert (await ask(batcher, 7, within_s=5.0)).value == 7
        assert [answer.value for answer in await asyncio.gather(*burst)] == list(range(6))
        alone = await ask(batcher, 8, within_s=0.3)
    assert alone.value == 8, "who need not wait may always try"


async def test_expired_and_abandoned_queries_never_reach_the_work() -> None:
    work = Recorder()
    async with running(work, max_batch=1) as batcher:
        work.gate.clear()
        busy = asyncio.create_task(ask(batcher, 1))
        await asyncio.sleep(0.05)
        late = asyncio.create_task(ask(batcher, 2, within_s=0.05))
        gone = asyncio.create_task(ask(batcher, 3))
        for waiting in (late, ask(batcher, 4, within_s=0.0)):
            with pytest.raises(Overloaded, match="too long for the deadline"):
                await waiting
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert batcher.depth == 0
        work.gate.set()
        await busy
        await ask(batcher, 5)
    assert work.batches == [[1], [5]]


async def test_a_query_that_expires_in_the_work_frees_its_caller_at_once() -> None:
    work = Recorder()
    async with running(work, max_wait_s=0) as batcher:
        work.gate.clear()
        begun = time.monotonic()
        with pytest.raises(Expired):
            await ask(batcher, 1, within_s=0.05)
        assert time.monotonic() - begun < 1.5
        work.gate.set()
        assert (await ask(batcher, 2)).value == 4


async def test_one_bad_query_fails_alone() -> None:
    async with running(Recorder()) as batcher:
        answers = await asyncio.gather(*(ask(batcher, i) for i in (12, 13, 14)), return_exceptions=True)
    assert isinstance(answers[1], KeyError)
    assert [answer.value for answer in (answers[0], answers[2]) if isinstance(answer, Answered)] == [24, 28]


async def test_work_that_raises_fails_its_batch_and_the_next_one_goes_on() -> None:
    async with running(Recorder()) as batcher:
        answers = await asyncio.gather(*(ask(batcher, i) for i in (1, 666)), return_exceptions=True)
        assert all(isinstance(answer, WorkFailed) and "out of memory" in str(answer) for answer in answers)
        assert (await ask(batcher, 4)).value == 8


async def test_work_that_returns_too_few_answers_fails_its_batch() -> None:
    async with running(lambda numbers: [1]) as batcher:
        answers = await asyncio.gather(*(ask(batcher, i) for i in range(2)), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["1 answers to 2 questions"] * 2


async def test_the_works_own_timeout_is_not_taken_for_the_deadline() -> None:
    async with running(lambda numbers: [TimeoutError("upstream") for _ in numbers]) as batcher:
        with pytest.raises(TimeoutError, match="upstream"):
            await ask(batcher, 1)


async def test_draining_finishes_what_waits_and_refuses_what_comes() -> None:
    work = Recorder()
    async with running(work, max_batch=1) as batcher:
        work.gate.clear()
        asked = [asyncio.create_task(ask(batcher, i)) for i in range(3)]
        await asyncio.sleep(0.05)
        draining = asyncio.create_task(batcher.drain(2.0))
        await asyncio.sleep(0.02)
        with pytest.raises(Draining):
            await ask(batcher, 9)
        work.gate.set()
        assert [answer.value for answer in await asyncio.gather(*asked)] == [0, 2, 4]
        await draining


async def test_draining_gives_up_on_stuck_work_after_its_grace() -> None:
    work = Recorder()
    async with running(work, max_batch=1) as batcher:
        work.gate.clear()
        asked = [asyncio.create_task(ask(batcher, i)) for i in range(2)]
        await asyncio.sleep(0.05)
        begun = time.monotonic()
        await batcher.drain(0.1)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert time.monotonic() - begun < 1.5
        assert [type(answer) for answer in answers] == [Draining, Draining]
        work.gate.set()
