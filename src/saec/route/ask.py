"""One question to the cloud, whatever the cloud does: an opinion, or the reason why there is none."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from saec.config import CloudSettings
from saec.route.breaker import CircuitBreaker, judge_with_retry
from saec.route.stats import BusyMeter
from saec.route.verdicts import flaw
from saec.types import CloudClient, CloudError, Opinion, Query, Reason

FALLBACK_REASONS = frozenset(
    {
        Reason.CLOUD_TIMEOUT,
        Reason.CLOUD_REFUSED,
        Reason.CLOUD_UNREACHABLE,
        Reason.CLOUD_BAD_ANSWER,
        Reason.CIRCUIT_OPEN,
    }
)


@dataclass(frozen=True, slots=True)
class NoOpinion:
    """Why the edge's verdict stands."""

    reason: Reason
    error: str
    uplink_bytes: int = 0


class Asker:
    """Asks one client through one circuit breaker. Thread-safe."""

    def __init__(
        self,
        client: CloudClient,
        settings: CloudSettings,
        *,
        clock: Callable[[], float],
        wait: Callable[[float], bool],
        rng: random.Random,
        busy: BusyMeter,
    ) -> None:
        """``clock`` gives monotonic seconds; ``wait(seconds)`` sleeps and returns whether the run is stopping; ``busy``
        measures the time spent waiting for answers."""
        self._client = client
        self._settings = settings
        self._clock = clock
        self._wait = wait
        self._rng = rng
        self._busy = busy
        self.breaker = CircuitBreaker(
            failures=settings.breaker_failures, cooldown_s=settings.breaker_cooldown_s, clock=clock
        )

    def ask(self, query: Query) -> Opinion | NoOpinion:
        """Return the cloud's opinion, or why there is none.

        Raises:
            Stopped: the run stopped between two tries.
        """
        ticket = self.breaker.acquire()
        if ticket is None:
            return NoOpinion(Reason.CIRCUIT_OPEN, "the cloud has failed repeatedly and is left alone for a while")
        try:
            opinion = judge_with_retry(
                self._judge,
                query,
                deadline_s=self._settings.timeout_s,
                retries=self._settings.retries,
                clock=self._clock,
                wait=self._wait,
                rng=self._rng,
            )
        except CloudError as error:
            self.breaker.report(ticket, ok=False)
            reason = error.reason if error.reason in FALLBACK_REASONS else Reason.CLOUD_BAD_ANSWER
            return NoOpinion(reason, str(error), error.uplink_bytes)
        self.breaker.report(ticket, ok=True)
        return opinion

    def _judge(self, query: Query, deadline_s: float) -> Opinion:
        """One try. A client that breaks its contract is a wrong answer, not the end of the run."""
        try:
            with self._busy:
                opinion = self._client.judge(query, deadline_s=deadline_s)
        except CloudError:
            raise
        except Exception as error:
            raise CloudError(Reason.CLOUD_BAD_ANSWER, f"the client failed: {type(error).__name__}: {error}") from error
        wrong = flaw(opinion)
        if wrong is not None:
            sent = opinion.uplink_bytes if isinstance(opinion, Opinion) else 0
            raise CloudError(Reason.CLOUD_BAD_ANSWER, wrong, uplink_bytes=sent)
        return opinion
