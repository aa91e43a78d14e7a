"""``--explain``: rejects put into words on the line's own computer, and a page that says who spoke."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest

import cli_fakes
from cli_fakes import flat, tree
from cli_run import process, saec
from route_fakes import FakeExplainer
from saec.config import Settings
from saec.evaluate.report_run import RunFolder
from saec.types import Evidence, Label, Query

MODULE = "saec.vlm.edge.explain"


def stumbles(number: int) -> None:
    if number == 2:
        raise ValueError("not the asked JSON")


class OnnxExplainer(FakeExplainer):
    """As saec.vlm.edge.explain.OnnxExplainer, without weights; it fails on its second part and is late on its third."""

    opened: ClassVar[list[OnnxExplainer]] = []
    closed = False

    def __init__(self, settings: Settings) -> None:
        super().__init__(before=stumbles)
        self.model_id = f"{settings.explain.model}@int8"
        self.opened.append(self)

    def explain(self, query: Query, *, deadline: float) -> Evidence | None:
        said = super().explain(query, deadline=deadline)
        return None if len(self.queries) == 3 else said

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    cli_fakes.install(monkeypatch)
    module = types.ModuleType(MODULE)
    module.__dict__["OnnxExplainer"] = OnnxExplainer
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr(OnnxExplainer, "opened", [])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("data") / "parts")


@pytest.fixture(scope="module")
def station(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stations") / "bolt"
    assert process("fit", root, "--out", out).code == 0
    return out


def test_a_run_without_a_cloud_explains_its_rejects_and_counts_what_could_not_be_explained(tmp_path, station):
    images = flat(tmp_path / "images", 30)
    found = saec("inspect", images, "-s", station, "-o", tmp_path / "run", "--cloud", "off", "--explain", "loupe")
    assert found.code == 0, found.err
    run = RunFolder.load(tmp_path / "run")
    rejects = [v for v in run.verdicts if v.label is Label.DEFECT]
    assert len(rejects) > 3
    assert run.summary["explained"] == {"n": len(rejects) - 2, "late": 1, "failed": 1}
    assert run.summary["time"]["explain_s"] is not None
    assert run.summary["models"]["explain"] == "loupe@int8"
    assert run.manifest["unexplained"] == 0
    assert f"{len(rejects) - 2} of {len(rejects)} rejects put into words by loupe@int8, 0.0 s each." in found.out
    assert "no explanation: ValueError: not the asked JSON" in found.out
    assert [explainer.closed for explainer in OnnxExplainer.opened] == [True]


def test_the_report_says_which_model_spoke_and_how_many_rejects_have_no_sentence(tmp_path, station):
    images = flat(tmp_path / "images", 30)
    saec("inspect", images, "-s", station, "-o", tmp_path / "run", "--explain", "loupe")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Words by loupe@int8, boxes by edge-heatmap" in page
    assert "2 rejects of" in page and "(1 too late, 1 without a usable answer)" in page
    assert "Error: no explanation: no sentence within 3 s" in page


def test_without_the_option_nobody_explains_and_no_model_is_loaded(tmp_path, station):
    saec("inspect", flat(tmp_path / "images", 9), "-s", station, "-o", tmp_path / "run")
    run = RunFolder.load(tmp_path / "run")
    assert run.summary["explained"] == {"n": 0, "late": 0, "failed": 0}
    assert run.summary["time"]["explain_s"] is None
    assert OnnxExplainer.opened == []


def test_evaluating_with_an_explainer_yields_the_same_figures_as_without(tmp_path, station, root):
    summaries = {}
    for name, options in {"plain": [], "explained": ["--explain", "loupe"]}.items():
        found = saec("evaluate", root, "-s", station, "-o", tmp_path / name, *options)
        assert found.code == 0, found.err
        summaries[name] = json.loads((tmp_path / name / "summary.json").read_text())
    for key in ("n", "accuracy", "auroc", "escape_rate", "overkill_rate", "confusion", "routing", "called"):
        assert summaries["plain"][key] == summaries["explained"][key]
    assert summaries["explained"]["explained"]["n"] > 0


def test_a_finished_run_is_neither_changed_nor_explained_again(tmp_path, station):
    command = ("inspect", flat(tmp_path / "images", 12), "-s", station, "-o", tmp_path / "run", "--explain", "loupe")
    saec(*command)
    before = (tmp_path / "run" / "predictions.jsonl").read_bytes()
    assert saec(*command).code == 0
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == before
    assert OnnxExplainer.opened[1].queries == []


def test_a_baseline_with_an_explainer_is_refused(tmp_path, station, root):
    options = ("--baseline", "qwen-zero-shot", "--explain", "loupe")
    assert "a baseline explains nothing" in saec("evaluate", root, "-s", station, "-o", tmp_path, *options).error()


def test_a_missing_extra_is_one_line(tmp_path, station, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, None)
    command = ("inspect", flat(tmp_path / "images", 3), "-s", station, "-o", tmp_path / "run", "--explain", "loupe")
    assert "pip install 'saec[vlm]'" in saec(*command).error()
    assert not (tmp_path / "run").exists()
