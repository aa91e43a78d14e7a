"""Threads that live and die together: one that crashes ends the others, and none is ever waited for in vain."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Generic, TypeVar

from saec.route.channel import Channel, Closed

E = TypeVar("E")
T = TypeVar("T")

POLL_S = 0.2
"""How often a waiting thread looks whether the crew has failed. In a healthy run nothing ever waits for this."""


class _Ended:
    def __init__(self, name: str) -> None:
        self.name = name


class Crew(Generic[E]):
    """Runs stages in daemon threads and brings their events to the one thread that supervises them."""

    def __init__(self, events: int, *, on_failure: Callable[[], None]) -> None:
        """Hold at most ``events`` events; ``on_failure`` is called once, by the thread that fails first."""
        self._events: Channel[E | _Ended] = Channel(events)
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._alive: set[str] = set()
        self.failure: BaseException | None = None

    def spawn(self, name: str, body: Callable[[], None]) -> None:
        """Run ``body`` in a thread; supervisor only. A closed channel ends it quietly, any exception fails the crew."""

        def run() -> None:
            try:
                body()
            except Closed:
                pass  # the run is over, somebody else knows why
            except BaseException as error:  # noqa: BLE001 - handed to the supervisor, who raises it
                self.fail(error)
            finally:
                with suppress(Closed):
                    self._events.put(_Ended(name))

        self._alive.add(name)
        threading.Thread(target=run, name=f"saec-{name}", daemon=True).start()

    def forget(self, name: str) -> None:
        """Wait for this thread no longer; supervisor only."""
        self._alive.discard(name)

    def alive(self, *, besides: str = "") -> bool:
        """Return whether a thread is left that has not ended and was not forgotten; supervisor only."""
        return bool(self._alive - {besides})

    def fail(self, error: BaseException) -> None:
        """Make ``error`` the reason why the crew stops, unless there is one already."""
        with self._lock:
            first = self.failure is None
            if first:
                self.failure = error
        if first:
            self._on_failure()

    def tell(self, event: E) -> None:
        """Send an event to the supervisor, waiting for room. After :meth:`dismiss` it is dropped."""
        with suppress(Closed):
            self._events.put(event)

    def next_event(self) -> E | None:
        """Return the next event, or ``None`` when there was none for a while; supervisor only."""
        event = self._events.get(POLL_S)
        if isinstance(event, _Ended):
            self._alive.discard(event.name)
            return None
        return event

    def result(self, future: Future[T]) -> T:
        """Wait for a future that another stage fills.

        Raises:
            Closed: the crew failed, so that it may never be filled.
        """
        while not wait([future], timeout=POLL_S).done:
            if self.failure is not None:
                raise Closed
        return future.result()

    def dismiss(self) -> None:
        """Drop all events from now on, so that nobody waits for a supervisor who has left."""
        self._events.abort()
