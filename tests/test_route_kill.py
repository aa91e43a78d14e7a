"""``kill -9`` of a run at twenty random moments: no part lost, none judged twice, the same result as undisturbed."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from saec.fleet.verdict_json import verdict_from_json
from saec.types import Explanation, Label, Reason, Verdict, Where

PARTS = 1000  # two seconds of work, of which the twenty lives take about one
KILLS = 20


def start(folder: Path) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("route_killed_run.py")
    return subprocess.Popen([sys.executable, str(script), str(folder), str(PARTS)], stderr=subprocess.PIPE)


def finish(folder: Path) -> None:
    process = start(folder)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr.decode()


def kill_within_the_run(folder: Path, rng: random.Random) -> None:
    """Start, wait until the pipeline itself runs, and kill after a random part of a life."""
    process = start(folder)
    begun = (folder / "log").read_text().count("begin") if (folder / "log").exists() else 0
    patience = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < patience:
        if (folder / "log").exists() and (folder / "log").read_text().count("begin") > begun:
            break
        time.sleep(0.002)
    time.sleep(rng.uniform(0.0, 0.09))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed: too few parts"


def result(folder: Path) -> list[Verdict]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return [replace(verdict_from_json(line), timings_ms={}) for line in lines]


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is a POSIX matter")
def test_a_run_killed_twenty_times_equals_an_undisturbed_one(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    rng = random.Random(2025)
    for _ in range(KILLS):
        kill_within_the_run(killed, rng)
    finish(killed)
    finish(whole)

    final = result(killed)
    assert final == result(whole)
    assert len({v.part_id for v in final}) == len(final) == PARTS
    assert {v.where for v in final} == {Where.EDGE, Where.CLOUD}
    assert any(v.reason is Reason.EDGE_BUDGET for v in final)  # the dial's state survived as well
    assert all(v.explanation is Explanation.GIVEN for v in final if v.label is Label.DEFECT and v.where is Where.EDGE)

    events = defaultdict(list)
    for line in (killed / "log").read_text().splitlines():
        what, _, number = line.partition(" ")
        events[number].append(what)
    for number, of_part in events.items():
        known = [i for i, what in enumerate(of_part) if what in ("local", "final")]
        assert not known or "edge" not in of_part[known[0] :], f"part {number} was judged again: {of_part}"
        done = of_part.index("final") if "final" in of_part else len(of_part)
        assert "cloud" not in of_part[done:], f"part {number} was asked about again: {of_part}"
        told = of_part.index("explained") if "explained" in of_part else len(of_part)
        assert "explain" not in of_part[told:], f"part {number} was explained again: {of_part}"

    with sqlite3.connect(killed / "ledger.sqlite") as db:
        assert db.execute("SELECT count(*), max(seq) FROM verdicts").fetchone() == (PARTS, PARTS)
        assert db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'verdicts'").fetchone() == (PARTS,)
        assert db.execute("SELECT count(*) FROM verdicts WHERE state = 'pending_cloud'").fetchone() == (0,)
        assert db.execute("SELECT count(*) FROM unexplained").fetchone() == (0,)
    db.close()
    lives = Counter(what for of_part in events.values() for what in of_part)
    assert lives["begin"] == KILLS + 1
