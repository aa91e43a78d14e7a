"""``saec demo``: four ways over the same parts with the cloud as a real process, taken up again, compared."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

import cli_fakes
from cli_run import saec
from data_trees import elpv
from saec.cli.demo import sample
from saec.evaluate.report_run import RunFolder
from saec.types import Label, Part

RUNS = ("edge-only", "cloud-only", "cascade", "random")


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    cli_fakes.install(monkeypatch)
    monkeypatch.setattr("saec.cli.service.PROGRAM", (sys.executable, cli_fakes.__file__))


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's files with made-up pictures."""
    package = elpv(tmp_path / "package", cells=90)
    monkeypatch.setattr("saec.data.elpv._package_folder", lambda: package)


def test_the_demo_compares_four_ways_and_a_second_one_uses_data_and_station_again(tmp_path, cells):
    found = saec("demo", "--cloud", "expert", "--out", tmp_path / "demo", "--parts", 20)
    assert found.code == 0, found.err
    assert found.err == ""
    for name in RUNS:
        assert name in found.out
    assert "opens offline" in found.out
    runs = {name: RunFolder.load(tmp_path / "demo" / "expert" / "runs" / name) for name in RUNS}
    assert {len(run.verdicts) for run in runs.values()} == {20}
    assert len({tuple(v.sha256 for v in run.verdicts) for run in runs.values()}) == 1
    assert runs["edge-only"].escalation == 0
    assert runs["cloud-only"].escalation == 1
    assert runs["cascade"].escalation <= 0.3 + 1 / 20
    page = (tmp_path / "demo" / "expert" / "report.html").read_text()
    assert all(name in page for name in RUNS)
    station = (tmp_path / "demo" / "expert" / "station" / "station.json").stat().st_mtime_ns

    (tmp_path / "demo" / "expert" / "report.html").unlink()  # as an interrupted demo leaves it: finished runs are kept
    (tmp_path / "demo" / "expert" / "runs" / "random" / "manifest.json").unlink()
    begun = (tmp_path / "demo" / "expert" / "runs" / "edge-only" / "manifest.json").stat().st_mtime_ns
    again = saec("demo", "--cloud", "expert", "--out", tmp_path / "demo", "--parts", 20)
    assert again.code == 0, again.err
    assert "the one of the last demo" in again.out
    assert (tmp_path / "demo" / "expert" / "station" / "station.json").stat().st_mtime_ns == station
    assert (tmp_path / "demo" / "expert" / "runs" / "edge-only" / "manifest.json").stat().st_mtime_ns == begun
    manifest = json.loads((tmp_path / "demo" / "expert" / "runs" / "random" / "manifest.json").read_text())
    assert manifest["resumed"] is True


def test_loupe_is_pulled_asked_as_a_service_under_the_demo_s_settings_and_calibrated_for(tmp_path, cells, monkeypatch):
    pulled, exported = [], []
    monkeypatch.setattr("saec.cli.models.pulled", pulled.append)
    monkeypatch.setattr("saec.cli.vlm_export.exported", exported.append)
    demo = ("demo", "--out", tmp_path / "demo", "--parts", 20)
    found = saec(*demo, "--set", "mllm.tau=0.5")
    assert found.code == 0, found.err
    assert pulled == ["loupe"]
    assert [mllm.model for mllm in exported] == ["loupe"]
    cascade = RunFolder.load(tmp_path / "demo" / "runs" / "cascade")
    assert {v.models["cloud"] for v in cascade.verdicts if "cloud" in v.models} == {"loupe-fake-0.5"}
    assert "the one of the last demo" in saec(*demo, "--set", "mllm.tau=0.5").out
    assert "the one of the last demo" not in saec(*demo, "--set", "mllm.tau=0.6").out  # another model: calibrate again


def test_without_the_images_the_demo_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "saec.data.elpv.importlib.util.find_spec", lambda name: None if name == "elpv_dataset" else find(name)
    )
    line = saec("demo", "--cloud", "expert", "--out", tmp_path / "demo").error()
    assert "the package elpv-dataset is missing" in line
    assert "pip install" in line
    assert "too few parts" in saec("demo", "--cloud", "expert", "--out", tmp_path / "demo", "--parts", 3).error()


def test_a_cloud_service_that_does_not_start_is_bad_input(tmp_path, monkeypatch, cells):
    monkeypatch.setattr("saec.cli.service.PROGRAM", (sys.executable, "-c", "raise SystemExit('no weights')"))
    line = saec("demo", "--cloud", "expert", "--out", tmp_path / "demo", "--parts", 20).error()
    assert "the cloud service ended (no weights)" in line
    assert "cloud.log" in line


def test_the_sample_has_each_products_share_of_defects_and_is_always_the_same():
    parts = [
        Part(f"{product}-{label}-{i}", product, Path(), label)
        for product, label, count in (
            ("mono", Label.GOOD, 60), ("mono", Label.DEFECT, 30), ("poly", Label.GOOD, 90), ("poly", Label.DEFECT, 20)
        )
        for i in range(count)
    ]  # fmt: skip
    chosen = sample(parts, 100)
    assert chosen == sample(parts, 100)
    assert chosen == [part for part in parts if part in chosen]
    counts = Counter((part.product, part.label) for part in chosen)
    assert counts == {
        ("mono", Label.GOOD): 30, ("mono", Label.DEFECT): 15, ("poly", Label.GOOD): 45, ("poly", Label.DEFECT): 10
    }  # fmt: skip
    assert sample(parts, 1000) == parts
