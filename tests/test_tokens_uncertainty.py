"""Which tokens go up: those on which passes with dropout disagree, as many as asked for, whatever their length."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saec.vlm.tokens.uncertainty import dispersion, dropout_masks, grey_entropy, most_uncertain

RNG = np.random.default_rng(0)


def ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def planted() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Passes [M, L, W] over 64 tokens whose lengths and whose unsteadiness have nothing to do with each other."""
    lengths, unsteady = RNG.permutation(np.linspace(1, 20, 64)), RNG.permutation(np.linspace(0.01, 0.5, 64))
    still = RNG.standard_normal((64, 48))
    passes = still + unsteady[:, None] * RNG.standard_normal((10, 64, 48))
    return (passes * lengths[:, None]).astype(np.float32), lengths, unsteady


def test_the_order_is_that_of_what_dropout_changes_and_not_of_the_tokens_lengths():
    passes, lengths, unsteady = planted()
    found = dispersion(passes)
    assert rank_correlation(found, unsteady) > 0.95
    assert abs(rank_correlation(found, lengths)) < 0.5
    # What the reference code measures on such tokens: their length.
    masked = np.stack([passes[0] * dropout_masks(passes[0].shape, 0.5, bytes([n])) for n in range(10)])
    assert rank_correlation(masked.var(axis=0).sum(axis=1), (passes[0] ** 2).sum(axis=1)) > 0.95


def test_longer_tokens_are_no_more_uncertain():
    passes, _, _ = planted()
    longer = passes * np.linspace(1, 100, 64, dtype=np.float32)[:, None]
    np.testing.assert_allclose(dispersion(longer), dispersion(passes), rtol=1e-4)


def test_passes_that_agree_leave_no_uncertainty_at_all():
    tokens = planted()[0][0]
    assert not dispersion([tokens] * 10).any()


def test_it_is_one_minus_the_squared_length_of_the_mean_direction():
    passes = planted()[0].astype(np.float64)
    units = passes / np.linalg.norm(passes, axis=2, keepdims=True)
    np.testing.assert_allclose(dispersion(passes), 1 - (units.mean(axis=0) ** 2).sum(axis=1), atol=1e-12)


@settings(deadline=None)
@given(count=st.integers(1, 200), ratio=st.floats(0.001, 1))
def test_exactly_as_many_tokens_go_as_asked_for(count: int, ratio: float):
    uncertainty = np.random.default_rng(count).random(count)
    chosen = most_uncertain(uncertainty, ratio)
    assert len(chosen) == max(1, math.ceil(round(ratio * count, 9))) and (np.diff(chosen) > 0).all()
    left = np.delete(uncertainty, chosen)
    assert not left.size or uncertainty[chosen].min() >= left.max()


@pytest.mark.parametrize(("count", "ratio", "wanted"), [(100, 0.07, 7), (64, 0.5, 32), (64, 0.125, 8), (3, 0.34, 2)])
def test_a_whole_share_is_not_rounded_up_by_floating_point(count: int, ratio: float, wanted: int):
    assert len(most_uncertain(np.arange(count, dtype=float), ratio)) == wanted


def test_equally_uncertain_tokens_go_in_their_own_order():
    assert most_uncertain(np.zeros(8), 0.25).tolist() == [0, 1]


def test_masks_drop_the_share_that_is_asked_for_and_keep_the_mean():
    mask = dropout_masks((200, 200), 0.3, b"seed")
    assert abs((mask == 0).mean() - 0.3) < 0.01 and abs(mask.mean() - 1) < 0.02
    np.testing.assert_array_equal(mask, dropout_masks((200, 200), 0.3, b"seed"))
    assert (mask != dropout_masks((200, 200), 0.3, b"other")).any()
    assert (dropout_masks((5, 5), 0.0, b"seed") == 1).all()


def test_entropy_prefers_what_has_many_greys():
    grey = np.full((8, 8), 0.5)
    grey[:4, 4:] = np.linspace(0, 1, 16).reshape(4, 4)
    found = grey_entropy(grey, 2)
    assert found.argmax() == 1 and found[1] == pytest.approx(math.log(16)) and found[[0, 2, 3]].max() < 1e-9
