"""The circuit breaker and the retries, on a clock that only the test moves."""

from __future__ import annotations

import random

import numpy as np
import pytest

from saec.route.breaker import CircuitBreaker, CircuitState, Stopped, judge_with_retry
from saec.types import CloudError, Evidence, Opinion, Query, Reason

QUERY = Query("p", "widget", np.zeros((2, 2, 3), np.uint8), (2, 2))
OPINION = Opinion(0.5, Evidence(), "m", uplink_bytes=7)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return False


def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(failures=3, cooldown_s=5.0, clock=clock)


def fail(circuit: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        ticket = circuit.acquire()
        assert ticket is not None
        circuit.report(ticket, ok=False)


def test_the_circuit_opens_after_so_many_failures_in_a_row_and_not_before():
    circuit = breaker(Clock())
    fail(circuit, 2)
    ticket = circuit.acquire()
    assert ticket is not None
    circuit.report(ticket, ok=True)
    fail(circuit, 2)
    assert circuit.state is CircuitState.CLOSED
    fail(circuit, 1)
    assert circuit.state is CircuitState.OPEN
    assert circuit.acquire() is None


def test_after_the_cooldown_one_probe_goes_through_and_its_success_closes_the_circuit():
    clock = Clock()
    circuit = breaker(clock)
    fail(circuit, 3)
    clock.now += 4.9
    assert circuit.acquire() is None
    clock.now += 0.2
    probe = circuit.acquire()
    assert probe is not None
    assert circuit.state is CircuitState.HALF_OPEN
    assert circuit.acquire() is None
    circuit.report(probe, ok=True)
    assert circuit.state is CircuitState.CLOSED
    assert circuit.acquire() is not None


def test_a_failed_probe_opens_the_circuit_for_another_cooldown():
    clock = Clock()
    circuit = breaker(clock)
    fail(circuit, 3)
    clock.now += 5
    fail(circuit, 1)
    assert circuit.state is CircuitState.OPEN
    assert circuit.opened == 2
    clock.now += 4.9
    assert circuit.acquire() is None


def test_a_late_answer_from_before_the_circuit_opened_changes_nothing():
    clock = Clock()
    circuit = breaker(clock)
    late = circuit.acquire()
    assert late is not None
    fail(circuit, 3)
    circuit.report(late, ok=True)
    assert circuit.state is CircuitState.OPEN
    clock.now += 5
    probe = circuit.acquire()
    assert probe is not None
    circuit.report(late, ok=False)
    assert circuit.state is CircuitState.HALF_OPEN


def test_a_probe_that_never_comes_back_does_not_keep_the_circuit_half_open_for_ever():
    clock = Clock()
    circuit = breaker(clock)
    fail(circuit, 3)
    clock.now += 5
    lost = circuit.acquire()
    assert lost is not None
    assert circuit.acquire() is None
    clock.now += 5
    probe = circuit.acquire()
    assert probe is not None
    circuit.report(lost, ok=False)
    circuit.report(probe, ok=True)
    assert circuit.state is CircuitState.CLOSED


class Script:
    """Answers with the next of a list of errors and opinions."""

    def __init__(self, *answers: CloudError | Opinion, clock: Clock, takes: float = 0.0) -> None:
        self.answers = list(answers)
        self.clock = clock
        self.takes = takes
        self.left: list[float] = []

    def __call__(self, query: Query, deadline_s: float) -> Opinion:
        self.left.append(deadline_s)
        self.clock.now += self.takes
        answer = self.answers.pop(0)
        if isinstance(answer, CloudError):
            raise answer
        return answer


def ask(script: Script, *, retries: int = 2, deadline_s: float = 10.0) -> Opinion:
    clock = script.clock
    return judge_with_retry(
        script, QUERY, deadline_s=deadline_s, retries=retries, clock=clock, wait=clock.wait, rng=random.Random(1)
    )


def unreachable(**more: object) -> CloudError:
    return CloudError(Reason.CLOUD_UNREACHABLE, "no route", **more)


def test_a_hiccup_is_retried_with_growing_jittered_delays():
    clock = Clock()
    assert ask(Script(unreachable(), unreachable(), OPINION, clock=clock)) == OPINION
    first, second = clock.waits
    assert 0.05 <= first <= 0.1
    assert 0.1 <= second <= 0.2


def test_the_wait_that_the_service_asks_for_is_honoured():
    clock = Clock()
    ask(Script(CloudError(Reason.CLOUD_REFUSED, "busy", retry_after_s=2.0), OPINION, clock=clock))
    assert 2.05 <= clock.waits[0] <= 2.1


def test_a_retry_after_beyond_the_deadline_is_not_begun():
    clock = Clock()
    with pytest.raises(CloudError, match="busy"):
        ask(Script(CloudError(Reason.CLOUD_REFUSED, "busy", retry_after_s=30.0), OPINION, clock=clock))
    assert clock.waits == []


@pytest.mark.parametrize("reason", [Reason.CLOUD_TIMEOUT, Reason.CLOUD_BAD_ANSWER, Reason.CLOUD_REFUSED])
def test_what_would_only_come_again_is_not_retried(reason):
    script = Script(CloudError(reason, "no"), OPINION, clock=Clock())
    with pytest.raises(CloudError):
        ask(script)
    assert len(script.left) == 1


def test_every_try_gets_what_is_left_of_the_one_deadline():
    clock = Clock()
    script = Script(unreachable(), unreachable(), OPINION, clock=clock, takes=2.0)
    ask(script)
    assert script.left[0] == 10.0
    assert script.left[1] < 8.0
    assert script.left[2] < 6.0


def test_the_last_error_stands_and_counts_the_bytes_of_all_tries():
    script = Script(
        unreachable(uplink_bytes=5), unreachable(uplink_bytes=6), unreachable(uplink_bytes=7), clock=Clock()
    )
    with pytest.raises(CloudError) as caught:
        ask(script)
    assert caught.value.uplink_bytes == 18


def test_an_answer_counts_the_bytes_of_the_tries_before_it():
    assert ask(Script(unreachable(uplink_bytes=5), OPINION, clock=Clock())).uplink_bytes == 12


def test_a_stopping_run_does_not_wait_for_the_next_try():
    clock = Clock()
    with pytest.raises(Stopped):
        judge_with_retry(
            Script(unreachable(), OPINION, clock=clock),
            QUERY,
            deadline_s=10,
            retries=2,
            clock=clock,
            wait=lambda seconds: True,
            rng=random.Random(1),
        )
