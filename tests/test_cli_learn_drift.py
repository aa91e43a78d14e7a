"""``saec learn drift``: quiet is 0, an alarm is 1 with its evidence, bad input one line and 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli_run import saec
from edge_parts import good_parts, plate, put, station
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
    assert proposal["old"]["overkill"] == 1.0
    assert proposal["new"]["overkill"] < 0.1
    assert "accuracy" in {alarm["kind"] for alarm in found["raised"]}


def test_the_summary_and_the_report_say_it_too(line):
    summary = json.loads((line / "run-other" / "summary.json").read_text())
    assert summary["drift"]["plate"]["standing"]
    assert "drift" not in summary["calibration"]["products"]["plate"]
    assert "Drift of plate" in (line / "run-other" / "report.html").read_text()
    assert json.loads((line / "run-same" / "summary.json").read_text())["drift"]["plate"]["raised"] == []


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
