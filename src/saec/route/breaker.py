"""Circuit breaker and retry: a cloud in trouble is left alone, and a hiccup is not taken for trouble.

The circuit opens after so many failed questions in a row. While it is open, parts fall back at once instead of each
waiting for a timeout. After the cool-down one question goes through as a probe (half-open): its success closes the
circuit, its failure opens it for another cool-down.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum

from saec.types import CloudError, Opinion, Query, Reason


class CircuitState(StrEnum):
    """State of a circuit."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Thread-safe breaker.

    ``acquire`` hands out a ticket or refuses; ``report`` returns it with the outcome. A ticket of an earlier state is
    ignored: a late answer from before the circuit opened neither closes it nor counts against the probe. A probe whose
    ticket does not come back is followed by another one after a further cool-down.
    """

    def __init__(self, *, failures: int, cooldown_s: float, clock: Callable[[], float]) -> None:
        """``failures`` in a row open the circuit for ``cooldown_s`` seconds of ``clock`` (monotonic seconds)."""
        self._limit = failures
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._lock = threading.Lock()
        self._state = CircuitState.CLOSED
        self._epoch = 0
        self._failed = 0
        self._since = 0.0
        self.opened = 0
        """How often the circuit has opened so far."""

    @property
    def state(self) -> CircuitState:
        """The state now. An open circuit stays open until a question after the cool-down probes it."""
        with self._lock:
            return self._state

    def acquire(self) -> int | None:
        """Return a ticket for one question, or ``None`` while the circuit is open or being probed."""
        with self._lock:
            if self._state is CircuitState.CLOSED:
                return self._epoch
            if self._clock() - self._since >= self._cooldown_s:
                self._enter(CircuitState.HALF_OPEN)
                return self._epoch
            return None

    def report(self, ticket: int, *, ok: bool) -> None:
        """Return a ticket with what became of its question."""
        with self._lock:
            if ticket != self._epoch:
                return
            if ok:
                self._failed = 0
                if self._state is CircuitState.HALF_OPEN:
                    self._enter(CircuitState.CLOSED)
                return
            self._failed += 1
            if self._state is CircuitState.HALF_OPEN or self._failed >= self._limit:
                self.opened += 1
                self._enter(CircuitState.OPEN)

    def _enter(self, state: CircuitState) -> None:
        self._state = state
        self._since = self._clock()
        self._epoch += 1
        self._failed = 0


class Stopped(Exception):
    """The run is stopping: the question was given up and stays pending."""


def judge_with_retry(
    judge: Callable[[Query, float], Opinion],
    query: Query,
    *,
    deadline_s: float,
    retries: int,
    clock: Callable[[], float],
    wait: Callable[[float], bool],
    rng: random.Random,
    first_delay_s: float = 0.1,
) -> Opinion:
    """Ask, and ask again while it makes sense and the deadline allows; the last error stands.

    Worth another try: an unreachable service, and a refusal that names a ``Retry-After``. Not worth one: a timeout (it
    has used the time up), a refusal for good, a wrong answer (it would come again). The delay doubles from
    ``first_delay_s`` and is drawn from its upper half, so that stations which failed together do not return together;
    it is never shorter than ``Retry-After``. A delay that would pass the deadline is not begun. The bytes of tries in
    vain are added to what the opinion or the error says went up.

    ``judge(query, seconds left)`` is one try; ``wait(seconds)`` sleeps and returns whether the run is stopping.

    Raises:
        CloudError: no usable opinion.
        Stopped: the run stopped while waiting for the next try.
    """
    end = clock() + deadline_s
    in_vain = 0
    for attempt in range(retries + 1):
        try:
            opinion = judge(query, max(0.001, end - clock()))
        except CloudError as error:
            in_vain += error.uplink_bytes
            delay = first_delay_s * 2**attempt * rng.uniform(0.5, 1.0) + (error.retry_after_s or 0.0)
            again = error.reason is Reason.CLOUD_UNREACHABLE or (
                error.reason is Reason.CLOUD_REFUSED and error.retry_after_s is not None
            )
            if not again or attempt == retries or clock() + delay >= end:
                error.uplink_bytes = in_vain
                raise
            if wait(delay):
                raise Stopped from error
        else:
            return _with_bytes(opinion, in_vain)
    raise AssertionError("unreachable: the last try returns or raises")


def _with_bytes(opinion: Opinion, in_vain: int) -> Opinion:
    return replace(opinion, uplink_bytes=opinion.uplink_bytes + in_vain) if in_vain else opinion
