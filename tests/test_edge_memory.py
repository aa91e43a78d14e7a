"""The memory bank: coreset, search, weights, image score; and the detector that is made of banks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from edge_parts import plate
from saec.edge import detector, memory
from saec.edge.backbone import Backbone
from saec.edge.detector import PatchPool
from saec.edge.memory import WORST_SHARE, fit_memory, image_score, nearest


def points(seed: int, count: int, channels: int = 12) -> np.ndarray:
    """Patches of a few kinds, some of them rare, as on a real part."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 4, (6, channels))
    kind = rng.choice(6, count, p=[0.6, 0.2, 0.1, 0.05, 0.03, 0.02])
    return (centres[kind] + rng.normal(0, 0.5, (count, channels))).astype(np.float32)


@given(seed=st.integers(0, 10_000), count=st.integers(60, 300), size=st.integers(2, 50))
@settings(deadline=None, max_examples=25)
def test_every_candidate_is_as_near_to_the_coreset_as_its_own_points_are_to_each_other(seed, count, size):
    """Gonzalez (1985): what makes the coreset a 2-approximation of the best k centres (in the sketch)."""
    some = points(seed, count)
    chosen = memory._coreset(some, size, np.random.default_rng(seed), None)
    directions = np.random.default_rng(seed).standard_normal((some.shape[1], memory.SKETCH)) / np.sqrt(memory.SKETCH)
    sketch = some.astype(np.float64) @ directions
    between = np.linalg.norm(sketch[chosen][:, None] - sketch[chosen], axis=2)
    separation = between[np.triu_indices(size, 1)].min()
    radius = np.linalg.norm(sketch[:, None] - sketch[chosen], axis=2).min(axis=1).max()
    assert len(set(chosen.tolist())) == size
    assert radius <= separation * (1 + 1e-3) + 1e-3


def test_the_coreset_reaches_rare_patches_that_a_random_draw_misses():
    some = points(3, 4000)
    bank = fit_memory(some, size=60)
    drawn = np.random.default_rng(0).permutation(len(some))[:60]
    whitened = (some - bank.mean) @ bank.projection
    assert nearest(whitened, bank.bank)[0].max() < 0.6 * nearest(whitened, whitened[drawn])[0].max()


@given(seed=st.integers(0, 10_000), patches=st.integers(1, 700), size=st.integers(1, 60), channels=st.integers(1, 20))
@settings(deadline=None, max_examples=25)
def test_the_nearest_vector_is_the_one_that_brute_force_finds(seed, patches, size, channels):
    rng = np.random.default_rng(seed)
    some = rng.normal(0, 2, (patches, channels)).astype(np.float32)
    bank = rng.normal(0, 2, (size, channels)).astype(np.float32)
    squared, index = nearest(some, bank)
    every = ((some[:, None].astype(np.float64) - bank) ** 2).sum(axis=2)
    assert np.allclose(squared, every.min(axis=1), atol=1e-3)
    assert np.allclose(every[np.arange(patches), index], every.min(axis=1), atol=1e-3)


def test_a_patch_of_the_bank_is_at_no_distance_of_it():
    some = points(1, 200)
    squared, index = nearest(some, some)
    assert (index == np.arange(200)).all()
    assert (squared >= 0).all()
    assert squared.max() < 1e-3


@given(seed=st.integers(0, 10_000), count=st.integers(1, 120))
@settings(deadline=None, max_examples=25)
def test_the_weights_of_a_bank_have_mean_one(seed, count):
    bank = fit_memory(points(seed, count))
    assert bank.weight.shape == (count,)
    assert (bank.weight > 0).all()
    assert bank.weight.mean(dtype=np.float64) == pytest.approx(1, abs=1e-5)


def test_a_sparse_corner_of_normality_weighs_less_than_a_dense_one():
    rng = np.random.default_rng(0)
    dense, sparse = rng.normal(0, 0.1, (50, 4)), rng.normal(20, 3, (50, 4))
    weight = memory._weights(np.concatenate([dense, sparse]).astype(np.float32))
    assert weight[50:].max() < weight[:50].min()


