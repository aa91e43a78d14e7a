"""Every layout becomes the same kind of data set: products, labels, splits and masks where the source knows them."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_trees import ksdd, ksdd2, mvtec, put
from saec.data.dataset import make_dataset, natural_key
from saec.data.readers import read_dataset
from saec.errors import BadInput
from saec.types import Label, Part

GOOD, DEFECT = Label.GOOD, Label.DEFECT


def shape(dataset: object) -> dict[tuple[str, str | None, Label | None], int]:
    return dict(Counter((part.product, part.split, part.label) for part in dataset))  # type: ignore[attr-defined]


def test_an_mvtec_tree_of_products_keeps_their_names_kinds_and_masks(tmp_path: Path) -> None:
    dataset = read_dataset(mvtec(tmp_path / "mvtec_ad"))
    assert dataset.name == "mvtec_ad"
    assert dataset.products == ("bolt", "nut")
    assert dataset.splits == ("train", "test")
    for product in dataset.products:
        assert len(dataset.select(product=product, split="train", label=GOOD)) == 6
        assert len(dataset.select(product=product, split="test", label=GOOD)) == 4
        assert len(dataset.select(product=product, split="test", label=DEFECT)) == 8
    part = next(part for part in dataset if part.part_id == "nut/test/stain/002.png")
    assert part.kind == "stain"
    assert part.mask == tmp_path / "mvtec_ad/nut/ground_truth/stain/002_mask.png"
    assert all(part.mask is None for part in dataset.select(label=GOOD))


def test_one_product_is_named_by_its_folder(tmp_path: Path) -> None:
    dataset = read_dataset(mvtec(tmp_path) / "bolt")
    assert dataset.products == ("bolt",)
    assert dataset[0].part_id == "test/crack/000.png"


def test_a_calibration_split_and_other_words_for_good_and_defect_are_understood(tmp_path: Path) -> None:
    for i, folder in enumerate(("train/normal", "train/OK", "calibration/ok", "calib/ng", "val/anomaly", "test/bad")):
        put(tmp_path / "board" / folder / "x.jpg", i)
    assert shape(read_dataset(tmp_path / "board")) == {
        ("board", "train", GOOD): 2,
        ("board", "calibration", GOOD): 1,
        ("board", "calibration", DEFECT): 1,
        ("board", "test", DEFECT): 2,
    }


def test_the_product_may_lie_above_or_below_the_split(tmp_path: Path) -> None:
    put(tmp_path / "lines/test/mono/good/1.png", 1)
    put(tmp_path / "lines/test/mono/crack/1.png", 2)
    put(tmp_path / "lines/poly/train/good/1.png", 3)
    put(tmp_path / "lines/poly/test/scratch/1.png", 4)
    assert shape(read_dataset(tmp_path / "lines")) == {
        ("mono", "test", GOOD): 1,
        ("mono", "test", DEFECT): 1,
        ("poly", "train", GOOD): 1,
        ("poly", "test", DEFECT): 1,
    }


def test_images_right_inside_a_split_have_no_label(tmp_path: Path) -> None:
    put(tmp_path / "cups/train/good/1.png", 1)
    put(tmp_path / "cups/test/1.png", 2)
    assert shape(read_dataset(tmp_path / "cups")) == {("cups", "train", GOOD): 1, ("cups", "test", None): 1}


def test_good_and_defect_folders_need_no_split(tmp_path: Path) -> None:
    put(tmp_path / "caps/good/1.png", 1)
    put(tmp_path / "caps/defect/2.png", 2)
    assert shape(read_dataset(tmp_path / "caps")) == {("caps", None, GOOD): 1, ("caps", None, DEFECT): 1}
    put(tmp_path / "many/caps/good/1.png", 1)
    put(tmp_path / "many/lids/dent/2.png", 2)
    put(tmp_path / "many/lids/good/2.png", 3)
    assert shape(read_dataset(tmp_path / "many")) == {
        ("caps", None, GOOD): 1,
        ("lids", None, DEFECT): 1,
        ("lids", None, GOOD): 1,
    }


def test_the_test_folder_of_a_product_can_be_read_by_itself(tmp_path: Path) -> None:
    dataset = read_dataset(mvtec(tmp_path) / "bolt" / "test")
    assert shape(dataset) == {("bolt", None, DEFECT): 8, ("bolt", None, GOOD): 4}
    assert {part.kind for part in dataset} == {"good", "crack", "stain"}


def test_a_folder_of_only_images_is_one_product_without_labels(tmp_path: Path) -> None:
    for name in ("10.png", "9.jpeg", "deep/er/1.TIF", "notes.txt", ".hidden.png", ".cache/2.png"):
        put(tmp_path / "shift" / name, 1) if not name.endswith("txt") else (tmp_path / "shift/notes.txt").write_text("")
    dataset = read_dataset(tmp_path / "shift")
    assert [part.part_id for part in dataset] == ["9.jpeg", "10.png", "deep/er/1.TIF"]
    assert shape(dataset) == {("shift", None, None): 3}


def test_kolektorsdd_labels_come_from_its_masks(tmp_path: Path) -> None:
    dataset = read_dataset(ksdd(tmp_path / "K"))
    assert shape(dataset) == {("KolektorSDD", None, GOOD): 24, ("KolektorSDD", None, DEFECT): 8}
    assert next(part for part in dataset if part.label is DEFECT).mask == tmp_path / "K/kos01/Part1_label.bmp"
    (tmp_path / "K/kos01/Part2_label.bmp").unlink()
    assert sum(part.label is None for part in read_dataset(tmp_path / "K")) == 1


def test_kolektorsdd2_labels_come_from_its_masks(tmp_path: Path) -> None:
    assert shape(read_dataset(ksdd2(tmp_path))) == {
        ("KolektorSDD2", "train", GOOD): 12,
        ("KolektorSDD2", "train", DEFECT): 2,
        ("KolektorSDD2", "test", GOOD): 6,
        ("KolektorSDD2", "test", DEFECT): 2,
    }


def test_a_damaged_mask_is_named(tmp_path: Path) -> None:
    ksdd2(tmp_path)
    (tmp_path / "train/10003_GT.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"unreadable mask \(file is empty\).*10003_GT"):
        read_dataset(tmp_path)


def test_a_csv_names_paths_relative_to_itself(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / f"img/{i}.png", i)
    file = tmp_path / "parts.csv"
    file.write_text(
        "\ufeffPath, Label, product, split, mask, operator\n"
        "img/0.png, ok, cap, train,, ann\nimg/1.png, 1, cap, test, img/m.png\n"
        "img/2.png,, lid\nimg/9.png,good,lid,val\n",
        encoding="utf-8",
    )
    dataset = read_dataset(file)
    assert dataset.parts == (
        Part("img/0.png", "cap", tmp_path / "img/0.png", GOOD, "train"),
        Part("img/1.png", "cap", tmp_path / "img/1.png", DEFECT, "test", None, tmp_path / "img/m.png"),
        Part("img/2.png", "lid", tmp_path / "img/2.png"),
        Part("img/9.png", "lid", tmp_path / "img/9.png", GOOD, "test"),  # gone: the run records it as unreadable
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "path,label"),
        ("file,verdict\na.png,good\n", "path,label"),
        ("path,label\n", "no images found"),
        ("path,label\n,good\n", "no path in this line.*line 2"),
        ("path,label\na.png,good\na.png,great\n", "unknown label 'great'.*line 3"),
        ("path,label,split\na.png,good,dev\n", "unknown split 'dev'"),
        ("path,label\na.png,good\na.png,good\n", "'a.png' is listed twice"),
        ("path,label\nb.png,good\n", "none of the listed images exists"),
        ("path,label\n\xff", "cannot read the CSV file"),
    ],
)
def test_a_faulty_csv_is_refused_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    put(tmp_path / "a.png", 1)
    (tmp_path / "parts.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match=message) as error:
        read_dataset(tmp_path / "parts.csv")
    assert "parts.csv" in str(error.value) or str(tmp_path) in str(error.value)


def test_what_cannot_be_read_as_data_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.txt").write_text("nothing here")
    (tmp_path / "one.png").write_bytes(b"")
    cases = {
        "no images found": lambda: read_dataset(tmp_path / "empty"),
        "no such file or folder": lambda: read_dataset(tmp_path / "gone"),
        "not a folder": lambda: read_dataset(tmp_path / "one.png"),
        "is a folder, not a CSV": lambda: read_dataset(tmp_path, kind="csv"),
        "not the mvtec layout": lambda: read_dataset(tmp_path, kind="mvtec"),
        "not the ksdd2 layout": lambda: read_dataset(tmp_path, kind="ksdd2"),
        "unknown data layout": lambda: read_dataset(tmp_path, kind="coco"),  # type: ignore[arg-type]
        "cannot read the manifest": lambda: read_dataset(tmp_path, kind="manifest"),
    }
    for message, call in cases.items():
        with pytest.raises(BadInput, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_product_without_good_images_is_named(tmp_path: Path) -> None:
    mvtec(tmp_path)
    for file in (tmp_path / "nut/train/good").iterdir():
        file.unlink()
    dataset = read_dataset(tmp_path)
    with pytest.raises(BadInput, match=r"product 'nut' has no good images in its train split"):
        dataset.require_good()
    dataset.select(product="bolt").require_good()


def test_links_are_followed_once_and_a_dangling_one_stays_a_part(tmp_path: Path) -> None:
    root = tmp_path / "set"
    put(tmp_path / "store/1.png", 1)
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "store")
    (root / "again").symlink_to(tmp_path / "store")
    (root / "round").symlink_to(root)
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert [part.part_id for part in read_dataset(root)] == ["again/1.png", "gone.png"]


@given(st.lists(st.text("a10._/é", min_size=1, max_size=6), unique=True))
def test_the_order_of_parts_does_not_depend_on_how_they_were_found(names: list[str]) -> None:
    parts = [Part(name, "p", Path(name)) for name in names]
    if not parts:
        return
    shuffled = random.Random(0).sample(parts, len(parts))
    assert make_dataset("x", Path(), parts).parts == make_dataset("x", Path(), shuffled).parts


def test_numbers_in_names_sort_by_value() -> None:
    assert sorted(["a10", "a9", "a", "b1", "10", "9", "a09"], key=natural_key) == [
        "9", "10", "a", "a09", "a9", "a10", "b1",
    ]  # fmt: skip


SHARED = os.environ.get("SAEC_SHARED_DATA")


@pytest.mark.skipif(not SHARED, reason="SAEC_SHARED_DATA is not set")
def test_the_real_sets_have_the_published_counts() -> None:
    root = Path(str(SHARED))
    assert shape(read_dataset(root / "mvtec_ad")) == {
        ("bottle", "train", GOOD): 209,
        ("bottle", "test", GOOD): 20,
        ("bottle", "test", DEFECT): 63,
        ("screw", "train", GOOD): 320,
        ("screw", "test", GOOD): 41,
        ("screw", "test", DEFECT): 119,
    }
    assert shape(read_dataset(root / "KolektorSDD")) == {
        ("KolektorSDD", None, GOOD): 347,
        ("KolektorSDD", None, DEFECT): 52,
    }
    assert set(shape(read_dataset(root / "circuit_board")).values()) == {20}


def test_uint8_masks_of_any_value_count_as_defect(tmp_path: Path) -> None:
    put(tmp_path / "kos01/Part0.jpg", 1)
    put(tmp_path / "kos01/Part0_label.bmp", np.pad(np.ones((1, 1), np.uint8), 5))
    assert read_dataset(tmp_path)[0].label is DEFECT
