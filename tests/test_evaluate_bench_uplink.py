"""The uplink's benchmark: bytes are those of the wire, fusions are fitted to other parts, masks decide about tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

pytest.importorskip("onnx", reason="the export extra is not installed")

import cli_fakes
from cli_run import saec
from edge_parts import put
from saec.config import Settings
from saec.data.readers import read_dataset
from saec.errors import BadInput
from saec.evaluate.bench_masks import bench_masks, rank_correlation, touching, with_masks
from saec.evaluate.bench_uplink import CHOICES, Glance, bench_uplink, crossed, curve, default_ways
from saec.evaluate.report_svg import alone
from saec.types import EdgeResult, Evidence, Image, Label, Opinion, Part, Query
from saec.vlm.tokens.tower import TowerTokeniser
from tiny_tower import save_tower


class Edge:
    """Unsure of everything, with a flat map."""

    def predict(self, image: Image, product: str) -> EdgeResult:
        return EdgeResult(0.0, 0.5, 0.5, 0.0, 1.0, np.ones((4, 4), np.float32))


class Cloud:
    """Sees bright parts as defects, and of tokens only how many there are."""

    model_id = "bright"

    def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
        return [Opinion(self._p(query), Evidence(), self.model_id) for query in queries]

    def _p(self, query: Query) -> float:
        if query.tokens is not None:
            return 0.9 if len(query.tokens.indices) > 32 else 0.1
        assert query.image is not None
        return 0.9 if query.image.mean() > 128 else 0.1


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> TowerTokeniser:
    folder = save_tower(tmp_path_factory.mktemp("tower") / "tiny")
    return TowerTokeniser.load(settings(folder))


def settings(folder: Path) -> Settings:
    return Settings.model_validate({"tokens": {"model": str(folder), "passes": 2}, "edge": {"threads": 1}})


@pytest.fixture
def parts(tmp_path: Path) -> list[Part]:
    found = []
    for number in range(8):
        label = Label.DEFECT if number % 2 else Label.GOOD
        image = np.random.default_rng(number).integers(0, 100, (96, 96, 3), np.uint8) + (150 if number % 2 else 0)
        file, mask = tmp_path / f"{number}.png", tmp_path / f"{number}_mask.png"
        cv2.imwrite(str(file), image.astype(np.uint8))
        drawn = np.zeros((96, 96), np.uint8)
        drawn[:12, :24] = 255
        cv2.imwrite(str(mask), drawn)
        found.append(Part(f"p{number}", "cell", file, label, mask=mask if number % 2 else None))
    return found


def test_every_way_is_asked_over_the_wire_and_paid_for_in_bytes(tower, parts):
    ways = default_ways(Settings().tokens)
    accuracy, times = bench_uplink(Cloud(), Edge(), tower, parts, Settings(), ways)
    rows = {row["what goes up"]: row for row in accuracy.rows}
    assert len(rows) == len(ways) + 1
    assert rows["image, quality 92"]["accuracy"] == 1.0 == rows["image, quality 92"]["fused accuracy"]
    assert rows["nothing: the edge alone"]["fused AUROC"] == 0.5
    assert rows["image, quality 92"]["bytes"] > rows["image, quality 30"]["bytes"]
    tokens = [rows[f"tokens, {ratio} by dropout, 64 coordinates of 4 bits"] for ratio in ("1", "0.5", "0.25", "0.125")]
    sizes = [row["bytes"] for row in tokens]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > rows["one token, and the map"]["bytes"]
    assert [row["accuracy"] for row in tokens] == [0.5] * 4  # all called defect, or none
    assert tokens[0]["mean |ΔP| to the image"] == pytest.approx(0.4)
    assert {row["stage"] for row in times.rows} >= {"lower half", "upper half", "10 passes with dropout", "coding"}
    drawn = alone(curve(accuracy))
    assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
    assert "tokens chosen by dropout" in drawn


def test_a_part_that_is_not_answered_ends_the_benchmark_by_name(tower, parts):
    class Mute(Cloud):
        def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
            return [BadInput("no idea") for _ in queries]

    with pytest.raises(BadInput, match="no idea"):
        bench_uplink(Mute(), Edge(), tower, parts, Settings(), default_ways(Settings().tokens)[:1])


def test_parts_without_labels_are_refused(tower, parts):
    unlabelled = [Part("x", "cell", parts[0].path)]
    with pytest.raises(BadInput, match="labelled"):
        bench_uplink(Cloud(), Edge(), tower, unlabelled, Settings(), default_ways(Settings().tokens))


def test_no_part_is_judged_by_a_fusion_that_saw_its_label():
    rng = np.random.default_rng(0)
    noise, truth = rng.random((2, 40)), np.tile([True, False], 20)
    products = np.repeat(["a", "b"], 20)
    found = crossed(noise[0], noise[1], truth, products)
    flipped = truth.copy()
    flipped[:20:2] = ~flipped[:20:2]  # the labels of one half of product a
    changed = crossed(noise[0], noise[1], flipped, products)
    np.testing.assert_array_equal(found[:20:2], changed[:20:2])
    np.testing.assert_array_equal(found[20:], changed[20:])
    assert (found[1:20:2] != changed[1:20:2]).any()


def test_tokens_are_held_against_the_masks_of_the_parts_that_have_one(tower, parts):
    table = bench_masks(tower, parts, settings(Path("unused")))
    assert [row["chosen by"] for row in table.rows] == list(CHOICES)
    assert "4 parts" in table.notes[0] and "3.1%" in table.notes[0]  # two of 64 tokens lie under the corner
    parts[1].path.write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"unreadable image .*1\.png .*leave it out"):
        bench_masks(tower, parts, Settings())
    with pytest.raises(BadInput, match=r"unreadable image .*1\.png .*leave it out"):
        bench_uplink(Cloud(), Edge(), tower, parts, Settings(), default_ways(Settings().tokens)[:1])


def test_masks_that_cannot_be_told_to_be_a_parts_own_are_no_masks(tmp_path):
    for name in ("test/defect/0.png", "test/good/1.png", "train/good/2.png", "ground_truth/scratch/0_mask.png"):
        put(tmp_path / name, np.full((16, 16, 3), 9, np.uint8))
    with pytest.raises(BadInput, match=r"no masks of these parts' kinds \(defect\)"):
        with_masks(read_dataset(tmp_path))
    listed = tmp_path / "screws.csv"
    listed.write_text("path,label,mask\ntest/defect/0.png,defect,ground_truth/scratch/0_mask.png\n")
    (part,) = with_masks(read_dataset(listed))
    assert part.mask == tmp_path / "ground_truth/scratch/0_mask.png"
    (tmp_path / "ground_truth/scratch").rename(tmp_path / "ground_truth/defect")
    assert [part.part_id for part in with_masks(read_dataset(tmp_path))] == ["test/defect/0.png"]
    with pytest.raises(BadInput, match="no part has a mask"):
        with_masks(read_dataset(tmp_path / "train"))


def test_the_command_takes_the_product_that_it_asks_for(tmp_path, monkeypatch):
    cli_fakes.install(monkeypatch)
    root, station = cli_fakes.tree(tmp_path / "parts"), tmp_path / "station"
    assert saec("fit", root, "--out", station).code == 0
    call, missing = ("bench", "uplink", root, "--station", station), ("--set", f"tokens.model={tmp_path / 'none'}")
    assert "does not know" in saec(*call, "--product", "stranger").error()
    known = "bolt"
    assert "none" in saec(*call, "--product", known, *missing).error(), "the parts are taken; the tower is not there"
    assert saec(*call, "--limit", "0").code == 2
    assert "pass --station" in saec("bench", "uplink", root, "--product", known).error()


def test_who_finds_the_defect_is_told_from_who_does_not():
    cells = np.zeros(64, bool)
    cells[:8] = True
    finds, misses = np.arange(64)[::-1].astype(float), np.arange(64).astype(float)
    seen = Glance(np.zeros((64, 2), np.float32), dict.fromkeys(CHOICES, misses) | {"dropout": finds})
    found, missed = touching([(cells, seen)]).rows[:2]
    assert found["times by lot, 0.125"] == 8.0 and found["times by lot, 0.5"] == 2.0
    assert missed["times by lot, 0.5"] == 0.0
    assert found["rank correlation with length"] == pytest.approx(-1)
    assert rank_correlation(finds, finds) == pytest.approx(1)
