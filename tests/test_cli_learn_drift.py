"""``saec learn drift``: quiet is 0, an alarm is 1 with its evidence, bad input one line and 2."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest

from cli_run import saec
from edge_parts import good_parts, plate, put, station
from saec.fleet.slots import Slots
from saec.learn.state import State, station_state, write_station
from saec.types import Part


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> Path:
    """A station of plates, a run over plates and one over plates that lie upside down in another light."""
    root = tmp_path_factory.mktemp("line")
    station().save(root / "station")
    for number in range(40):
        put(root / "same" / f"{number}.png", plate(3000 + number))
        put(root / "other" / f"{number}.png", 255 - plate(3000 + number) // 2)
    for name in ("same", "other"):
        found = saec("inspect", root / name, "--station", root / "station", "--out", root / f"run-{name}")
        assert found.code == 0, found.err
    return root


def asked(line: Path, name: str, *more: object):
    return saec("learn", "drift", line / f"run-{name}", "--station", line / "station", *more)


def test_a_line_that_is_as_it_was_is_quiet(line):
    found = asked(line, "same")
    assert found.code == 0, found.out + found.err
    assert "quiet over 40 parts" in found.out


def test_a_line_that_moved_is_an_alarm_with_evidence_and_a_proposal(line):
    found = asked(line, "other")
    assert found.code == 1
    assert "rejects" in found.out
    assert "label" in found.out
    tree = json.loads(asked(line, "other", "--json").out)["plate"]
    assert tree["n"] == 40
    assert {"kind", "value", "limit", "n", "since", "statement"} == set(tree["standing"][0])
    assert tree["proposal"]["action"] == "label"


def test_peoples_labels_make_a_proposal(line, tmp_path):
    labels = tmp_path / "labels.csv"
    names = [
        json.loads(text)["part_id"] for text in (line / "run-other" / "predictions.jsonl").read_text().splitlines()
    ]
    labels.write_text("part,label\n" + "".join(f"{name},good\n" for name in names))
    found = json.loads(asked(line, "other", "--labels", labels, "--json").out)["plate"]
    proposal = found["proposal"]
    assert (proposal["action"], proposal["n_good"], proposal["by_people"]) == ("re-calibrate", 40, 40)
    assert proposal["by_truth"] == 0
    assert "40 by people" in asked(line, "other", "--labels", labels).out
    assert proposal["old"]["overkill"] == 1.0
    assert proposal["new"]["overkill"] < 0.1
    assert "accuracy" in {alarm["kind"] for alarm in found["raised"]}


def test_the_summary_and_the_report_say_it_too(line):
    summary = json.loads((line / "run-other" / "summary.json").read_text())
    assert summary["drift"]["plate"]["standing"]
    assert "drift" not in summary["calibration"]["products"]["plate"]
    assert "Drift of plate" in (line / "run-other" / "report.html").read_text()
    assert json.loads((line / "run-same" / "summary.json").read_text())["drift"]["plate"]["raised"] == []


@pytest.fixture
def taught(line, tmp_path) -> Path:
    """The station, with a version 1 that is used to rejecting all parts."""
    root = tmp_path / "station"
    shutil.copytree(line / "station", root)
    state = station_state(root, "plate")
    model = copy.deepcopy(state.document["model.json"])
    model["calibration"]["drift"]["rejects"] = 1.0
    put_version(root, 1, State(state.tensors, {"model.json": model}))
    return root


def put_version(root: Path, version: int, state: State) -> None:
    slots = Slots(root)
    base = slots.current()
    with slots.alone():
        slots.stage(lambda out: write_station(base, {"plate": state}, out))
        slots.switch(version, state.sha256)


@pytest.mark.parametrize("back", [False, True], ids=["taught", "taken back"])
def test_a_run_is_held_against_the_version_that_judged_it_whichever_counts_now(line, taught, tmp_path, back):
    assert saec("inspect", line / "other", "--station", taught, "--out", tmp_path / "run").code == 0
    if back:
        Slots(taught).back()
    for run, version in ((line / "run-other", 0), (tmp_path / "run", 1)):
        seen = json.loads(saec("learn", "drift", run, "--station", taught, "--json").out)["plate"]
        assert (seen["version"], seen["others"], seen["n"]) == (version, 0, 40)
        assert ("rejects" in {alarm["kind"] for alarm in seen["standing"]}) is (version == 0)
        told = saec("learn", "drift", run, "--station", taught).out
        assert ("counts now: inspect again" in told) is (version != (0 if back else 1))


def test_a_run_over_two_versions_is_held_against_the_last_one_with_its_own_parts(line, taught, tmp_path):
    Slots(taught).back()
    shutil.copytree(line / "other", tmp_path / "other")
    run = ("--station", taught, "--out", tmp_path / "run")
    assert saec("inspect", tmp_path / "other", *run).code == 0
    put_version(taught, 2, station_state(taught, "plate"))
    for number in range(40):
        put(tmp_path / "same" / f"next-{number}.png", plate(3000 + number))
    assert saec("inspect", tmp_path / "same", *run).code == 0  # goes on with the run
    found = saec("learn", "drift", tmp_path / "run", "--station", taught)
    assert found.code == 0, found.out + found.err
    assert "quiet over 40 parts" in found.out
    assert "40 parts that other versions judged are left out; version 2 judged last" in found.out


def test_an_evaluation_of_a_taught_station_is_held_against_it_too(line, taught, tmp_path):
    for number in range(40):
        put(tmp_path / "data" / "plate" / "test" / "good" / f"{number}.png", 255 - plate(4000 + number) // 2)
    data, run = tmp_path / "data", tmp_path / "run"
    assert saec("evaluate", data, "--station", taught, "--edge-only", "--out", run).code == 0
    seen = json.loads(saec("learn", "drift", run, "--station", taught, "--json").out)["plate"]
    assert (seen["version"], seen["n"]) == (1, 40)
    assert "rejects" not in {alarm["kind"] for alarm in seen["raised"]}


def test_a_run_whose_version_is_gone_is_refused(line, taught, tmp_path):
    assert saec("inspect", line / "same", "--station", taught, "--out", tmp_path / "run").code == 0
    Slots(taught).back()
    for folder in (taught / "slots").glob("1-*"):
        shutil.rmtree(folder)
    assert "which judged the run, is gone" in saec("learn", "drift", tmp_path / "run", "--station", taught).error()


def test_the_table_shows_an_alarm_that_stands_as_it_is_now_and_with_its_unit(line, tmp_path):
    for count in range(60):
        put(tmp_path / "parts" / ("good" if count < 25 else "defect") / f"{count:03}.png", plate(7000 + count))
    run = tmp_path / "run"
    assert saec("inspect", tmp_path / "parts", "--station", line / "station", "--out", run).code == 0
    tree = json.loads(saec("learn", "drift", run, "--station", line / "station", "--json").out)["plate"]
    first, now = (next(a for a in tree[key] if a["kind"] == "accuracy") for key in ("raised", "standing"))
    assert round(now["value"], 3) != round(first["value"], 3)
    said = " ".join(saec("learn", "drift", run, "--station", line / "station").out.split())
    assert f"{now['value']:.1%}".removesuffix("%") in said
    assert f"{first['value']:.1%}".removesuffix("%") not in said
    assert "accuracy lost, %" in said
    assert "60 by known truth" in said


def test_bad_input_is_one_line(line, tmp_path):
    (tmp_path / "none.csv").write_text("part,label\nnobody,good\n")
    for found in (
        saec("learn", "drift", tmp_path, "--station", line / "station"),
        saec("learn", "drift", line / "run-same", "--station", tmp_path),
        asked(line, "same", "--labels", tmp_path / "none.csv"),
        asked(line, "same", "--labels", tmp_path / "missing.csv"),
    ):
        assert found.code == 2
        assert "Traceback" not in found.err
        assert found.err.strip()


def test_a_run_of_another_station_is_refused(line, tmp_path):
    from edge_parts import SETTINGS, dataset
    from saec.edge.fit import fit_station

    parts: list[Part] = good_parts(tmp_path / "parts", 6, first=70)
    fit_station(dataset(tmp_path, parts), SETTINGS).save(tmp_path / "station")
    found = saec("learn", "drift", line / "run-same", "--station", tmp_path / "station")
    assert found.code == 2
    assert "no verdict of the run is of this station" in found.err
