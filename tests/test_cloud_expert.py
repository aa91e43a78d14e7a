"""The embedded expert: with a head where there are enough defects, with memory alone otherwise, behind Backend."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_parts import SETTINGS, blot_of, blotted, dataset, defects, good_parts, parts, plate
from saec.cloud.embedded import EmbeddedClient
from saec.cloud.expert import FORMAT, INDEX, ExpertBackend, fit_expert
from saec.data.dataset import Dataset
from saec.edge.fit import fit_station
from saec.edge.folder import write_folder
from saec.edge.head import MIN_DEFECTS
from saec.errors import BadInput
from saec.types import Backend, Box, CloudError, Label, Opinion, Part, Query, Reason

PLATE = "plate"


def sha256s(some: list[Part]) -> set[str]:
    return {hashlib.sha256(part.path.read_bytes()).hexdigest() for part in some}


def query(image: np.ndarray, product: str = PLATE, *, region: Box | None = None, of: np.ndarray | None = None) -> Query:
    whole = image if of is None else of
    return Query("p", product, image, (whole.shape[1], whole.shape[0]), region=region)


def opinions(backend: Backend, images: list[np.ndarray]) -> list[Opinion]:
    found = backend.judge([query(image) for image in images])
    assert all(isinstance(one, Opinion) for one in found)
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> tuple[Path, list[Part], dict[str, float]]:
    """An expert's folder, the calibration split it was fitted to, and its held-out opinions."""
    root = tmp_path_factory.mktemp("labelled")
    train = good_parts(root, 8, split="train")
    held_out = [*good_parts(root, 10, first=100, split="calibration"), *defects(root, MIN_DEFECTS, split="calibration")]
    return root / "expert", held_out, fit_expert(dataset(root, train, held_out), SETTINGS, out=root / "expert")


@pytest.fixture(scope="module")
def expert(labelled) -> ExpertBackend:
    return ExpertBackend.load(labelled[0], SETTINGS)


@pytest.fixture(scope="module")
def good_only(tmp_path_factory) -> ExpertBackend:
    root = tmp_path_factory.mktemp("good")
    some = dataset(root, good_parts(root, 8), defects(root, MIN_DEFECTS - 1))
    assert fit_expert(some, SETTINGS, out=root / "expert") == {}
    return ExpertBackend.load(root / "expert", SETTINGS)


# -- with a head and without


@pytest.mark.parametrize("which", ["expert", "good_only"])
def test_it_tells_defects_from_good_parts(which, request):
    backend = request.getfixturevalue(which)
    good = [one.p_defect for one in opinions(backend, [plate(900 + n) for n in range(5)])]
    bad = [one.p_defect for one in opinions(backend, [blotted(90 + n) for n in range(5)])]
    assert max(good) < min(bad)
    assert min(bad) > 0.5
    if which == "expert":  # a threshold from good parts alone bounds the share of overkill: one of five may be above it
        assert max(good) < 0.5
    assert all(0 <= p <= 1 for p in good + bad)


def test_enough_labelled_defects_make_a_head(labelled, expert, good_only):
    assert expert._models[PLATE].head is not None
    assert good_only._models[PLATE].head is None


def test_held_out_opinions_are_of_exactly_the_calibration_parts(labelled):
    _, held_out, known = labelled
    assert set(known) == sha256s(held_out)
    assert all(0 < p < 1 for p in known.values())
    bad = sha256s([part for part in held_out if part.label is Label.DEFECT])
    assert np.mean([known[one] for one in bad]) > 0.5 > np.mean([known[one] for one in known.keys() - bad])


def test_without_a_split_every_part_is_held_out_in_turn(tmp_path):
    good, bad = good_parts(tmp_path, 6), defects(tmp_path, MIN_DEFECTS)
    known = fit_expert(dataset(tmp_path, good, bad), SETTINGS, out=tmp_path / "expert")
    assert set(known) == sha256s([*good, *bad])


def test_test_parts_are_never_looked_at(tmp_path):
    train, hidden = good_parts(tmp_path, 3, split="train"), good_parts(tmp_path, 2, first=50, split="test")
    for part in hidden:
        part.path.write_bytes(b"unreadable")
    fit_expert(dataset(tmp_path, train, hidden), SETTINGS, out=tmp_path / "expert")


