"""Preparing questions in threads before their turn, so that the model never waits for an image to be resized.

At most ``ahead`` prepared questions lie ready: prepared images are many times larger than the JPEGs they came from.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

from saec.types import Query

P = TypeVar("P")


class Slot(Generic[P]):
    """What becomes of one query: nothing yet, or the future of its preparation."""

    __slots__ = ("__weakref__", "future", "query")

    def __init__(self, query: Query) -> None:
        self.query = query
        self.future: Future[P] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PreparedQuery(Query, Generic[P]):
    """A query on its way to ``judge``; if it never gets there, what was prepared goes with it."""

    slot: Slot[P] | None = None


class Ahead(Generic[P]):
    """Runs ``work`` on queries in threads, in their order, at most ``ahead`` before they are taken. Thread-safe."""

    def __init__(self, work: Callable[[Query], P], *, threads: int, ahead: int) -> None:
        self._work = work
        self._ahead = ahead
        self._waiting: deque[weakref.ref[Slot[P]]] = deque()
        self._begun: weakref.WeakSet[Slot[P]] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="saec-prepare")

    def put(self, query: Query) -> Query:
        """Return the query with a place in the line."""
        slot: Slot[P] = Slot(query)
        with self._lock:
            self._waiting.append(weakref.ref(slot))
            self._begin_some()
        known = {field.name: getattr(query, field.name) for field in fields(Query)}
        return PreparedQuery(**known, slot=slot)

    def take(self, queries: Sequence[Query]) -> list[Future[P]]:
        """Return the preparations of a batch, begun or not; others then move up."""
        slots: list[Slot[P]] = [
            query.slot if isinstance(query, PreparedQuery) and query.slot is not None else Slot(query)
            for query in queries
        ]
        with self._lock:
            futures = [self._begin(slot) for slot in slots]
            for slot in slots:
                self._begun.discard(slot)
            self._begin_some()
        return futures

    def close(self) -> None:
        """Stop the threads once what they have begun is done."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, slot: Slot[P]) -> Future[P]:
        if slot.future is None:
            slot.future = self._pool.submit(self._work, slot.query)
            self._begun.add(slot)
        return slot.future

    def _begin_some(self) -> None:
        while self._waiting and len(self._begun) < self._ahead:
            slot = self._waiting.popleft()()
            if slot is not None and slot.future is None:
                self._begin(slot)
