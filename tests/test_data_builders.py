"""What is built is leak-proof, reproducible, all there or not there at all, and says what it left out."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_trees import elpv, ksdd, ksdd2, mvtec, picture, put
from saec.data import assemble as assembly
from saec.data.builders import build_folder, build_ksdd, build_ksdd2, build_mvtec_holdout
from saec.data.elpv import build_elpv
from saec.data.hashing import fingerprint_image
from saec.data.manifest import load_manifest, verify_manifest
from saec.data.readers import read_dataset
from saec.data.sft import write_sft
from saec.data.splitting import GroupedPart, Shares, split_by_content
from saec.data.verify import content_hashes, verify_disjoint
from saec.errors import BadInput
from saec.types import Label, Part


def tree(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def test_a_holdout_is_drawn_by_seed_from_test_images_only(tmp_path: Path) -> None:
    src = mvtec(tmp_path / "src")
    manifest = build_mvtec_holdout(src, tmp_path / "a", n_good=5, n_defect=6)
    assert len(list((tmp_path / "a/val/good").iterdir())) == 5
    assert len(list((tmp_path / "a/val/defect").iterdir())) == 6
    assert all("/test/" in entry.source for entry in manifest.entries)
    assert not verify_manifest(tmp_path / "a")
    build_mvtec_holdout(src, tmp_path / "b", n_good=5, n_defect=6)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    other = build_mvtec_holdout(src, tmp_path / "c", n_good=5, n_defect=6, seed=1)
    assert [entry.source for entry in other.entries] != [entry.source for entry in manifest.entries]


def test_a_built_holdout_reads_back_with_products_kinds_and_masks(tmp_path: Path) -> None:
    build_mvtec_holdout(mvtec(tmp_path / "src"), tmp_path / "out", n_good=8, n_defect=16)
    dataset = read_dataset(tmp_path / "out")
    assert dataset.products == ("bolt", "nut")
    assert {part.kind for part in dataset} == {"good", "crack", "stain"}
    assert all(part.mask is not None and part.mask.is_file() for part in dataset.select(label=Label.DEFECT))
    (tmp_path / "out/val/good/stray.png").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"stray\.png is not in the folder's manifest"):
        read_dataset(tmp_path / "out")


def test_fewer_images_than_asked_for_are_taken_and_noted(tmp_path: Path) -> None:
    manifest = build_mvtec_holdout(mvtec(tmp_path / "src"), tmp_path / "out")
    assert manifest.notes == ("good: 8 of 500 images asked for", "defect: 16 of 500 images asked for")
    assert len(manifest.entries) == 24


def test_test_images_that_repeat_a_training_image_never_enter_the_holdout(tmp_path: Path) -> None:
    src = mvtec(tmp_path / "src")
    shutil.copy(src / "bolt/train/good/000.png", src / "nut/test/good/000.png")  # the same file, another product
    cv2.imwrite(str(src / "bolt/test/crack/000.png"), cv2.add(cv2.imread(str(src / "nut/train/good/003.png")), 7))
    manifest = build_mvtec_holdout(src, tmp_path / "out")
    sources = {entry.source for entry in manifest.entries}
    assert not sources & {"nut/test/good/000.png", "bolt/test/crack/000.png"}
    assert manifest.notes[0].startswith("2 images left out")
    verify_disjoint([tmp_path / "out", src / "bolt/train", src / "nut/train"]).require_disjoint()


def test_what_was_fine_tuned_on_is_excluded_from_the_holdout(tmp_path: Path) -> None:
    src = mvtec(tmp_path / "src")
    files = write_sft(read_dataset(src), tmp_path / "sft")
    for number, exclude in enumerate((files.exclusion, files.train)):
        out = tmp_path / f"out{number}"
        manifest = build_mvtec_holdout(src, out, exclude=[exclude])
        assert sum(entry.label is Label.DEFECT for entry in manifest.entries) == 8
        assert not {entry.sha256 for entry in manifest.entries} & content_hashes([files.train])
    without = build_mvtec_holdout(src, tmp_path / "second", exclude=[tmp_path / "out0"], n_good=0, n_defect=8)
    assert not {entry.sha256 for entry in without.entries} & content_hashes([tmp_path / "out0/manifest.json"])


def test_a_holdout_needs_test_images(tmp_path: Path) -> None:
    put(tmp_path / "src/train/good/1.png", 1)
    with pytest.raises(BadInput, match="no test split"):
        build_mvtec_holdout(tmp_path / "src", tmp_path / "out")
    put(tmp_path / "src/test/good/1.png", 2)
    with pytest.raises(BadInput, match="no images of one label"):
        build_mvtec_holdout(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ksdd2_is_balanced_and_leaves_the_other_good_parts_to_train_on(tmp_path: Path) -> None:
    src = ksdd2(tmp_path / "src")
    manifest = build_ksdd2(src, tmp_path / "out", with_train=True)
    assert manifest.counts() == {"KolektorSDD2": {"test": {"defect": 4, "good": 4}, "train": {"good": 14}}}
    assert len(list((tmp_path / "out/val/defect").iterdir())) == 4
    verify_disjoint([tmp_path / "out"]).require_disjoint()
    assert build_ksdd2(src, tmp_path / "plain").counts() == {"KolektorSDD2": {"test": {"defect": 4, "good": 4}}}


def test_ksdd2_can_be_linked_instead_of_copied(tmp_path: Path) -> None:
    build_ksdd2(ksdd2(tmp_path / "src"), tmp_path / "out", mode="symlink")
    images = [part.path for part in read_dataset(tmp_path / "out")]
    assert all(path.is_symlink() and path.is_file() for path in images)
    assert not verify_manifest(tmp_path / "out")


def test_another_layout_is_not_taken_for_kolektorsdd2(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not the ksdd2 layout"):
        build_ksdd2(mvtec(tmp_path / "src"), tmp_path / "out")


def test_ksdd_keeps_an_item_and_every_item_that_repeats_it_in_one_split(tmp_path: Path) -> None:
    src = ksdd(tmp_path / "src", items=12)
    for part in range(4):
        shutil.copy(src / f"kos01/Part{part}.jpg", src / f"kos09/Part{part}.jpg")
        shutil.copy(src / f"kos01/Part{part}_label.bmp", src / f"kos09/Part{part}_label.bmp")
    manifest = build_ksdd(src, tmp_path / "out")
    split_of = {}
    for entry in manifest.entries:
        split_of.setdefault(entry.source.split("/")[0], set()).add(entry.split)
    assert all(len(splits) == 1 for splits in split_of.values())
    assert split_of["kos01"] == split_of["kos09"]
    assert set(manifest.counts()["KolektorSDD"]) == {"train", "calibration", "test"}
    assert all(entry.label is Label.GOOD for entry in manifest.entries if entry.split == "train")
    training_items = sum(splits == {"train"} for splits in split_of.values())
    assert manifest.notes == (f"{training_items} defects left out: their items are used for training",)


def test_ksdd_by_content_uses_every_defect(tmp_path: Path) -> None:
    manifest = build_ksdd(ksdd(tmp_path / "src"), tmp_path / "out", unit="content")
    assert sum(entry.label is Label.DEFECT for entry in manifest.entries) == 8
    verify_disjoint([tmp_path / "out"]).require_disjoint()


def test_any_labelled_folder_becomes_train_calibration_and_test(tmp_path: Path) -> None:
    src = tmp_path / "caps"
    for i in range(20):
        put(src / "good" / f"{i}.png", i)
    for i in range(10):
        put(src / "dent" / f"{i}.png", 100 + i)
    manifest = build_folder(src, tmp_path / "out")
    assert manifest.counts() == {
        "caps": {"train": {"good": 10}, "calibration": {"good": 4, "defect": 4}, "test": {"good": 6, "defect": 6}}
    }
    assert (tmp_path / "out/caps/test/dent").is_dir()
    read = read_dataset(tmp_path / "out", kind="mvtec")  # the layout speaks for itself, too
    assert {(p.part_id, p.product, p.split, p.label) for p in read} == {
        (e.path, e.product, e.split, e.label) for e in manifest.entries
    }


def test_unlabelled_images_or_a_product_without_good_ones_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "plain/1.png", 1)
    with pytest.raises(BadInput, match=r"1\.png has no label"):
        build_folder(tmp_path / "plain", tmp_path / "out")
    put(tmp_path / "lots/cap/good/1.png", 1)
    put(tmp_path / "lots/lid/defect/1.png", 2)
    with pytest.raises(BadInput, match="product 'lid' has no good images"):
        build_folder(tmp_path / "lots", tmp_path / "out")


def test_an_unreadable_image_stops_a_build_before_anything_is_written(tmp_path: Path) -> None:
    src = mvtec(tmp_path / "src")
    file = src / "bolt/test/good/001.png"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadInput, match=r"unreadable image \(truncated PNG.*001\.png"):
        build_folder(src, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_repeating_a_build_is_a_no_op_and_another_set_is_refused(tmp_path: Path) -> None:
    src, out = mvtec(tmp_path / "src"), tmp_path / "out"
    build_folder(src, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    build_folder(src, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(BadInput, match="holds another data set"):
        build_folder(src, out, seed=3)
    next(out.rglob("*.png")).unlink()
    with pytest.raises(BadInput, match="is gone"):
        build_folder(src, out)


def test_a_folder_with_other_things_in_it_is_not_touched(tmp_path: Path) -> None:
    src, out = mvtec(tmp_path / "src"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(BadInput, match="not empty"):
        build_folder(src, out)
    assert tree(out) == {"thesis.txt": b"precious"}
    with pytest.raises(BadInput, match="inside its source"):
        build_folder(src, src / "built")
    with pytest.raises(BadInput, match="is a file"):
        build_folder(src, out / "thesis.txt")
    (out / "thesis.txt").unlink()
    build_folder(src, out)  # an empty folder is fine


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = mvtec(tmp_path / "src")
    copied = []

    def full(source: Path, target: Path) -> None:
        if len(copied) == 5:
            raise OSError(28, "No space left on device")
        copied.append(target)

    monkeypatch.setattr(assembly.shutil, "copyfile", full)
    with pytest.raises(BadInput, match=r"cannot write the data set.*No space left"):
        build_folder(src, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_elpv_has_two_products_and_defects_to_train_on(tmp_path: Path) -> None:
    source = elpv(tmp_path / "package")
    manifest = build_elpv(tmp_path / "out", source=source)
    counts = manifest.counts()
    assert set(counts) == {"mono", "poly"}
    for product in counts.values():
        assert product["train"] == {"good": 8, "defect": 2}  # half of 15, 0.4 of 5
        assert product["calibration"] == {"good": 3, "defect": 1}
        assert product["test"] == {"good": 4, "defect": 2}
    assert {entry.probability for entry in manifest.entries} == {0.0, 1.0}
    assert read_dataset(tmp_path / "out").splits == ("train", "calibration", "test")
    verify_disjoint([tmp_path / "out"]).require_disjoint()


def test_elpv_with_all_labels_keeps_the_experts_probability(tmp_path: Path) -> None:
    manifest = build_elpv(tmp_path / "out", labels="all", source=elpv(tmp_path / "package"))
    assert len(manifest.entries) == 60
    assert all((entry.label is Label.DEFECT) == (entry.probability >= 0.5) for entry in manifest.entries)
    assert load_manifest(tmp_path / "out") == manifest


def test_elpv_test_parts_can_be_capped_without_changing_the_rest(tmp_path: Path) -> None:
    source = elpv(tmp_path / "package", cells=60)
    whole = build_elpv(tmp_path / "whole", source=source)
    capped = build_elpv(tmp_path / "capped", limit=6, source=source)
    assert capped.counts()["mono"]["test"] == {"good": 4, "defect": 2}
    assert set(capped.entries) < set(whole.entries)
    assert [e for e in capped.entries if e.split != "test"] == [e for e in whole.entries if e.split != "test"]


def test_without_the_elpv_package_the_user_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r'pip install "saec\[elpv\]"'):
        build_elpv(tmp_path / "out")


def test_a_damaged_elpv_package_is_refused(tmp_path: Path) -> None:
    source = elpv(tmp_path / "package")
    (source / "labels.csv").write_text("images/cell0001.png 1.0\n")
    with pytest.raises(BadInput, match="cannot read the labels"):
        build_elpv(tmp_path / "out", source=source)


@pytest.mark.parametrize("values", [(0, 0.2, 0.4), (0.7, 0.3, 0.4), (0.5, -0.1, 0.4), (0.5, 0.2, 1.0)])
def test_shares_that_leave_a_split_empty_are_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(BadInput, match="bad share"):
        Shares(*values)


@given(
    st.lists(st.tuples(st.integers(0, 12), st.booleans(), st.sampled_from("ab")), min_size=1, max_size=60),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=60)
def test_a_split_keeps_groups_whole_trains_on_good_only_and_keeps_products_apart(
    rows: list[tuple[int, bool, str]], seed: int
) -> None:
    blank = fingerprint_image("0" * 64, picture(0))
    parts = [
        GroupedPart(
            Part(str(i), product, Path(str(i)), Label.GOOD if good else Label.DEFECT), blank, f"{product}{group}"
        )
        for i, (group, good, product) in enumerate(rows)
    ]
    splits = split_by_content(parts, Shares(), seed=seed)
    assert splits.keys() == {one.part.part_id for one in parts}
    by_group: dict[str, set[str]] = {}
    for one in parts:
        by_group.setdefault(one.group, set()).add(splits[one.part.part_id])
        assert one.part.label is Label.GOOD or splits[one.part.part_id] != "train"
    assert all(len(found) == 1 for found in by_group.values())
    only_a = [one for one in parts if one.part.product == "a"]
    alone = split_by_content(only_a, Shares(), seed=seed)
    assert alone == {one.part.part_id: splits[one.part.part_id] for one in only_a}


def test_sft_files_share_one_schema_and_never_share_content(tmp_path: Path) -> None:
    src = mvtec(tmp_path / "src")
    shutil.copy(src / "bolt/train/good/001.png", src / "bolt/test/good/001.png")
    cv2.imwrite(str(src / "nut/test/stain/003.png"), cv2.add(cv2.imread(str(src / "nut/test/stain/002.png")), 6))
    files = write_sft(read_dataset(src), tmp_path / "sft", defect_train_ratio=0.5)
    train, val = ([json.loads(line) for line in file.read_text().splitlines()] for file in (files.train, files.val))
    assert (len(train), len(val)) == (files.n_train, files.n_val)
    assert len(train) + len(val) == 36
    assert {tuple(row) for row in train + val} == {tuple(train[0])}
    assert not {row["group"] for row in train} & {row["group"] for row in val}
    assert sum(row["label"] for row in train) in (8, 9)  # half of 16; a group may tip it by one
    assert all(row["label"] == 0 for row in train if row["source_split"] == "train")
    assert "bolt/test/good/001.png" in {row["part_id"] for row in train}
    for row in train + val:
        assert row["answer"] == str(row["label"])
        assert (files.train.parent / row["image"]).resolve() == (src / row["part_id"]).resolve()
    assert content_hashes([files.exclusion]) == {row["sha256"] for row in train}


def test_sft_is_reproducible_and_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    dataset = read_dataset(mvtec(tmp_path / "src"))
    write_sft(dataset, tmp_path / "sft")
    before = tree(tmp_path / "sft")
    write_sft(dataset, tmp_path / "sft")
    assert tree(tmp_path / "sft") == before
    with pytest.raises(BadInput, match="another fine-tuning set"):
        write_sft(dataset, tmp_path / "sft", seed=1)
    with pytest.raises(BadInput, match="bad share"):
        write_sft(dataset, tmp_path / "x", defect_train_ratio=1.5)
    with pytest.raises(BadInput, match="no test defects train"):
        write_sft(dataset, tmp_path / "x", defect_train_ratio=0.5, val="calibration")
    with pytest.raises(BadInput, match="no train and test splits"):
        write_sft(dataset.select(split="test"), tmp_path / "x")
    unlabelled = replace(dataset, parts=(*dataset.parts[:-1], replace(dataset.parts[-1], label=None)))
    with pytest.raises(BadInput, match="without a label"):
        write_sft(unlabelled, tmp_path / "x")
    assert not (tmp_path / "x").exists()
