"""The budget dial keeps its limits, whatever the parts ask for."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from saec.config import RouteSettings
from saec.fleet.ledger import Spent
from saec.route.budget import Budget


def run(budget: Budget, wants: list[bool]) -> list[bool]:
    granted = []
    for want in wants:
        budget = budget.part()
        ok = want and budget.admits(expected_bytes=0, expected_s=0)
        budget = budget.granted() if ok else budget
        granted.append(ok)
    return granted


@settings(deadline=None, max_examples=200)
@given(st.floats(0, 1), st.lists(st.booleans(), max_size=80))
def test_the_share_holds_after_every_part(share, wants):
    granted = run(Budget(share=share), wants)
    for seen in range(1, len(granted) + 1):
        assert sum(granted[:seen]) <= math.ceil(share * seen)


@settings(deadline=None, max_examples=100)
@given(st.floats(0, 1), st.lists(st.booleans(), max_size=60), st.integers(0, 60))
def test_a_share_restored_from_the_ledger_goes_on_as_if_undisturbed(share, wants, cut):
    whole = run(Budget(share=share), wants)
    before = run(Budget(share=share), wants[:cut])
    spent = Spent(parts=len(before), questions=sum(before))
    assert before + run(Budget(share=share, spent=spent), wants[cut:]) == whole


def test_a_share_of_thirty_percent_gives_three_of_ten_and_spreads_them():
    assert run(Budget(share=0.3), [True] * 10) == [True, False, False, True, False, False, True, False, False, False]


def test_a_share_of_nothing_grants_nothing_and_a_share_of_all_grants_all():
    assert not any(run(Budget(share=0.0), [True] * 20))
    assert all(run(Budget(share=1.0), [True] * 20))
    assert all(run(Budget(), [True] * 20))


def test_floating_point_does_not_add_a_part_to_the_share():
    assert 0.07 * 100 > 7  # why the ceiling needs its tolerance
    spent = Spent(parts=99, questions=7)
    assert not Budget(share=0.07, spent=spent).part().admits(expected_bytes=0, expected_s=0)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 5000), st.lists(st.integers(1, 400), max_size=60))
def test_answered_questions_never_pass_the_bytes_by_more_than_one_question_above_the_mean(limit, costs):
    budget = Budget(max_bytes=limit)
    spent = dearest = 0
    for cost in costs:
        budget = budget.part()
        if budget.admits(expected_bytes=400, expected_s=0):
            budget = budget.granted().settled(uplink_bytes=cost, cloud_s=0.0)
            spent, dearest = spent + cost, max(dearest, cost)
    assert spent <= limit + dearest


def test_outstanding_questions_are_reserved_at_the_mean_cost():
    budget = Budget(max_seconds=1.0).granted().settled(uplink_bytes=0, cloud_s=0.25)
    for _ in range(3):
        assert budget.admits(expected_bytes=0, expected_s=9)
        budget = budget.granted()
    assert not budget.admits(expected_bytes=0, expected_s=9)
    cheap = budget.settled(uplink_bytes=0, cloud_s=0.0)
    assert cheap.admits(expected_bytes=0, expected_s=9)


def test_a_small_budget_still_buys_one_question_at_a_time_before_its_price_is_known():
    budget = Budget(max_bytes=1000)
    assert budget.admits(expected_bytes=10**6, expected_s=0)
    assert not budget.granted().admits(expected_bytes=10**6, expected_s=0)


def test_the_dial_comes_from_the_settings():
    spent = Spent(parts=5)
    settings_ = RouteSettings(budget_share=0.2, budget_bytes=10, budget_seconds=3.0)
    assert Budget.of(settings_, spent) == Budget(0.2, 10, 3.0, spent)
