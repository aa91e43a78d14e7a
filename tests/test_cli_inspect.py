"""``saec inspect`` and what follows it: evaluate, sweep, report. A detector without weights, all else real."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import cli_fakes
from cli_fakes import cell, flat, put, tree
from cli_run import command, environment, process, saec
from saec.cli.service import service_process
from saec.errors import BadInput
from saec.evaluate.report_run import RunFolder
from saec.fleet.ledger import read_verdicts
from saec.types import Reason, Where


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    cli_fakes.install(monkeypatch)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("data") / "parts", products=("bolt", "nut"), other=20)


@pytest.fixture(scope="module")
def station(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products and their expert."""
    out = tmp_path_factory.mktemp("stations") / "both"
    found = process("fit", root, "--out", out, "--expert")
    assert found.code == 0, found.err
    assert found.err == ""
    assert (out / "expert").is_dir()
    return out


@pytest.fixture(scope="module")
def bolts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A station of one product."""
    out = tmp_path_factory.mktemp("stations") / "bolt"
    data = tree(tmp_path_factory.mktemp("data") / "bolts")
    assert process("fit", data, "--out", out).code == 0
    return out


def test_fitting_says_what_is_guaranteed_of_each_product(tmp_path, root):
    found = saec("fit", root, "--out", tmp_path / "s", "--overkill", "0.1", "--escalation", "0.2")
    assert found.code == 0
    for product in ("bolt", "nut"):
        assert f"{product}: Overkill: at most" in found.out
    tree = json.loads(saec("fit", root, "--out", tmp_path / "s", "--escape", "0.3", "--json").out)
    assert tree["products"]["nut"]["escape"]["requested"] == 0.3
    assert "with 95% confidence" in tree["products"]["nut"]["statement"]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]  # nothing half-built is left beside it


def test_inspecting_a_folder_of_the_only_product_needs_no_product_name(tmp_path, bolts):
    found = saec("inspect", flat(tmp_path / "incoming", 9), "-s", bolts, "-o", tmp_path / "run")
    assert found.code == 0, found.err
    run = RunFolder.load(tmp_path / "run")
    assert {v.product for v in run.verdicts} == {"bolt"}
    assert [v.part_id for v in run.verdicts] == [f"{i:04}.png" for i in range(9)]
    assert str(tmp_path / "run" / "report.html") in found.out


def test_inspecting_parts_that_the_station_has_learnt_from_says_that_the_rates_flatter_it(tmp_path, bolts, root):
    known = bolts.parent / "known"
    learnt = tree(known)
    station = tmp_path / "station"
    assert saec("fit", learnt, "-o", station).code == 0
    seen = saec("inspect", learnt / "bolt" / "train", "-s", station, "-o", tmp_path / "seen").out
    assert "the rates flatter it" in seen
    assert "flatter" not in saec("inspect", learnt / "bolt" / "test", "-s", station, "-o", tmp_path / "fresh").out


def test_files_and_folders_together_keep_their_own_names(tmp_path, bolts):
    one, other = flat(tmp_path / "a", 2), flat(tmp_path / "b", 2, first=7000)
    single = put(tmp_path / "c.png", cell(8000))
    assert saec("inspect", one, other, single, "-s", bolts, "-o", tmp_path / "run").code == 0
    names = [v.part_id for v in RunFolder.load(tmp_path / "run").verdicts]
    assert len(set(names)) == 5
    assert sorted(Path(name).name for name in names) == ["0000.png", "0000.png", "0001.png", "0001.png", "c.png"]


def test_the_cascade_asks_the_expert_inside_the_station(tmp_path, root, station):
    found = saec("inspect", root, "-s", station, "-o", tmp_path / "run", "--cloud", "embedded", "--json")
    summary = json.loads(found.out)
    assert summary["routing"]["cloud"] > 0
    assert summary["models"]["cloud"] == "expert-fake"


def test_the_escalation_dial_bounds_what_goes_to_the_cloud(tmp_path, root, station):
    args = ("inspect", root, "-s", station, "-o", tmp_path / "run", "--cloud", "embedded", "--json")
    summary = json.loads(saec(*args, "--escalation", "0.05").out)
    assert 0 < summary["routing"]["cloud"] <= 0.05 * summary["n"] + 1
    assert summary["routing"]["reasons"]["edge_budget"] > 0


def test_inspecting_again_says_that_nothing_was_left_to_do(tmp_path, bolts):
    images = flat(tmp_path / "images", 6)
    assert saec("inspect", images, "-s", bolts, "-o", tmp_path / "run").code == 0
    found = saec("inspect", images, "-s", bolts, "-o", tmp_path / "run")
    assert found.code == 0
    assert "recorded already" in found.out


def test_ctrl_c_says_how_far_it_got_and_the_same_command_finishes(tmp_path, bolts):
    args = ("inspect", flat(tmp_path / "images", 120), "-s", bolts, "-o", tmp_path / "run")
    running = subprocess.Popen(command(*args), stderr=subprocess.PIPE, text=True, env=environment(FAKE_EDGE_S="0.01"))
    _wait_for_verdicts(tmp_path / "run", 10)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    done = len(list(read_verdicts(tmp_path / "run" / "ledger.sqlite")))
    assert err.splitlines() == [
        f"interrupted: {done} of 120 parts are recorded in {tmp_path / 'run'}; the same command goes on from there"
    ]
    assert 10 <= done < 120
    found = saec(*args, "--json")
    assert json.loads(found.out)["n"] == 120


def test_sigterm_ends_a_watch_in_order_and_arrivals_are_inspected_once(tmp_path, bolts):
    folder = tmp_path / "arrivals"
    put(folder / "early.png", cell(1))
    args = ("inspect", folder, "-s", bolts, "-o", tmp_path / "run", "--watch", "--json")
    running = subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for_verdicts(tmp_path / "run", 1)
    put(folder / "late.png", cell(2))
    (folder / "notes.txt").write_text("not a part")
    _wait_for_verdicts(tmp_path / "run", 2)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 0, err
    tree = json.loads(out)
    assert tree["n"] == 2
    assert tree["skipped"] == {"no image": 1}
    assert [v.part_id for v in RunFolder.load(tmp_path / "run").verdicts] == ["early.png", "late.png"]


def _kill_and_resume(folder: Path, station: Path, *, parts: int, kills: int, edge_s: float) -> None:
    images = flat(folder / "images", parts)
    args = ("inspect", images, "-s", station, "--cloud", "embedded", "--product", "bolt", "--escalation", "0.2")
    rng = random.Random(7)
    for kill in range(kills):
        running = subprocess.Popen(
            command(*args, "-o", folder / "killed"), stderr=subprocess.PIPE, env=environment(FAKE_EDGE_S=str(edge_s))
        )
        _wait_for_verdicts(folder / "killed", 1 + parts * kill // (kills + 1), running)
        time.sleep(rng.uniform(0, 0.1))
        running.kill()
        running.communicate()
        assert running.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    last = process(*args, "-o", folder / "killed", "--json")
    assert last.code == 0, last.err
    assert process(*args, "-o", folder / "whole").code == 0
    killed, whole = RunFolder.load(folder / "killed"), RunFolder.load(folder / "whole")
    assert [replace(v, timings_ms={}) for v in killed.verdicts] == [replace(v, timings_ms={}) for v in whole.verdicts]
    assert len({v.part_id for v in killed.verdicts}) == len(killed.verdicts) == parts
    assert {v.where for v in killed.verdicts} == {Where.EDGE, Where.CLOUD}
    assert any(v.reason is Reason.EDGE_BUDGET for v in killed.verdicts)
    assert all(killed.heatmap(v).read_bytes() == whole.heatmap(v).read_bytes() for v in killed.verdicts)
    for key in ("n", "routing", "per_product", "confusion", "uplink_bytes"):
        assert killed.summary[key] == whole.summary[key]


def test_a_run_killed_three_times_equals_an_undisturbed_one(tmp_path, station):
    _kill_and_resume(tmp_path, station, parts=150, kills=3, edge_s=0.004)


@pytest.mark.slow
def test_a_run_killed_twenty_times_equals_an_undisturbed_one(tmp_path, station):
    _kill_and_resume(tmp_path, station, parts=1000, kills=20, edge_s=0.004)


def test_kill_9_of_the_cloud_service_loses_no_part(tmp_path, station, monkeypatch):
    images = flat(tmp_path / "images", 120)
    monkeypatch.setattr("saec.cli.service.PROGRAM", (sys.executable, cli_fakes.__file__))
    with service_process(["cloud", "serve", "-s", str(station), "--port", "0"], tmp_path / "cloud.log") as url:
        args = ("inspect", images, "-s", station, "-o", tmp_path / "run", "--product", "bolt", "--cloud", url, "--json")
        running = subprocess.Popen(
            command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(FAKE_EDGE_S="0.01")
        )
        _wait_for_verdicts(tmp_path / "run", 40, running)
        service = next(p for p in psutil.Process().children() if "serve" in p.cmdline())
        service.kill()
        out, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    summary = json.loads(out)
    run = RunFolder.load(tmp_path / "run")
    assert len({v.part_id for v in run.verdicts}) == len(run.verdicts) == summary["n"] == 120
    assert summary["routing"]["cloud"] > 0
    assert summary["routing"]["fallback"] > 0
    assert set(summary["routing"]["reasons"]) & {"cloud_unreachable", "circuit_open"}
    assert all(v.error for v in run.verdicts if v.where is Where.FALLBACK)
    human = saec("inspect", images, "-s", station, "-o", tmp_path / "run", "--product", "bolt")
    assert "times the cloud gave no opinion and the edge's verdict stood" in human.out
    assert "cloud unreachable" in human.out or "cloud paused" in human.out


def test_evaluate_judges_the_test_split_alone(tmp_path, root, station):
    found = saec("evaluate", root, "-s", station, "-o", tmp_path / "run", "--cloud", "embedded", "--json")
    summary = json.loads(found.out)
    assert summary["n"] == summary["labelled"] == 80
    assert summary["accuracy"] > 0.8
    assert all("/test/" in v.part_id for v in RunFolder.load(tmp_path / "run").verdicts)


def test_the_arms_of_an_evaluation_are_what_they_say(tmp_path, root, station):
    def routing(name: str, *args: str) -> dict[str, int]:
        found = saec("evaluate", root, "-s", station, "-o", tmp_path / name, "--cloud", "embedded", "--json", *args)
        return json.loads(found.out)["routing"]

    assert routing("edge", "--edge-only")["reasons"] == {"edge_only": 80}
    assert routing("cloud", "--cloud-only")["reasons"] == {"cloud_only": 80}
    drawn = routing("random", "--random-ratio", "0.25")
    assert set(drawn["reasons"]) == {"cloud_random", "edge_random"}
    assert 8 <= drawn["cloud"] <= 32
    manifests = {name: RunFolder.load(tmp_path / name).manifest["mode"] for name in ("edge", "cloud", "random")}
    assert manifests == {"edge": "edge_only", "cloud": "cloud_only", "random": "random"}


def test_a_gate_that_holds_exits_0_and_one_that_fails_exits_1_after_the_run(tmp_path, root, station):
    args = ("evaluate", root, "-s", station, "-o", tmp_path / "run")
    assert saec(*args, "--min-accuracy", "0.5", "--max-escape", "0.9", "--gate", "latency_ms.p99<=5000").code == 0
    found = saec(*args, "--gate", "accuracy>=0.5", "--gate", "accuracy>1")
    assert found.code == 1
    assert found.err.splitlines() == [f"gate failed: accuracy is {_accuracy(tmp_path / 'run'):.4g}, > 1 was asked"]
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_sweep_records_both_arms_and_draws_them_into_the_report(tmp_path, root, station):
    found = saec("sweep", root, "-s", station, "-o", tmp_path / "run", "--cloud", "embedded")
    assert found.code == 0, found.err
    assert "at most 30%" in found.out
    points = json.loads((tmp_path / "run" / "sweep.json").read_text())["points"]
    assert {point["knob"] for point in points} == {"share", "tau_scene"}
    assert "Accuracy against escalation" in (tmp_path / "run" / "report.html").read_text()
    assert "Accuracy against escalation" in _reported(tmp_path, tmp_path / "run")  # saec report finds the sweep


def test_several_runs_are_compared_side_by_side(tmp_path, root, station):
    for name in ("edge", "cascade"):
        args = ("--edge-only",) if name == "edge" else ("--cloud", "embedded")
        assert saec("evaluate", root, "-s", station, "-o", tmp_path / name, *args).code == 0
    found = saec("report", tmp_path / "edge", tmp_path / "cascade")
    assert "Comparison" in found.out
    assert (tmp_path / "report.html").is_file()
    assert "cascade" in _reported(tmp_path, tmp_path / "edge", tmp_path / "cascade")


def _reported(folder: Path, *runs: Path) -> str:
    page = folder / "page.html"
    found = saec("report", *runs, "--out", page, "--json")
    assert json.loads(found.out)["report"] == str(page)
    return page.read_text()


def _accuracy(run: Path) -> float:
    return json.loads((run / "summary.json").read_text())["accuracy"]


def _wait_for_verdicts(run: Path, count: int, running: subprocess.Popen[bytes] | None = None) -> None:
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        assert running is None or running.poll() is None, "the run ended too early"
        with suppress(BadInput):  # there is no ledger yet, or it has no tables yet
            if len(list(read_verdicts(run / "ledger.sqlite"))) >= count:
                return
        time.sleep(0.01)
    raise AssertionError(f"no {count} verdicts in {run}")