def test_held_out_opinions_fit_the_stations_fusion(labelled, expert):
    path, held_out, known = labelled
    train = good_parts(path.parent, 8, split="train")
    found = fit_station(dataset(path.parent, train, held_out), SETTINGS, cloud_opinions=known)
    fusion = found.fusion(PLATE)
    assert fusion is not None
    assert fusion.w_edge > 0
    assert fusion.w_cloud > 0


def test_one_good_image_does_not_make_everything_a_defect(tmp_path):
    fit_expert(dataset(tmp_path, good_parts(tmp_path, 1)), SETTINGS, out=tmp_path / "expert")
    (seen,) = opinions(ExpertBackend.load(tmp_path / "expert", SETTINGS), [plate(0)])
    moved = cv2.warpAffine(plate(0), np.float32([[1, 0, 2], [0, 1, 1]]), (160, 160), borderMode=cv2.BORDER_REFLECT)
    (other,) = opinions(ExpertBackend.load(tmp_path / "expert", SETTINGS), [moved])
    assert seen.p_defect < 0.5
    assert other.p_defect < 0.5


def test_two_fits_are_the_same(tmp_path, labelled):
    path, held_out, known = labelled
    some = dataset(path.parent, good_parts(path.parent, 8, split="train"), held_out)
    assert fit_expert(some, SETTINGS, out=tmp_path / "expert") == known
    assert {file.name: file.read_bytes() for file in (tmp_path / "expert").iterdir()} == {
        file.name: file.read_bytes() for file in path.iterdir()
    }


# -- evidence


def test_boxes_are_in_pixels_of_the_original(expert):
    image = blotted(3)
    (seen,) = opinions(expert, [image])
    assert seen.evidence.source == expert.model_id == seen.model_id
    for box in seen.evidence.boxes:
        assert 0 <= box.x1 < box.x2 <= 160
        assert 0 <= box.y1 < box.y2 <= 160
    assert covers(seen.evidence.boxes, blot_of(3))


def covers(boxes: tuple[Box, ...], blot: Box) -> bool:
    x, y = (blot.x1 + blot.x2) / 2, (blot.y1 + blot.y2) / 2
    return any(box.x1 <= x < box.x2 and box.y1 <= y < box.y2 for box in boxes)


def test_boxes_of_a_crop_are_in_pixels_of_the_original_too(expert):
    blot = blot_of(3)
    whole = np.zeros((500, 700, 3), np.uint8)
    region = Box(300, 200, 620, 440)  # shown at half its size
    whole[200:440, 300:620] = cv2.resize(blotted(3), (320, 240), interpolation=cv2.INTER_CUBIC)
    shown = cv2.resize(whole[200:440, 300:620], (160, 120), interpolation=cv2.INTER_AREA)
    (seen,) = expert.judge([query(shown, region=region, of=whole)])
    assert isinstance(seen, Opinion)
    assert seen.p_defect > 0.5
    assert seen.evidence.boxes
    for box in seen.evidence.boxes:
        assert region.x1 <= box.x1 < box.x2 <= region.x2
        assert region.y1 <= box.y1 < box.y2 <= region.y2
    there = Box(300 + 2 * blot.x1, 200 + 3 * blot.y1 // 2, 300 + 2 * blot.x2, 200 + 3 * blot.y2 // 2)
    assert covers(seen.evidence.boxes, there)


def test_a_good_part_has_no_boxes(expert):
    (seen,) = opinions(expert, [plate(901)])
    assert seen.evidence.boxes == ()


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (640, 480)])
def test_an_image_of_any_size_is_judged(expert, size):
    (seen,) = opinions(expert, [plate(5, size=(700, 500))[: size[0], : size[1]]])
    assert 0 <= seen.p_defect <= 1
    assert all(box.x2 <= size[1] and box.y2 <= size[0] for box in seen.evidence.boxes)


# -- the backend's contract


def test_an_unknown_product_fails_alone(expert):
    found = expert.judge([query(plate(1)), query(plate(1), "nut"), query(blotted(1))])
    assert [type(one) for one in found] == [Opinion, BadInput, Opinion]
    assert "does not know this product: nut" in str(found[1])


