"""Teaching a detector: it knows the new parts, forgets no old ones, and judges nothing by what it has just learnt."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from functools import cache

import cv2
import numpy as np
import pytest

from edge_parts import SETTINGS, blotted, dataset, defects, good_parts, plate
from saec.calibrate.score import ScoreCalibration
from saec.edge.classifier import OnnxClassifier
from saec.edge.fit import fit_station
from saec.edge.replay import Replay
from saec.edge.station import ProductModel, station_files
from saec.errors import BadInput
from saec.learn.detector import Taught, _fitted_head, teach_product
from saec.learn.growth import Lesson
from saec.types import Image, Label, Observation

PLATE = "plate"
GOOD, BAD = Label.GOOD, Label.DEFECT


def turned(image: Image) -> Image:
    """The same plates lie across from now on: another kind of part under the old name."""
    return np.ascontiguousarray(np.rot90(255 - image))


def lesson(image: Image, label: Label, weight: float = 1.0, p_cloud: float | None = None) -> Lesson:
    return Lesson(hashlib.sha256(image.tobytes()).hexdigest(), image, label, weight, p_cloud)


def new_kind(good: int, bad: int = 0, *, weight: float = 1.0, first: int = 2000) -> list[Lesson]:
    found = [lesson(turned(plate(first + n)), GOOD, weight) for n in range(good)]
    return found + [lesson(turned(blotted(first + n)), BAD, weight) for n in range(bad)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ProductModel:
    """Fitted on upright plates, with few labelled defects: no head yet."""
    root = tmp_path_factory.mktemp("model")
    some = dataset(root, good_parts(root, 10), defects(root, 12))
    return fit_station(some, SETTINGS).model(PLATE)


@pytest.fixture(scope="module")
def taught(model) -> Taught:
    return teach_product(model, new_kind(30, 12), SETTINGS)


def called(model: ProductModel, images: list[Image]) -> list[bool]:
    c = model.calibration
    return [bool(c.score.p_defect(model.observe(image).score) >= c.thresholds.tau_edge) for image in images]


@cache
def held_out() -> tuple[list[Image], list[Image]]:
    """Good and bad parts of the new kind that no lesson shows."""
    return [turned(plate(5000 + n)) for n in range(8)], [turned(blotted(5000 + n)) for n in range(8)]


# -- it learns


def test_a_new_kind_that_was_rejected_is_passed_and_its_defects_are_not(model, taught):
    good, bad = held_out()
    assert all(called(model, good))
    assert sum(called(taught.model, good)) <= 1
    assert sum(called(taught.model, bad)) >= 7


def test_the_old_kind_is_not_forgotten(model, taught):
    good, bad = [plate(6000 + n) for n in range(8)], [blotted(6000 + n) for n in range(8)]
    assert sum(called(taught.model, good)) <= sum(called(model, good)) + 1
    assert sum(called(taught.model, bad)) >= sum(called(model, bad)) - 1


def test_the_figures_say_what_was_gained_and_what_the_old_parts_lost(taught):
    figures = taught.figures
    assert (figures["lessons"], figures["good"], figures["defects"], figures["replay"]) == (42, 30, 12, 22)
    assert figures["accuracy_lessons_before"] < 0.5 < 0.8 < figures["accuracy_lessons_after"]
    assert figures["accuracy_replay_after"] >= figures["accuracy_replay_before"] - 0.1
    assert figures["rows"] > 0
    assert all(0 <= value <= 1 for name, value in figures.items() if "_" in name)


def test_whitening_old_rows_and_their_weights_stay(model, taught):
    for old, new in zip(model.detector.memories, taught.model.detector.memories, strict=True):
        size = len(old.bank)
        assert np.array_equal(old.mean, new.mean)
        assert np.array_equal(old.projection, new.projection)
        assert np.array_equal(old.bank, new.bank[:size])
        assert np.array_equal(old.weight, new.weight[:size])
        assert size < len(new.bank) <= size + SETTINGS.learn.bank_rows


def test_a_lessons_good_part_is_not_scored_by_a_bank_that_holds_it(taught):
    replay = taught.model.replay
    fresh = np.flatnonzero(~replay.is_defect)[-30:]
    lessons = {one.sha256: one for one in new_kind(30)}
    rows = [row for row in fresh if replay.hashes[row] in lessons]
    inside = [taught.model.detector.observe(lessons[replay.hashes[row]].image).score for row in rows]
    assert len(rows) == 30
    assert np.mean(replay.bank[rows]) > 1.1 * np.mean(inside)


def test_new_maps_are_measured_by_good_parts_of_both_kinds(model, taught):
    good, _ = held_out()
    worst = [float(taught.model.observe(image).heatmap.max()) for image in good]
    assert np.median(worst) < taught.model.heat_threshold
    assert np.median([float(model.observe(image).heatmap.max()) for image in good]) > model.heat_threshold


def test_a_second_round_builds_on_the_first(taught):
    again = teach_product(taught.model, new_kind(6, 10, first=3000), SETTINGS)
    assert len(again.model.replay) == len(taught.model.replay) + 16
    assert again.figures["accuracy_lessons_after"] >= 0.75


def test_an_old_kind_whose_defects_nobody_labelled_is_not_forgotten_either(tmp_path):
    plain = fit_station(dataset(tmp_path, good_parts(tmp_path, 24)), SETTINGS).model(PLATE)
    taught = teach_product(plain, new_kind(24, 24), SETTINGS).model
    again = teach_product(taught, new_kind(6, 6, first=3000), SETTINGS).model
    good, bad = [plate(6000 + n) for n in range(8)], [blotted(6000 + n) for n in range(8)]
    for later in (taught, again):
        assert sum(called(later, good)) <= sum(called(plain, good)) + 1
        assert sum(called(later, bad)) >= sum(called(plain, bad)) - 1
    assert sum(called(taught, held_out()[1])) - sum(called(taught, held_out()[0])) >= 6


def grainy(image: Image) -> Image:
    """Nothing like a plate: the same pixels in another order."""
    return np.random.default_rng(0).permuted(image.reshape(-1, 3), axis=0).reshape(image.shape)


def test_few_lessons_a_round_do_not_move_the_threshold_beyond_the_old_kinds_defects(tmp_path):
    """A new kind's first lessons score as far off as it is new; its defects are too few for a head, enough to count."""
    later = plain = fit_station(dataset(tmp_path, good_parts(tmp_path, 24)), SETTINGS).model(PLATE)
    for first in (3000, 3100):
        lessons = [lesson(grainy(plate(first + n)), GOOD) for n in range(3)]
        lessons += [lesson(grainy(blotted(first + n)), BAD) for n in range(6)]
        later = teach_product(later, lessons, SETTINGS).model
    assert later.head is None
    assert int(later.replay.is_defect.sum()) == 12
    good, bad = [plate(6000 + n) for n in range(8)], [blotted(6000 + n) for n in range(8)]
    assert sum(called(later, bad)) == sum(called(plain, bad)) == 8
    assert sum(called(later, good)) <= sum(called(plain, good)) + 1


