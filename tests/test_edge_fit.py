"""Fitting a station: from few good images, with held-out parts or in folds, with a cloud or without."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping

import cv2
import numpy as np
import pytest

from edge_parts import SETTINGS, blotted, dataset, defects, good_parts, parts, plate, put, station
from saec.calibrate.calibration import ONE_GOOD, CalibrationData, calibrate, content_digest
from saec.calibrate.fusion import Fusion
from saec.data.readers import read_dataset
from saec.edge import detector, fitters, replay
from saec.edge.fit import fit_station
from saec.edge.station import Station, station_files
from saec.errors import BadInput
from saec.types import CloudError, Evidence, Label, Opinion, Part, Query, Reason

PLATE = "plate"


class Oracle:
    """A cloud that knows the label from the part's id and remembers what it was asked."""

    model_id = "oracle"

    def __init__(self, error: CloudError | None = None) -> None:
        self.asked: dict[str, Query] = {}
        self._error = error
        self._lock = threading.Lock()

    def judge(self, query: Query, *, deadline_s: float) -> Opinion:
        if self._error is not None:
            raise self._error
        with self._lock:
            assert query.part_id not in self.asked
            self.asked[query.part_id] = query
        assert deadline_s == SETTINGS.cloud.timeout_s
        return Opinion(0.97 if "/defect/" in query.part_id else 0.04, Evidence(), self.model_id)

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def seen_by_calibration(monkeypatch) -> list[CalibrationData]:
    """What was handed to the calibration, product by product."""
    handed: list[CalibrationData] = []

    def spy(data, settings):
        handed.append(data)
        return calibrate(data, settings)

    monkeypatch.setattr(replay, "calibrate", spy)
    return handed


def hashes(some: list[Part]) -> tuple[str, ...]:
    return tuple(sorted(hashlib.sha256(part.path.read_bytes()).hexdigest() for part in some))


def verdicts(found: Station, count: int = 6) -> tuple[list[float], list[float]]:
    good = [found.predict(plate(800 + number), PLATE).p_defect for number in range(count)]
    bad = [found.predict(blotted(80 + number), PLATE).p_defect for number in range(count)]
    return good, bad


# -- how many good images


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_any_number_of_good_images_makes_a_station_that_tells_defects(tmp_path, count):
    found = fit_station(dataset(tmp_path, good_parts(tmp_path, count)), SETTINGS)
    good, bad = verdicts(found)
    assert min(bad) > max(good)
    assert min(bad) > 0.5
    calibration = found.calibration(PLATE)
    assert calibration.method == "good-only"
    assert calibration.n_good == (fitters.COPIES if count == 1 else count)
    assert len(found.manifest.train_sha256) == count
    assert found.manifest.detector.startswith("memory efficientnet-lite2@")


def test_one_good_image_is_a_beginning_and_says_so(tmp_path):
    found = fit_station(dataset(tmp_path, good_parts(tmp_path, 1)), SETTINGS)
    assert found.calibration(PLATE).notes == (ONE_GOOD,)
    assert found.predict(plate(0), PLATE).p_defect < 0.5


def test_more_good_images_call_fewer_good_parts_defects(tmp_path):
    few = fit_station(dataset(tmp_path / "few", good_parts(tmp_path / "few", 2)), SETTINGS)
    called = [sum(p >= 0.5 for p in verdicts(found, 12)[0]) for found in (few, station())]
    assert called[1] <= min(called[0], 2)


def test_images_of_different_sizes_are_fitted_together(tmp_path):
    images = [plate(number, size=size) for number, size in enumerate([(160, 160), (160, 200), (320, 320), (90, 140)])]
    found = fit_station(dataset(tmp_path, parts(tmp_path, images, label=Label.GOOD)), SETTINGS)
    assert np.isfinite(found.predict(plate(9), PLATE).score)


# -- copies


def test_identical_images_cannot_calibrate_and_one_line_says_so(tmp_path):
    same = parts(tmp_path, [plate(0)] * 5, label=Label.GOOD)
    with pytest.raises(BadInput, match=r"all good images are copies of one: plate \(add images of other good parts\)"):
        fit_station(dataset(tmp_path, same), SETTINGS)


def brighter(image: np.ndarray) -> np.ndarray:
    return cv2.convertScaleAbs(image, alpha=0.98, beta=3)


def test_near_duplicates_are_scored_without_each_other(tmp_path, seen_by_calibration):
    originals = [plate(number) for number in range(6)]
    alone = fit_station(dataset(tmp_path / "a", parts(tmp_path / "a", originals, label=Label.GOOD)), SETTINGS)
    doubled = originals + [brighter(image) for image in originals]
    fit_station(dataset(tmp_path / "b", parts(tmp_path / "b", doubled, label=Label.GOOD)), SETTINGS)
    without, with_copies = (np.asarray(data.good_scores) for data in seen_by_calibration)
    assert len(with_copies) == 12
    assert with_copies.min() > 0.5 * without.min()
    # What a copy in the memory would have made of it:
    assert with_copies.min() > 3 * max(alone.predict(brighter(image), PLATE).score for image in originals)


