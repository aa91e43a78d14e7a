"""A bounded queue between two stages that can be closed (drain, then end) and aborted (drop everything, now)."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """Nothing more can be put into this channel, or nothing more will come out of it."""


class Channel(Generic[T]):
    """First in, first out, at most ``size`` items; ``put`` blocks while it is full, which is the back-pressure.

    ``queue.Queue`` cannot be shut down before Python 3.13, and a stage that waits on a stage that died is how runs
    hang.
    """

    def __init__(self, size: int, *, producers: int = 1) -> None:
        """Hold at most ``size`` items; the channel closes when each of its ``producers`` has called :meth:`close`."""
        self._size = size
        self._items: deque[T] = deque()
        self._producers = producers
        self._aborted = False
        lock = threading.Lock()
        self._room = threading.Condition(lock)
        self._news = threading.Condition(lock)

    def put(self, item: T) -> None:
        """Add an item, waiting for room.

        Raises:
            Closed: the channel was closed or aborted, also while waiting.
        """
        with self._room:
            while len(self._items) >= self._size and self._producers > 0 and not self._aborted:
                self._room.wait()
            if self._producers <= 0 or self._aborted:
                raise Closed
            self._items.append(item)
            self._news.notify()

    def get(self, timeout_s: float | None = None) -> T | None:
        """Return the next item, or ``None`` when ``timeout_s`` seconds pass without one.

        Raises:
            Closed: closed and drained, or aborted.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with self._news:
            while not self._items:
                if self._producers <= 0 or self._aborted:
                    raise Closed
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._news.wait(left)
            self._room.notify()
            return self._items.popleft()

    def __iter__(self) -> Iterator[T]:
        """Yield items until the channel is closed and drained, or aborted."""
        while True:
            try:
                item = self.get()
            except Closed:
                return
            if item is not None:
                yield item

    def close(self) -> None:
        """Say that one producer is done. What is inside still comes out."""
        with self._news:
            self._producers -= 1
            self._wake()

    def abort(self) -> None:
        """Drop everything and wake everybody."""
        with self._news:
            self._aborted = True
            self._items.clear()
            self._wake()

    def _wake(self) -> None:
        self._news.notify_all()
        self._room.notify_all()
