"""The head beside the bank: fitted where it helps, one logit with the bank's score, remembered with what made it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save

from edge_parts import SETTINGS, blotted, dataset, defects, good_parts, plate, station
from saec.edge import replay as replay_module
from saec.edge.fit import fit_station
from saec.edge.head import FOLDS, MIN_DEFECTS, EdgeHead, best_ridge, fit_edge_head, fit_head, pool_features
from saec.edge.memory import Memory, extend_memory
from saec.edge.replay import Replay
from saec.edge.station import OLDEST, Station, station_files
from saec.errors import BadInput
from saec.learn.detector import teach_product
from saec.learn.rows import kept_rows
from saec.types import Observation

PLATE = "plate"


def cloud_of(n: int, *, defects: int, gap: float, seed: int = 0, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features [n, width] of which the first moves by ``gap`` where a part is a defect, and the labels."""
    rng = np.random.default_rng(seed)
    p = (np.arange(n) < defects).astype(float)
    x = rng.normal(size=(n, width))
    x[:, 0] += gap * p
    return x, p


# -- pooling and the ridge


def test_pooling_says_mean_spread_and_extremes_of_each_channel():
    grid = np.random.default_rng(0).normal(size=(6, 10, 3)).astype(np.float32)
    flat = np.sort(grid.reshape(60, 3), axis=0)
    wanted = np.concatenate([flat.mean(0), flat.std(0), flat[-3:].mean(0), flat[:3].mean(0)])
    assert np.allclose(pool_features([grid]), wanted, atol=1e-6)
    assert pool_features([grid, grid[:2]]).shape == (24,)


def test_near_duplicates_are_held_out_together():
    x, p = cloud_of(60, defects=30, gap=0.0, seed=3, width=400)
    twice, labels = np.repeat(x, 2, axis=0), np.repeat(p, 2)
    _, apart = best_ridge(twice, labels)
    _, together = best_ridge(twice, labels, np.repeat(np.arange(60), 2))

    def right(scores):
        return np.mean((scores > 0) == (labels > 0.5))

    assert right(apart) > 0.8  # the copy gives the label away
    assert right(together) < 0.65
    assert FOLDS > 1


def test_an_unsure_teacher_pulls_less():
    x, p = cloud_of(40, defects=20, gap=2.0)
    sure = fit_head(x, p, 0.1).score(x[0])
    assert fit_head(x, np.where(p > 0, 0.6, p), 0.1).score(x[0]) < sure


# -- when there is one


def test_a_head_that_helps_is_taken_and_its_scores_are_held_out():
    x, p = cloud_of(120, defects=40, gap=3.0)
    bank = np.random.default_rng(1).normal(size=120) + p
    head, fused = fit_edge_head(bank, x, p)
    assert head.bank > 0
    own = np.array([head.score(b, row) for b, row in zip(bank, x, strict=True)])
    assert np.corrcoef(own, fused)[0, 1] > 0.95
    assert not np.allclose(own, fused)

    def error(scores):
        return np.mean((scores > 0) != (p > 0))

    assert error(fused) < error(bank - np.median(bank))


@pytest.mark.parametrize(
    ("defects_", "gap"), [(MIN_DEFECTS - 1, 3.0), (40, 0.0)], ids=["too few defects", "features say nothing"]
)
def test_a_head_that_cannot_be_fitted_or_does_not_help_is_none(defects_, gap):
    x, p = cloud_of(120, defects=defects_, gap=gap)
    bank = np.random.default_rng(1).normal(size=120) + 4 * p
    assert fit_edge_head(bank, x, p) is None


def test_a_saved_head_gives_the_very_same_score():
    x, p = cloud_of(120, defects=40, gap=3.0)
    head, _ = fit_edge_head(p + x[:, 1], x, p)
    again = EdgeHead.from_tensors(load(save(dict(head.tensors()))))
    assert again.score(0.7, x[5]) == head.score(0.7, x[5])


