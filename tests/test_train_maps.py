"""Fine-tuning files carry what the edge would have said of a part that its memory does not know."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_trees import elpv
from edge_parts import blotted, plate, put
from saec.data.elpv import build_elpv
from saec.data.readers import read_dataset
from saec.data.sft import write_sft
from saec.data.verify import verify_disjoint
from saec.errors import BadInput
from saec.train.maps import MapWriter


def rows(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of ten plates, one of them unlike all others, and defects in train and calibration."""
    root = tmp_path_factory.mktemp("maps")
    for number in range(9):
        put(root / "data" / "plate" / "train" / "good" / f"{number}.png", plate(number))
    put(root / "data" / "plate" / "train" / "good" / "odd.png", blotted(77))
    for number in range(2):
        put(root / "data" / "plate" / "train" / "blot" / f"{number}.png", blotted(number))
        put(root / "data" / "plate" / "calibration" / "good" / f"{number}.png", plate(100 + number))
        put(root / "data" / "plate" / "calibration" / "blot" / f"{number}.png", blotted(50 + number))
    put(root / "data" / "plate" / "test" / "good" / "0.png", plate(200))
    writer = MapWriter(root / "sft", threads=1)
    write_sft(read_dataset(root / "data"), root / "sft", val="calibration", extras=writer)
    return root / "sft"


def worst(files: Path, row: dict[str, object]) -> float:
    heatmap = np.load(files / str(row["anomaly_map"]), allow_pickle=False)
    assert heatmap.dtype == np.float32 and heatmap.ndim == 2
    return float(heatmap.max())


def test_the_train_split_trains_the_calibration_split_validates_and_the_test_split_is_left_alone(files: Path):
    train, val = rows(files / "train.jsonl"), rows(files / "val.jsonl")
    assert {row["source_split"] for row in train} == {"train"} and len(train) == 12
    assert {row["source_split"] for row in val} == {"calibration"} and len(val) == 4


def test_a_good_part_is_seen_by_a_memory_without_it(files: Path):
    # In the memory, the odd plate would look as good as all others.
    train = rows(files / "train.jsonl")
    good = {str(row["part_id"]): worst(files, row) for row in train if row["label"] == 0}
    odd = next(heat for name, heat in good.items() if "odd" in name)
    assert odd == max(good.values()) and odd > 1.2 * np.median(list(good.values()))


def test_defects_stand_out_and_carry_evidence_and_held_out_ones_none(files: Path):
    train, val = rows(files / "train.jsonl"), rows(files / "val.jsonl")
    usual = np.median([worst(files, row) for row in train if row["label"] == 0])
    for row in train:
        assert ("evidence" in row) == (row["label"] == 1)
        if row["label"] == 1:
            told = json.loads(str(row["evidence"]))
            assert told["bboxes"] and told["desc"].endswith(".") and worst(files, row) > 1.1 * usual
    assert all("evidence" not in row and "anomaly_map" in row for row in val)


def test_another_set_is_refused_before_its_maps_are_overwritten(files: Path, tmp_path: Path):
    for number in range(2):
        put(tmp_path / "data" / "plate" / "train" / "good" / f"{number}.png", plate(300 + number))
    put(tmp_path / "data" / "plate" / "calibration" / "good" / "0.png", plate(310))
    before = {path.name for path in (files / "maps").iterdir()}
    with pytest.raises(BadInput, match="another fine-tuning set"):
        write_sft(read_dataset(tmp_path / "data"), files, val="calibration", extras=MapWriter(files, threads=1))
    assert {path.name for path in (files / "maps").iterdir()} == before


def test_one_good_part_makes_no_map_of_itself(tmp_path: Path):
    put(tmp_path / "data" / "plate" / "train" / "good" / "0.png", plate(0))
    put(tmp_path / "data" / "plate" / "calibration" / "good" / "0.png", plate(1))
    with pytest.raises(BadInput, match="two good training parts that differ: product plate"):
        write_sft(read_dataset(tmp_path / "data"), tmp_path / "sft", val="calibration", extras=MapWriter(tmp_path))


def test_uncertain_cells_train_with_their_probability_and_stay_away_from_what_is_held_out(tmp_path: Path):
    source = elpv(tmp_path / "package")
    plain = build_elpv(tmp_path / "plain", source=source)
    more = build_elpv(tmp_path / "more", source=source, uncertain="train")
    certain = {entry.sha256: entry.split for entry in plain.entries}
    assert {entry.sha256: entry.split for entry in more.entries if entry.sha256 in certain} == certain
    added = [entry for entry in more.entries if entry.sha256 not in certain]
    assert added and {(entry.split, entry.kind) for entry in added} == {("train", "uncertain")}
    verify_disjoint([tmp_path / "more"]).require_disjoint()
    write_sft(read_dataset(tmp_path / "more"), tmp_path / "sft", val="calibration")
    stated = {row["p_defect"] for row in rows(tmp_path / "sft" / "train.jsonl") if "p_defect" in row}
    assert sorted(stated) == pytest.approx([1 / 3, 2 / 3])
    with pytest.raises(BadInput, match="uncertain"):
        build_elpv(tmp_path / "no", source=source, labels="all", uncertain="train")