def test_a_copy_that_is_not_scored_itself_leaves_the_memory_too(tmp_path, seen_by_calibration, monkeypatch):
    originals = [plate(number) for number in range(6)]
    fit_station(dataset(tmp_path / "a", parts(tmp_path / "a", originals, label=Label.GOOD)), SETTINGS)
    monkeypatch.setattr(fitters, "HELD_OUT", 6)
    doubled = [image for original in originals for image in (original, brighter(original))]
    fit_station(dataset(tmp_path / "b", parts(tmp_path / "b", doubled, label=Label.GOOD)), SETTINGS)
    without, with_copies = (np.asarray(data.good_scores) for data in seen_by_calibration)
    assert len(with_copies) == 6
    assert with_copies.min() > 0.5 * without.min()


# -- bad input


def test_an_unreadable_good_image_is_named(tmp_path):
    good = good_parts(tmp_path, 4)
    good[2].path.write_bytes(good[2].path.read_bytes()[:500])
    with pytest.raises(BadInput, match=r"cannot fit on an image that cannot be read: .*002\.png.*truncated") as caught:
        fit_station(dataset(tmp_path, good), SETTINGS)
    assert "\n" not in str(caught.value)


def test_an_unreadable_defect_is_named(tmp_path):
    some = defects(tmp_path, 2)
    some[1].path.write_bytes(b"")
    with pytest.raises(BadInput, match=r"defect/001\.png.*empty"):
        fit_station(dataset(tmp_path, good_parts(tmp_path, 4), some), SETTINGS)


def test_a_product_without_good_images_is_named(tmp_path):
    with pytest.raises(BadInput, match="product 'nut' has no good images"):
        fit_station(dataset(tmp_path, good_parts(tmp_path, 3), defects(tmp_path, 3, product="nut")), SETTINGS)


def test_test_parts_are_never_looked_at(tmp_path):
    for number in range(5):
        put(tmp_path / "plate" / "train" / "good" / f"{number}.png", plate(number))
    for kind in ("good", "crack"):
        (tmp_path / "plate" / "test" / kind).mkdir(parents=True)
        (tmp_path / "plate" / "test" / kind / "0.png").write_bytes(b"unreadable")
    read = read_dataset(tmp_path)
    assert "test" in read.splits
    found = fit_station(read, SETTINGS)
    train = sorted((tmp_path / "plate" / "train" / "good").iterdir())
    expected = tuple(sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in train))
    assert found.manifest.train_sha256 == found.manifest.calibration_sha256 == expected


# -- calibration


def test_without_a_split_good_parts_are_scored_in_folds(tmp_path, seen_by_calibration):
    good, bad = good_parts(tmp_path, 12), defects(tmp_path, 10)
    found = fit_station(dataset(tmp_path, good, bad), SETTINGS)
    calibration = found.calibration(PLATE)
    assert calibration.overkill.method == "cross-conformal"
    assert (calibration.method, calibration.n_good, calibration.n_defect) == ("labelled", 12, 10)
    assert found.manifest.train_sha256 == hashes(good)
    assert found.manifest.calibration_sha256 == hashes([*good, *bad])
    assert calibration.data_sha256 == content_digest(hashes([*good, *bad]))
    (data,) = seen_by_calibration
    assert data.cross_fitted
    assert len(data.defect_scene) == 10


def test_a_calibration_split_is_held_out_of_the_memory(tmp_path, seen_by_calibration):
    train = good_parts(tmp_path, 8, split="train")
    held_out = good_parts(tmp_path, 10, first=100, split="calibration")
    bad = defects(tmp_path, 10, split="calibration")
    found = fit_station(dataset(tmp_path, train, held_out, bad), SETTINGS)
    assert found.calibration(PLATE).overkill.method == "conformal"
    assert found.calibration(PLATE).n_good == 10
    assert found.manifest.train_sha256 == hashes(train)
    assert found.manifest.calibration_sha256 == hashes([*held_out, *bad])
    (data,) = seen_by_calibration
    again = [found.predict(cv2.imread(str(part.path)), PLATE).score for part in [*held_out, *bad]]
    assert np.allclose([*data.good_scores, *data.defect_scores], again, atol=1e-4)


def test_an_escape_rate_that_cannot_be_proven_is_refused(tmp_path):
    wanted = SETTINGS.model_copy(update={"calibration": SETTINGS.calibration.model_copy(update={"escape": 0.01})})
    with pytest.raises(BadInput, match="not enough data: 3 defects can prove at best"):
        fit_station(dataset(tmp_path, good_parts(tmp_path, 4), defects(tmp_path, 3)), wanted)


