"""Overlaps between splits are found and named; a changed data set does not pass for the built one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import pytest

from data_trees import mvtec, put
from saec.data.builders import build_folder
from saec.data.hashing import sha256_file
from saec.data.manifest import Manifest, Tampering, load_manifest, verify_manifest, write_atomic
from saec.data.readers import read_dataset
from saec.data.verify import Overlap, content_hashes, refuse_overlap, verify_disjoint
from saec.errors import BadInput


@pytest.fixture
def built(tmp_path: Path) -> Path:
    build_folder(mvtec(tmp_path / "src", products=("bolt",)), tmp_path / "built")
    return tmp_path / "built"


def test_the_splits_of_a_built_folder_are_proven_disjoint(built: Path) -> None:
    for source in (built, built / "manifest.json"):
        report = verify_disjoint([source])
        assert report.disjoint
        assert [images for _, images in report.sets] == [5, 5, 8]
        report.require_disjoint()


def test_identical_and_nearly_identical_images_in_two_folders_are_listed_with_both_paths(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for i in range(5):
        put(a / f"{i}.png", i)
        put(b / f"{i}.png", 10 + i)
    assert verify_disjoint([a, b]).disjoint
    shutil.copy(a / "1.png", b / "same.png")
    cv2.imwrite(str(b / "near.jpg"), cv2.imread(str(a / "2.png")), [cv2.IMWRITE_JPEG_QUALITY, 92])
    report = verify_disjoint([a, b])
    assert report.overlaps == (
        Overlap(str(a / "1.png"), str(b / "same.png"), near=False),
        Overlap(str(a / "2.png"), str(b / "near.jpg"), near=True),
    )
    with pytest.raises(BadInput, match=r"2 overlaps; the first is the same image twice.*a/1\.png and .*b/same\.png"):
        report.require_disjoint()


def test_an_overlap_between_the_splits_of_one_folder_is_found(tmp_path: Path) -> None:
    src = mvtec(tmp_path / "src")
    shutil.copy(src / "bolt/train/good/000.png", src / "bolt/test/crack/000.png")
    report = verify_disjoint([src])
    assert [(Path(o.left).parts[-3:], o.near) for o in report.overlaps] == [(("train", "good", "000.png"), False)]


def test_a_manifest_is_not_believed_about_contents(built: Path) -> None:
    train, test = sorted(built.glob("bolt/train/good/*"))[0], sorted(built.glob("bolt/test/good/*"))[0]
    shutil.copy(train, test)
    assert not verify_disjoint([built]).disjoint


def test_equal_empty_masks_are_no_overlap(tmp_path: Path) -> None:
    put(tmp_path / "a/kos01/Part0.jpg", 1)
    put(tmp_path / "b/kos02/Part0.jpg", 2)
    for folder in ("a/kos01", "b/kos02"):
        cv2.imwrite(str(tmp_path / folder / "Part0_label.bmp"), cv2.imread(str(tmp_path / "a/kos01/Part0.jpg")) * 0)
    assert verify_disjoint([tmp_path / "a", tmp_path / "b"]).disjoint


def test_unreadable_files_are_compared_by_their_bytes_and_named(tmp_path: Path) -> None:
    for folder in "ab":
        put(tmp_path / folder / "1.png", ord(folder))
        (tmp_path / folder / "broken.png").write_bytes(b"the same damage")
    report = verify_disjoint([tmp_path / "a", tmp_path / "b"])
    assert [overlap.near for overlap in report.overlaps] == [False]
    assert report.unreadable == (str(tmp_path / "a/broken.png"), str(tmp_path / "b/broken.png"))


def test_one_set_alone_cannot_be_compared(tmp_path: Path) -> None:
    put(tmp_path / "a/1.png", 1)
    with pytest.raises(BadInput, match="only one set"):
        verify_disjoint([tmp_path / "a"])


def test_evaluating_on_training_images_is_refused(built: Path) -> None:
    dataset = read_dataset(built)
    known = [sha256_file(part.path) for part in dataset.select(split="train")]
    refuse_overlap(known, dataset.select(split="test"))
    with pytest.raises(BadInput, match=r"5 images were also used for training; the first: .*train"):
        refuse_overlap(known, dataset)


def test_an_unreadable_part_does_not_stop_the_overlap_check(tmp_path: Path) -> None:
    put(tmp_path / "1.png", 1)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    refuse_overlap({"0" * 64}, read_dataset(tmp_path))


def test_content_hashes_come_from_any_list_or_folder(built: Path, tmp_path: Path) -> None:
    expected = {entry.sha256 for entry in load_manifest(built).entries}
    sums = tmp_path / "sums.txt"
    sums.write_text("".join(f"{sha256.upper()}  some/path.png\n\n" for sha256 in expected))
    assert content_hashes([built]) == content_hashes([built / "manifest.json"]) == content_hashes([sums]) == expected
    for text in ("no hash\n", '{"image": "x.png"}\n', "{broken\n"):
        sums.write_text(text)
        with pytest.raises(BadInput, match=r"no SHA-256 in this line.*line 1"):
            content_hashes([sums])
    with pytest.raises(BadInput, match="cannot read the exclusion list"):
        content_hashes([tmp_path / "gone.txt"])


def test_changed_missing_and_added_images_are_told_apart(built: Path) -> None:
    assert verify_manifest(built) == Tampering()
    first, second = sorted(built.glob("bolt/train/good/*"))[:2]
    put(first, 777)
    second.unlink()
    put(built / "bolt/train/good/new.png", 778)
    tampering = verify_manifest(built)
    assert tampering
    assert tampering.changed == (first.relative_to(built).as_posix(),)
    assert tampering.missing == (second.relative_to(built).as_posix(),)
    assert tampering.added == ("bolt/train/good/new.png",)


def test_a_manifest_survives_a_round_trip_and_holds_no_absolute_path(built: Path, tmp_path: Path) -> None:
    manifest = load_manifest(built)
    manifest.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (built / "manifest.json").read_bytes()
    assert str(tmp_path) not in (built / "manifest.json").read_text()
    empty = Manifest("x", "folder", 0, ())
    empty.write(tmp_path / "empty.json")
    assert load_manifest(tmp_path / "empty.json") == empty


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "saec-data/9"}, "another version"),
        ({"format": "coco"}, "not a manifest"),
        ({"images": [{"path": "x"}]}, "damaged manifest"),
        ({"seed": "many"}, "damaged manifest"),
        ({"images": 3}, "damaged manifest"),
    ],
)
def test_a_damaged_manifest_is_refused(built: Path, change: dict[str, object], message: str) -> None:
    file = built / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BadInput, match=message):
        read_dataset(built)


@pytest.mark.parametrize("path", ["../outside.png", "/etc/passwd", "a/../../b.png"])
def test_a_manifest_cannot_point_outside_its_folder(built: Path, path: str) -> None:
    file = built / "manifest.json"
    tree = json.loads(file.read_text())
    tree["images"][0]["path"] = path
    file.write_text(json.dumps(tree))
    with pytest.raises(BadInput, match="leads out of the folder"):
        load_manifest(built)


def test_a_cut_manifest_is_refused(built: Path) -> None:
    file = built / "manifest.json"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(BadInput, match="not JSON"):
        load_manifest(built)


def test_an_atomic_write_keeps_the_old_text_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    write_atomic(file, "old")

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saec.data.manifest.os.fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_atomic(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert file.read_text() == "old"