# -- in a station


@pytest.fixture(scope="module")
def headed(tmp_path_factory) -> Station:
    """A station whose defects are faint: the bank alone does not see all of them."""
    root = tmp_path_factory.mktemp("headed")
    good = [*good_parts(root, 8, split="train"), *good_parts(root, 24, first=50, split="calibration")]
    return fit_station(dataset(root, good, defects(root, 24, split="calibration")), SETTINGS)


def with_head(found: Station) -> Station:
    """The station with a head, also where fitting found none worth its while."""
    model = found.model(PLATE)
    width = model.replay.pooled.shape[1]
    weights = np.random.default_rng(0).normal(size=width).astype(np.float32) * 1e-3
    models = {PLATE: replace(model, head=model.head or EdgeHead(weights, 0.5, -1.0))}
    files = {name: hashlib.sha256(data).hexdigest() for name, data in station_files(models).items()}
    return Station(models, replace(found.manifest, files=files))


def test_a_station_remembers_the_figures_of_its_calibration_parts(headed):
    replay = headed.model(PLATE).replay
    assert len(replay) == 48
    assert replay.is_defect.sum() == 24
    assert sorted(replay.hashes) == list(headed.manifest.calibration_sha256)
    assert replay.pooled.dtype == np.float16
    assert (replay.peak >= replay.background).all()
    assert np.isnan(replay.p_cloud).all()


def test_a_head_is_saved_loaded_and_judges_the_same(headed, tmp_path):
    found = with_head(headed)
    found.save(tmp_path / "station")
    loaded = Station.load(tmp_path / "station", settings=SETTINGS)
    for image in (plate(700), blotted(70)):
        assert loaded.predict(image, PLATE).score == found.predict(image, PLATE).score
    model = found.model(PLATE)
    seen = model.detector.observe(plate(700))
    assert model.observe(plate(700)).score != seen.score
    assert np.array_equal(model.observe(plate(700)).heatmap, seen.heatmap)  # a head says how sure, the bank where


def test_the_calibration_is_in_the_units_of_what_the_station_scores(headed):
    model = headed.model(PLATE)
    scored = model.replay.score if model.head is not None else model.replay.bank
    assert np.array_equal(model.replay.score, scored)
    bad = [headed.predict(blotted(800 + n), PLATE).p_defect for n in range(4)]
    good = [headed.predict(plate(800 + n), PLATE).p_defect for n in range(4)]
    assert max(good) < 0.5 < min(bad)


def test_a_station_of_the_first_format_still_judges_and_cannot_be_taught(tmp_path):
    model = replace(station().model(PLATE), head=None, replay=None)
    files = {name: hashlib.sha256(data).hexdigest() for name, data in station_files({PLATE: model}).items()}
    old = Station({PLATE: model}, replace(station().manifest, format=OLDEST, files=files))
    old.save(tmp_path / "old")
    loaded = Station.load(tmp_path / "old", settings=SETTINGS)
    assert loaded.predict(plate(3), PLATE).score == pytest.approx(station().predict(plate(3), PLATE).score, abs=1e-5)
    with pytest.raises(BadInput, match="holds no replay"):
        teach_product(loaded.model(PLATE), [], SETTINGS)


# -- replay and bank


def rows(count: int, first: int = 0) -> Replay:
    seen = [Observation(float(n), np.full((2, 2), n, np.float32)) for n in range(count)]
    hashes = [f"{first + n:064x}" for n in range(count)]
    flat = [0.0] * count
    return Replay.of(hashes, [np.zeros(4)] * count, seen, flat, flat, flat, list(range(count)))


def test_joined_replays_keep_their_groups_apart_and_their_order():
    both = rows(3).joined(rows(2, first=10))
    assert both.group.tolist() == [0, 1, 2, 3, 4]
    assert both.lesson.tolist() == [0] * 5
    assert both.hashes == [f"{n:064x}" for n in (0, 1, 2, 10, 11)]