# -- the cloud


def test_the_cloud_is_asked_about_the_calibration_parts_and_the_fusion_fitted(tmp_path):
    train = good_parts(tmp_path, 6, split="train")
    held_out = good_parts(tmp_path, 10, first=100, split="calibration")
    bad = defects(tmp_path, 10, split="calibration")
    cloud = Oracle()
    found = fit_station(dataset(tmp_path, train, held_out, bad), SETTINGS, cloud=cloud)
    assert set(cloud.asked) == {part.part_id for part in [*held_out, *bad]}
    for part in (held_out[3], bad[3]):
        query = cloud.asked[part.part_id]
        assert np.array_equal(query.image, cv2.imread(str(part.path)))
        assert query.product == PLATE
        assert query.original_size == (160, 160)
        assert query.anomaly_map is not None
        assert np.array_equal(query.references[0], found.references(PLATE)[0])
    fusion = found.fusion(PLATE)
    assert fusion is not None
    assert fusion not in (Fusion(), fit_station(dataset(tmp_path, train, held_out, bad), SETTINGS).fusion(PLATE))
    assert fusion.p_defect(0.5, 0.97) > 0.5 > fusion.p_defect(0.5, 0.04)
    assert 0.04 < found.calibration(PLATE).thresholds.tau_cloud < 0.97


def test_known_opinions_are_taken_before_the_cloud_is_asked(tmp_path):
    good, bad = good_parts(tmp_path, 10), defects(tmp_path, 10)
    known: Mapping[str, float] = dict.fromkeys(hashes([*good[:4], *bad]), 0.5)
    cloud = Oracle()
    fit_station(dataset(tmp_path, good, bad), SETTINGS, cloud=cloud, cloud_opinions=known)
    assert set(cloud.asked) == {part.part_id for part in good[4:]}
    every = dict.fromkeys(hashes(good), 0.04) | dict.fromkeys(hashes(bad), 0.97)
    found = fit_station(dataset(tmp_path, good, bad), SETTINGS, cloud_opinions=every)
    assert found.fusion(PLATE) != Fusion()


def test_opinions_on_some_parts_alone_fit_no_fusion(tmp_path):
    good, bad = good_parts(tmp_path, 10), defects(tmp_path, 10)
    found = fit_station(dataset(tmp_path, good, bad), SETTINGS, cloud_opinions=dict.fromkeys(hashes(bad), 0.97))
    assert found.fusion(PLATE) == Fusion()


def test_a_cloud_that_fails_while_fitting_is_one_line(tmp_path):
    cloud = Oracle(CloudError(Reason.CLOUD_UNREACHABLE, "connection refused"))
    with pytest.raises(BadInput, match=r"no opinion on a calibration part \(connection refused\): .*\.png") as caught:
        fit_station(dataset(tmp_path, good_parts(tmp_path, 4)), SETTINGS, cloud=cloud)
    assert "without --cloud" in str(caught.value)


# -- the same again, and bounds


def test_two_fits_give_identical_files(tmp_path):
    some = dataset(tmp_path, good_parts(tmp_path, 6), defects(tmp_path, 3))
    one, other = fit_station(some, SETTINGS), fit_station(some, SETTINGS)
    assert station_files(one._products) == station_files(other._products)
    assert one.manifest.sha256 == other.manifest.sha256
    assert one.models == other.models


def test_the_memory_is_bounded_whatever_the_number_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(detector, "MAX_PATCHES", 60)
    found = fit_station(dataset(tmp_path, good_parts(tmp_path, 12)), SETTINGS)
    banks = found._products[PLATE].detector.memories
    assert all(len(memory.bank) <= 60 for memory in banks)
    assert max(len(memory.bank) for memory in banks) == 60


def test_progress_tells_each_step_to_its_end(tmp_path):
    last: dict[str, tuple[int, int]] = {}
    some = dataset(tmp_path, good_parts(tmp_path, 5), defects(tmp_path, 2))
    fit_station(some, SETTINGS, cloud=Oracle(), progress=lambda step, done, total: last.update({step: (done, total)}))
    steps = {step.removeprefix("plate: "): done == total for step, (done, total) in last.items()}
    steps.pop("filling the memory")  # a share, in hundredths, of a memory large enough to need choosing
    assert steps == dict.fromkeys(
        ("looking at good parts", "scoring good parts in folds", "scoring defects", "asking the cloud"), True
    )


def test_the_reference_is_a_good_part_small_enough_to_send(tmp_path):
    large = parts(tmp_path, [plate(number, size=(700, 1400)) for number in range(2)], label=Label.GOOD)
    found = fit_station(dataset(tmp_path, large), SETTINGS)
    (reference,) = found.references(PLATE)
    assert reference.shape == (512, 1024, 3)
    assert found.references(PLATE)[0] is reference
