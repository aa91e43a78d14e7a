"""``saec learn once`` and ``rounds`` as an engineer calls them: real station, real pipeline, cloud as a process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from cli_run import saec
from edge_parts import defects, good_parts
from learn_parts import new_parts
from saec.cli.service import service_process
from saec.fleet.slots import Slots
from saec.types import Label

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two products in folders: plates to fit to, and the plates with ribs both ways that come after them."""
    root = tmp_path_factory.mktemp("data")
    good_parts(root, 10, split="train")
    for first, split in ((100, "calibration"), (300, "test")):
        good_parts(root, 14, first=first, split=split)
        defects(root, 14, first=first, split=split)
    for part in new_parts(root / "scratch", 48):
        place = root / "ribbed" / "test" / str(part.label) / part.path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        part.path.rename(place)
    (root / "scratch").rmdir()
    return root


@pytest.fixture(scope="module")
def station(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "station"
    (data.parent / "plates").mkdir(exist_ok=True)
    target = data.parent / "plates" / "plate"
    if not target.exists():
        target.symlink_to(data / "plate")
    assert saec("fit", data.parent / "plates", "--out", folder, "--expert", "--set", "edge.threads=1").code == 0
    return folder


@pytest.fixture
def service(station, tmp_path):
    command = ["cloud", "serve", "--port", "0", "--station", str(station), "--learn", str(tmp_path / "desk")]
    with service_process(command, tmp_path / "cloud.log") as url:
        yield url


@pytest.fixture
def run(data, station, tmp_path):
    folder = tmp_path / "run"
    images = data / "ribbed" / "test"
    assert saec("inspect", images, "--station", station, "--product", "plate", "--out", folder).code == 0
    return folder


def labels_of(run, path):
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    rows = [f"{line['part_id']},{line['truth'] or Label.GOOD}" for line in lines]
    path.write_text("\n".join(["part,label", *rows]) + "\n")
    return lines


def test_an_evening_of_labels_makes_the_station_better_and_the_next_evening_finds_nothing_new(
    run, station, service, tmp_path
):
    before = labels_of(run, tmp_path / "labels.csv")
    wrong = sum(line["label"] != line["truth"] for line in before)
    call = ("learn", "once", run, "--station", station, "--cloud", service)
    found = saec(*call, "--labels", tmp_path / "labels.csv")
    assert found.code == 0
    assert "version 1 counts from now on, taught in the cloud" in found.out
    assert "probe before" in found.out
    assert Slots(station).pointer.current.version == 1
    again = tmp_path / "again"
    images = before[0]["path"].rsplit("/test/", 1)[0] + "/test"
    assert saec("inspect", images, "--station", station, "--product", "plate", "--out", again).code == 0
    after = [json.loads(line) for line in (again / "predictions.jsonl").read_text().splitlines()]
    assert sum(line["label"] != line["truth"] for line in after) < wrong / 2
    repeated = saec(*call, "--labels", tmp_path / "labels.csv", "--json")
    assert repeated.code == 0
    assert json.loads(repeated.out)["plate"]["samples"] == 0


def test_what_cannot_be_learnt_from_is_told_in_one_line(run, station, tmp_path):
    nobody = ("learn", "once", run, "--station", station, "--cloud", "http://127.0.0.1:9")
    (tmp_path / "strangers.csv").write_text("part,label\nnobody,good\n")
    assert "no label is about a part of this run" in saec(*nobody, "--labels", tmp_path / "strangers.csv").error()
    assert "no verdicts to learn from" in saec("learn", "once", tmp_path / "empty", *nobody[3:]).error()


ROUNDS = ("--first", "plate", "--then", "ribbed", "--rounds", "3", "--parts", "9", "--backend", "expert")
ARMS = ("--teacher", "labels", "--arms", "adapted,no adaptation")


def test_rounds_show_what_learning_is_worth_and_a_second_call_repeats_nothing(data, tmp_path):
    out = tmp_path / "rounds"
    found = saec("learn", "rounds", data, "--out", out, *ROUNDS, *ARMS)
    assert found.code == 0, found.err
    tree = json.loads((out / "rounds.json").read_text())
    adapted, none = (arm["rounds"] for arm in tree["arms"])
    assert adapted[-1]["held_out"]["edge"] > none[-1]["held_out"]["edge"] + 0.05
    assert none[0]["held_out"] == none[2]["held_out"]
    assert sum(record["learnt"]["samples"] for record in adapted) > 0
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    records = {file: file.stat().st_mtime_ns for file in out.rglob("record.json")}
    assert saec("learn", "rounds", data, "--out", out, *ROUNDS, *ARMS).code == 0
    assert records == {file: file.stat().st_mtime_ns for file in out.rglob("record.json")}
    assert "other options" in saec("learn", "rounds", data, "--out", out, *ROUNDS, "--arms", "adapted").error()


def test_rounds_stopped_by_ctrl_c_go_on(data, tmp_path):
    out = tmp_path / "rounds"
    call = [sys.executable, "-m", "saec", "learn", "rounds", str(data), "--out", str(out), *ROUNDS, *ARMS]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    give_up = time.monotonic() + 120
    while not list(out.rglob("arms/*/0/stream/ledger.sqlite")):
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert saec("learn", "rounds", data, "--out", out, *ROUNDS, *ARMS).code == 0


def test_a_stream_that_nothing_happens_to_is_refused(data, tmp_path):
    out = tmp_path / "rounds"
    assert "what changes?" in saec("learn", "rounds", data, "--out", out, "--first", "plate").error()
    assert "no such arm" in saec("learn", "rounds", data, "-o", out, *ROUNDS, "--arms", "magic").error()