def test_on_a_kind_that_the_head_has_only_seen_good_the_bank_decides():
    rng = np.random.default_rng(0)
    kind, bad = np.repeat([0, 1, 1], [100, 60, 40]), np.repeat([0, 0, 1], [100, 60, 40])
    x = rng.normal(size=(200, 30))
    x[:, 0] += 6 * kind  # the kinds look different
    x[:, 1] += 4 * bad  # and defects of the new one do
    seen = [Observation(score) for score in rng.normal(10 + bad, 1)]
    hashes, flat = [f"{n:064x}" for n in range(200)], [0.0] * 200
    replay = Replay.of(hashes, list(x), seen, flat, bad.tolist(), flat, list(range(200)))
    head, scores = _fitted_head(replace(replay, lesson=kind.astype(np.uint8)), SETTINGS)
    cut = ScoreCalibration.from_labelled(scores[bad == 0], scores[bad == 1]).location
    assert np.mean((scores >= cut) == bad) > 0.9
    assert np.mean([head.score(16.0, row) > cut for row in x[:100]]) > 0.9  # six spreads off: no lesson may excuse it
    assert np.mean([head.score(10.0, row) > cut for row in x[:100]]) < 0.05


# -- the same lessons, the same model


def test_the_order_of_the_lessons_does_not_matter(model):
    lessons = new_kind(8, 4)
    mixed = random.Random(1).sample(lessons, len(lessons))
    one, other = (teach_product(model, some, SETTINGS).model for some in (lessons, mixed + lessons[:3]))
    assert station_files({PLATE: one}) == station_files({PLATE: other})


def test_a_known_part_teaches_nothing_twice(model):
    lessons = new_kind(6, 4)
    once = teach_product(model, lessons, SETTINGS).model
    with pytest.raises(BadInput, match="nothing to learn"):
        teach_product(once, lessons, SETTINGS)
    assert len(teach_product(once, lessons + new_kind(2, first=4000), SETTINGS).model.replay) == len(once.replay) + 2


