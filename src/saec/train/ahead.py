"""Work done ahead in a thread, so that the model never waits for an image to be decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
Item = TypeVar("Item")


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Return consecutive pieces of at most ``size`` items."""
    return [items[at : at + size] for at in range(0, len(items), size)]


def ahead(jobs: Iterable[Callable[[], Result]], depth: int = 3) -> Generator[Result]:
    """Yield the jobs' results in order while one thread works at most ``depth`` jobs ahead. A failing job raises."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="saec-train")
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