def test_a_replay_is_capped_by_a_draw_that_does_not_depend_on_order(monkeypatch):
    monkeypatch.setattr(replay_module, "MOST", 4)
    one, other = rows(3).joined(rows(5, first=90)).capped(), rows(5, first=90).joined(rows(3)).capped()
    assert len(one) == 4
    assert set(one.hashes) == set(other.hashes)


def test_lessons_that_a_full_replay_drops_stay_known_and_the_fits_own_parts_need_not(monkeypatch):
    monkeypatch.setattr(replay_module, "MOST", 4)
    taught = rows(3, first=90)
    taught = replace(taught, lesson=np.ones_like(taught.lesson))
    full = rows(3).joined(taught).capped()
    assert full.known == frozenset(rows(3).joined(taught).hashes)
    assert len(full) == 4
    assert len(full.forgotten) == 2
    again = Replay.from_tensors(full.tensors())
    assert (again.known, again.hashes) == (full.known, full.hashes)
    more = rows(2, first=50)
    both = again.joined(replace(more, lesson=np.ones_like(more.lesson))).capped()
    assert both.known == full.known | set(more.hashes)
    assert np.array_equal(both.forgotten[:2], full.forgotten), "they only grow, so that an update of them is small"
    assert "forgotten" not in rows(9).capped().tensors(), "of the fit, which names its parts itself"
    with pytest.raises(ValueError, match="no hashes"):
        Replay.from_tensors({**full.tensors(), "forgotten": np.zeros((2, 31), np.uint8)})


def test_a_replay_with_an_array_too_few_or_too_long_is_refused():
    tensors = rows(3).tensors()
    assert Replay.from_tensors(tensors).hashes == rows(3).hashes
    for broken in ({**tensors, "bank": np.zeros(2)}, {k: v for k, v in tensors.items() if k != "scene"}):
        with pytest.raises(ValueError, match="one row for each part"):
            Replay.from_tensors(broken)


def bank(size: int, seed: int = 0) -> Memory:
    points = np.random.default_rng(seed).normal(size=(size, 5)).astype(np.float32)
    eye = np.eye(5, dtype=np.float32)
    return Memory(np.zeros(5, np.float32), eye, points, np.ones(size, np.float32))


def test_a_grown_bank_keeps_its_rows_and_weights_and_knows_the_new_parts():
    old, new = bank(200), np.random.default_rng(1).normal(8, 1, size=(300, 5)).astype(np.float32)
    grown = extend_memory(old, new, rows=50, most=1000, seed=0)
    assert np.array_equal(grown.bank[:200], old.bank)
    assert np.array_equal(grown.weight[:200], old.weight)
    assert len(grown.bank) == 250
    assert set(map(bytes, grown.bank[200:])) <= set(map(bytes, new))
    far = new[None, :40]
    assert grown.distances(far).mean() < 0.3 * old.distances(far).mean()
    # The new rows lie as densely as the old: their weights are in the old ones' units.
    assert 0.7 < np.median(grown.weight[200:]) < 1.4


def test_a_full_bank_gives_up_taught_rows_only(monkeypatch):
    monkeypatch.setattr("saec.edge.memory.BANK_SIZE", 200)
    new = np.random.default_rng(1).normal(8, 1, size=(300, 5)).astype(np.float32)
    grown = extend_memory(bank(200), new, rows=50, most=260, seed=0)
    again = extend_memory(grown, new + 20, rows=50, most=260, seed=1)
    assert len(again.bank) == 260
    assert np.array_equal(again.bank[:200], bank(200).bank)
    assert (again.bank[200:].mean(axis=1) > 20).sum() == 50
    assert len(kept_rows(grown.bank, again.bank)) == len(again.bank) - 50  # an update sends the new rows alone
    same = extend_memory(grown, new + 20, rows=50, most=260, seed=1)
    assert np.array_equal(same.bank, again.bank)
    assert np.array_equal(same.weight, again.weight)