def test_copies_of_one_patch_do_not_blow_up_the_weights():
    weight = memory._weights(np.concatenate([np.zeros((50, 4)), points(0, 50, 4)]).astype(np.float32))
    assert np.isfinite(weight).all()
    assert weight.max() / weight.min() < 20


@given(
    nps.arrays(
        np.float32,
        nps.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20),
        elements=st.floats(0, 1e4, width=32),
    )
)
@settings(deadline=None, max_examples=80)
def test_the_image_score_is_the_mean_of_the_worst_patches(distances):
    count = max(1, round(WORST_SHARE * distances.size))
    worst = np.sort(distances.ravel())[-count:].astype(np.float64)
    score = image_score(distances)
    assert score == pytest.approx(worst.mean(), rel=1e-6, abs=1e-9)
    assert distances.mean(dtype=np.float64) * (1 - 1e-6) <= score <= float(distances.max()) * (1 + 1e-6)


def test_whitened_patches_have_no_axis_that_varies_more_than_others_by_far():
    some = points(5, 3000) * np.logspace(-2, 3, 12, dtype=np.float32)
    bank = fit_memory(some, size=10)
    spread = ((some - bank.mean) @ bank.projection).std(axis=0)
    assert spread.max() < 1.05
    assert spread.max() / spread.min() < 4


def test_a_channel_that_never_varies_is_no_alarm_by_itself():
    some = points(5, 300)
    some[:, 3] = 7
    bank = fit_memory(some)
    assert all(np.isfinite(value).all() for value in bank.tensors().values())
    assert np.isfinite(bank.distances(some.reshape(15, 20, 12))).all()


def test_one_patch_is_a_memory_too():
    bank = fit_memory(points(0, 1))
    assert bank.bank.shape == (1, 12)
    assert bank.distances(points(0, 1)[None]).shape == (1, 1)


def test_the_same_patches_give_the_same_memory():
    some = points(2, 900)
    one, other = fit_memory(some, size=100), fit_memory(some.copy(), size=100)
    assert all((one.tensors()[name] == value).all() for name, value in other.tensors().items())


def test_progress_ends_with_the_whole_coreset():
    shares: list[float] = []
    fit_memory(points(0, 700), size=400, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_the_pool_keeps_no_more_patches_than_its_bound(monkeypatch):
    monkeypatch.setattr(detector, "MAX_PATCHES", 300)
    pool = PatchPool(30, 2)
    rng = np.random.default_rng(0)
    for _ in range(30):
        pool.add([rng.normal(size=(9, 9, 4)).astype(np.float32), rng.normal(size=(3, 3, 4)).astype(np.float32)])
    kept = [np.concatenate(flat) for flat in pool._patches]
    assert [len(flat) for flat in kept] == [300, 270]
    assert all(flat.dtype == np.float16 for flat in kept)


def test_what_is_left_out_of_the_pool_is_not_in_the_memory():
    pool = PatchPool(3, 1)
    for level in (0, 1, 50):
        pool.add([np.full((2, 2, 4), level, np.float32) + np.eye(4, dtype=np.float32).reshape(2, 2, 4)])
    with_all = pool.fit(Backbone(threads=1), (96,))
    without = pool.fit(Backbone(threads=1), (96,), leave_out=[2])
    assert len(without.memories[0].bank) == 8
    assert len(with_all.memories[0].bank) == 12
    assert without.memories[0].mean.max() < 2 < 10 < with_all.memories[0].mean.min()


def test_two_passes_give_one_map_on_the_finer_grid():
    backbone = Backbone(threads=1)
    pool = PatchPool(2, 2)
    for number in range(2):
        pool.add([backbone(plate(number), side) for side in (160, 128)])
    seen = pool.fit(backbone, (160, 128)).observe(plate(5))
    assert seen.heatmap is not None
    assert seen.heatmap.shape == (5, 5)
    assert seen.heatmap.dtype == np.float32
