"""What is said of a round that might mislead."""

from __future__ import annotations

from saec.cli.learn_words import ONE_SIDED, outcome
from saec.learn.line import Learnt
from saec.learn.rulings import Ruling


def rulings(p_defects, who="model"):
    return tuple(
        Ruling(f"{n:064x}", f"part-{n}", p, who, "oracle", "2026-01-01T00:00:00+00:00", f"{n:064x}")
        for n, p in enumerate(p_defects)
    )


def said(*found) -> str:
    return "\n".join(outcome("plate", Learnt(len(found), tuple(found))))


def test_a_teacher_that_calls_all_samples_the_same_is_told():
    assert f"the teacher called all {ONE_SIDED} samples defect" in said(*rulings([0.9] * ONE_SIDED))


def test_a_few_samples_both_labels_or_a_persons_word_are_not():
    for found in (
        rulings([0.9] * (ONE_SIDED - 1)),
        rulings([0.9] * ONE_SIDED + [0.1]),
        rulings([1.0] * ONE_SIDED, "human"),
    ):
        assert "the teacher called" not in said(*found)