def test_it_serves_through_the_embedded_client(expert):
    client = EmbeddedClient(expert)
    try:
        assert client.model_id == expert.model_id
        seen = client.judge(query(blotted(2)), deadline_s=30)
        assert seen.p_defect == opinions(expert, [blotted(2)])[0].p_defect
        assert seen.uplink_bytes == 0
        with pytest.raises(CloudError, match="does not know this product") as caught:
            client.judge(query(plate(1), "nut"), deadline_s=30)
        assert caught.value.reason is Reason.CLOUD_BAD_ANSWER
    finally:
        client.close()


def test_a_backend_it_is(expert):
    backend: Backend = expert
    assert backend.model_id.startswith("expert@")
    assert backend.judge([]) == []


# -- on the disk


@pytest.fixture
def copied(labelled, tmp_path) -> Path:
    return shutil.copytree(labelled[0], tmp_path / "expert")


def refusal(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        ExpertBackend.load(path, SETTINGS)
    line = str(caught.value)
    assert "\n" not in line
    assert path.name in line
    return line


def test_a_loaded_expert_says_what_it_said_before(copied, expert):
    images = [plate(3), blotted(3), plate(7, size=(97, 203))]
    again = ExpertBackend.load(copied, SETTINGS)
    assert opinions(again, images) == opinions(expert, images)


def test_the_folder_holds_safetensors_and_json(copied):
    assert {file.name for file in copied.iterdir()} == {INDEX, "plate.safetensors"}


def test_any_damaged_byte_is_noticed(copied):
    for file in list(copied.iterdir()):
        whole = file.read_bytes()
        for at in np.random.default_rng(1).integers(0, len(whole), 8):
            bad = bytearray(whole)
            bad[at] = ord("7") if bad[at] != ord("7") else ord("8")
            file.write_bytes(bytes(bad))
            assert "damaged" in refusal(copied) or file.name == INDEX
        for keep in (0, 30, -1):
            file.write_bytes(whole[:keep])
            assert "damaged" in refusal(copied)
        file.write_bytes(whole)
    ExpertBackend.load(copied, SETTINGS)


def test_a_missing_expert_or_file_is_one_line(copied, tmp_path):
    assert "no expert model here" in refusal(tmp_path / "none")
    (copied / "plate.safetensors").unlink()
    assert "plate.safetensors" in refusal(copied)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"format": FORMAT + 1}, f"format {FORMAT + 1}, this version reads {FORMAT}"),
        ({"backbone": "efficientnet-lite9@0"}, "fitted with efficientnet-lite9@0"),
        ({"products": []}, "damaged"),
        ({"products": {"plate": {}}}, "damaged"),
        ({"products": {"plate": None}}, "damaged"),
    ],
)
def test_an_expert_of_another_version_or_without_sense_is_refused(copied, changes, line):
    tree = json.loads((copied / INDEX).read_text())
    del tree["sha256"]
    files = {"plate.safetensors": (copied / "plate.safetensors").read_bytes()}
    write_folder(copied, files, INDEX, tree | changes, kind="expert model")
    assert line in refusal(copied)


def test_nothing_but_an_expert_is_written_over(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(BadInput, match="this exists and is not a saved expert model"):
        fit_expert(dataset(tmp_path, good_parts(tmp_path, 2)), SETTINGS, out=tmp_path / "photos")
    assert (tmp_path / "photos" / "holiday.jpg").is_file()


# -- bad input


def test_an_unreadable_image_is_named(tmp_path):
    good = good_parts(tmp_path, 3)
    good[1].path.write_bytes(good[1].path.read_bytes()[:300])
    with pytest.raises(BadInput, match=r"001\.png.*truncated"):
        fit_expert(dataset(tmp_path, good), SETTINGS, out=tmp_path / "expert")
    assert not (tmp_path / "expert").exists()


def test_two_products_keep_their_own_models(tmp_path):
    dark = parts(tmp_path, [plate(n) // 3 for n in range(4)], label=Label.GOOD, product="dark/er")
    both: Dataset = dataset(tmp_path, good_parts(tmp_path, 4), dark)
    fit_expert(both, SETTINGS, out=tmp_path / "expert")
    found = ExpertBackend.load(tmp_path / "expert", SETTINGS)
    light_as_dark, dark_as_dark = found.judge([query(plate(9), "dark/er"), query(plate(9) // 3, "dark/er")])
    assert isinstance(light_as_dark, Opinion)
    assert isinstance(dark_as_dark, Opinion)
    assert light_as_dark.p_defect > dark_as_dark.p_defect
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()].count("expert") == 1