def test_a_persons_label_wins_over_the_teachers_before_and_after(model):
    lessons = new_kind(6, 4, weight=0.8)
    person = replace(lessons[0], label=BAD, weight=1.0)
    at_once = teach_product(model, [person, *lessons, person], SETTINGS).model.replay
    later = teach_product(teach_product(model, lessons, SETTINGS).model, [person], SETTINGS).model.replay
    for replay in (at_once, later):
        assert replay.p_defect[replay.hashes.index(person.sha256)] == 1.0
    back = teach_product(model, [person, *lessons[1:]], SETTINGS).model
    with pytest.raises(BadInput, match="nothing to learn"):
        teach_product(back, lessons[:1], SETTINGS)


def test_near_duplicates_are_one_group(model):
    image = turned(plate(2500))
    copies = [cv2.convertScaleAbs(image, alpha=gain) for gain in (1.0, 0.99, 0.98)]
    replay = teach_product(model, [*(lesson(c, GOOD) for c in copies), *new_kind(4)], SETTINGS).model.replay
    groups = [replay.group[replay.hashes.index(lesson(c, GOOD).sha256)] for c in copies]
    assert len(set(groups)) == 1
    assert len(set(replay.group[-7:])) == 5


# -- little to learn from


def test_defects_alone_leave_the_bank_as_it_is(model):
    taught = teach_product(model, new_kind(0, 3), SETTINGS)
    assert taught.figures["rows"] == 0
    assert taught.model.replay.is_defect.sum() == 15
    assert "auroc_lessons_after" not in taught.figures


def test_good_parts_alone_teach_a_station_without_defects(tmp_path):
    plain = fit_station(dataset(tmp_path, good_parts(tmp_path, 8)), SETTINGS).model(PLATE)
    taught = teach_product(plain, new_kind(12), SETTINGS)
    assert taught.model.calibration.method == "good-only"
    assert taught.model.head is None
    assert sum(called(taught.model, held_out()[0])) <= 2
    assert all(called(plain, held_out()[0]))


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_lessons_are_taken_without_harm(model, count):
    taught = teach_product(model, new_kind(count), SETTINGS)
    assert (taught.figures["rows"] > 0) == (count > 1)
    assert abs(taught.figures["accuracy_replay_after"] - taught.figures["accuracy_replay_before"]) < 0.2


def test_the_bank_stays_within_its_limits(model):
    small = SETTINGS.model_copy(update={"learn": SETTINGS.learn.model_copy(update={"bank_rows": 7})})
    assert teach_product(model, new_kind(4), small).figures["rows"] == 7
    full = SETTINGS.model_copy(update={"learn": SETTINGS.learn.model_copy(update={"bank_most": 1})})
    assert teach_product(model, new_kind(4), full).figures["rows"] == 0


# -- labels and opinions


def test_a_teachers_labels_are_named_where_bounds_are_stated(model):
    notes = teach_product(model, new_kind(5, 3, weight=0.9), SETTINGS).model.calibration.notes
    assert any("8 of 30 calibration parts carry a teacher's label" in note for note in notes)
    assert not any("teacher" in note for note in teach_product(model, new_kind(5, 3), SETTINGS).model.calibration.notes)


def test_the_clouds_fusion_follows_peoples_labels_and_not_the_clouds_own(model):
    def opined(weight: float) -> list[Lesson]:
        return [replace(one, weight=weight, p_cloud=0.3 if one.label is BAD else 0.1) for one in new_kind(12, 12)]

    kept = teach_product(model, opined(0.9), SETTINGS).model.calibration
    assert kept.fusion == model.calibration.fusion
    assert kept.thresholds.tau_cloud == model.calibration.thresholds.tau_cloud
    moved = teach_product(model, opined(1.0), SETTINGS).model.calibration
    assert 0.1 < moved.thresholds.tau_cloud < 0.3
    assert moved.fusion != model.calibration.fusion


@pytest.mark.parametrize(("label", "weight"), [(Label.UNREADABLE, 1.0), (GOOD, 0.5), (BAD, 1.1)])
def test_what_is_no_lesson_is_refused(label, weight):
    with pytest.raises(BadInput, match="no lesson"):
        Lesson("0" * 64, plate(1), label, weight)


def test_a_classifier_cannot_be_taught(model):
    blind = object.__new__(OnnxClassifier)
    with pytest.raises(BadInput, match="a classifier cannot be taught"):
        teach_product(replace(model, detector=blind), new_kind(2), SETTINGS)


def test_the_progress_is_told(model):
    told = []
    teach_product(model, new_kind(3), SETTINGS, lambda *step: told.append(step))
    assert told[-1] == ("looking at lessons", 3, 3)
