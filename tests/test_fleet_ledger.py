"""The ledger: nothing acknowledged is ever lost, nothing is judged twice."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
import textwrap
import time
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saec.errors import BadInput
from saec.fleet.ledger import Ledger, Spent, read_verdicts
from saec.fleet.schema import MIGRATIONS
from saec.fleet.verdict_json import verdict_from_json, verdict_to_json
from saec.types import Box, Evidence, Label, Reason, Verdict, Where


def verdict(number: int, **changes: object) -> Verdict:
    base = Verdict(
        part_id=f"part-{number}",
        sha256=f"{number:064x}",
        product="widget",
        path=f"line/{number}.png",
        label=Label.GOOD,
        p_defect=0.1,
        where=Where.EDGE,
        reason=Reason.EDGE_CONFIDENT,
        models={"edge": "m1"},
        timings_ms={"edge": 3.0},
    )
    return replace(base, **changes)


def amended(local: Verdict, **changes: object) -> Verdict:
    final = replace(
        local,
        where=Where.CLOUD,
        label=Label.DEFECT,
        p_defect=0.9,
        uplink_bytes=50,
        timings_ms={"edge": 3.0, "cloud": 250.0},
        models={"edge": "m1", "cloud": "m2"},
        amended_by="m2",
    )
    return replace(final, **changes)


# -- the JSON line --------------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
optional = st.one_of(st.none(), finite)
boxes = st.builds(Box, *[st.integers(-5, 5000)] * 4, optional)
text = st.text(st.characters(codec="utf-8"))
verdicts = st.builds(
    Verdict,
    part_id=text,
    sha256=text,
    product=text,
    path=text,
    label=st.sampled_from(Label),
    p_defect=optional,
    where=st.sampled_from(Where),
    reason=st.sampled_from(Reason),
    scene_score=optional,
    edge_score=optional,
    edge_label=st.one_of(st.none(), st.sampled_from(Label)),
    edge_p_defect=optional,
    cloud_p_defect=optional,
    evidence=st.builds(Evidence, st.lists(boxes, max_size=3).map(tuple), st.none() | text, st.none() | text, text),
    models=st.dictionaries(text, text, max_size=3),
    timings_ms=st.dictionaries(text, finite, max_size=3),
    uplink_bytes=st.integers(0, 2**40),
    amended_by=st.none() | text,
    error=st.none() | text,
    truth=st.none() | st.sampled_from(Label),
    escalated_for=st.none() | st.sampled_from(Reason),
)


@settings(deadline=None, max_examples=150)
@given(verdicts)
def test_a_verdict_survives_its_json_line(each):
    line = verdict_to_json(each)
    assert "\n" not in line
    assert verdict_from_json(line) == each


def test_the_json_line_has_the_fields_of_the_verdict_in_order():
    assert list(json.loads(verdict_to_json(verdict(1)))) == [field.name for field in fields(Verdict)]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tree: tree.update(colour="red"), "unknown key colour"),
        (lambda tree: tree["evidence"].update(colour="red"), "unknown key evidence.colour"),
        (lambda tree: tree["evidence"]["boxes"][0].update(w=3), "unknown key evidence.boxes.0.w"),
        (lambda tree: tree.pop("label"), "label"),
        (lambda tree: tree.update(label="fine"), "label"),
        (lambda tree: tree.update(p_defect="0.1"), "p_defect"),
    ],
)
def test_a_line_with_an_unknown_missing_or_wrong_key_is_refused(change, complaint):
    tree = json.loads(verdict_to_json(verdict(1, evidence=Evidence((Box(1, 2, 3, 4),)))))
    change(tree)
    with pytest.raises(BadInput, match=complaint) as caught:
        verdict_from_json(json.dumps(tree), where="predictions.jsonl:7")
    assert "predictions.jsonl:7" in str(caught.value)


@pytest.mark.parametrize("line", ["", "{", "[]", "null", '{"p_defect": NaN}', "[" * 100_000])
def test_a_line_that_is_no_verdict_is_refused(line):
    with pytest.raises(BadInput, match="not a verdict"):
        verdict_from_json(line)


@pytest.mark.parametrize(
    "change", [{"p_defect": math.nan}, {"timings_ms": {"edge": math.inf}}, {"edge_score": -math.inf}]
)
def test_a_figure_that_is_not_finite_is_never_written_as_null(change):
    with pytest.raises(ValueError, match="part-1"):
        verdict_to_json(verdict(1, **change))


# -- recording ------------------------------------------------------------------------------------------------------


def test_what_was_acknowledged_is_there_after_reopening_in_the_order_of_recording(tmp_path):
    path = tmp_path / "run" / "ledger.sqlite"
    with Ledger(path) as ledger:
        receipts = [ledger.record_local(verdict(n), pending_cloud=False) for n in (5, 3, 9, 1)]
        assert [receipt.result(5).seq for receipt in receipts] == [1, 2, 3, 4]
    with Ledger(path) as ledger:
        assert [v.part_id for v in ledger.verdicts()] == ["part-5", "part-3", "part-9", "part-1"]
        assert ledger.done_ids() == {"part-5": 1, "part-3": 1, "part-9": 1, "part-1": 1}


def test_the_same_judgement_twice_is_recorded_once(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        assert ledger.record_local(verdict(1), pending_cloud=False).result(5).fresh
        again = ledger.record_local(verdict(1, label=Label.DEFECT), pending_cloud=True).result(5)
        assert (again.seq, again.fresh) == (1, False)
        assert [v.label for v in ledger.verdicts()] == [Label.GOOD]
        assert ledger.pending() == []


def test_a_part_name_that_comes_again_with_other_content_is_another_judgement(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        ledger.record_local(verdict(1), pending_cloud=False).result(5)
        assert ledger.record_local(verdict(1, sha256="other"), pending_cloud=False).result(5).fresh
        assert ledger.done_ids() == {"part-1": 2}


def test_a_pending_part_keeps_its_heatmap_until_it_is_amended(tmp_path):
    heatmap = np.array([[0.5, 1.5, -2.0], [3.0, 4.0, 5.0]], dtype=np.float32)
    with Ledger(tmp_path / "l") as ledger:
        local = verdict(2, reason=Reason.IN_BAND)
        ledger.record_local(verdict(1), pending_cloud=False, heatmap=heatmap)
        ledger.record_local(local, pending_cloud=True, heatmap=heatmap)
        ledger.record_local(verdict(3), pending_cloud=True).result(5)
    with Ledger(tmp_path / "l") as ledger:
        first, second = ledger.pending()
        assert (first.seq, first.verdict) == (2, local)
        assert first.heatmap.dtype == np.float32
        np.testing.assert_array_equal(first.heatmap, heatmap)
        assert second.heatmap is None
        ledger.amend(amended(local)).result(5)
        assert [p.seq for p in ledger.pending()] == [3]
        assert [v.label for v in ledger.verdicts()] == [Label.GOOD, Label.DEFECT, Label.GOOD]
    with sqlite3.connect(tmp_path / "l") as db:
        assert db.execute("SELECT count(*) FROM heatmaps").fetchone() == (0,)


def test_a_part_is_amended_once_and_only_if_a_question_was_open(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        ledger.record_local(verdict(1), pending_cloud=False)
        ledger.record_local(verdict(2), pending_cloud=True)
        first = ledger.amend(amended(verdict(2)))
        refused = [ledger.amend(amended(verdict(n), label=Label.GOOD)) for n in (1, 2, 3)]
        assert first.result(5).seq == 2
        for receipt in refused:
            with pytest.raises(BadInput, match="no question is pending"):
                receipt.result(5)
        assert ledger.record_local(verdict(4), pending_cloud=False).result(5).fresh  # a refusal harms nobody else
        assert list(ledger.verdicts())[1] == amended(verdict(2))


def test_the_budgets_state_is_what_the_rows_say(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        for n in range(5):
            ledger.record_local(verdict(n), pending_cloud=n < 3)
        ledger.amend(amended(verdict(0)))
        ledger.amend(amended(verdict(1), where=Where.FALLBACK, uplink_bytes=20)).result(5)
        assert ledger.spent() == Spent(parts=5, questions=3, answered=2, uplink_bytes=70, cloud_s=0.5)


def test_a_run_is_tied_to_its_station_and_settings(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        ledger.bind(station="s1", settings="a")
    with Ledger(tmp_path / "l") as ledger:
        ledger.bind(station="s1", settings="a")
        with pytest.raises(BadInput, match="another station"):
            ledger.bind(station="s2", settings="a")
        with pytest.raises(BadInput, match="other settings"):
            ledger.bind(station="s1", settings="b")


def test_the_export_is_ordered_and_replaces_the_old_file_only_as_a_whole(tmp_path):
    out = tmp_path / "predictions.jsonl"
    with Ledger(tmp_path / "l") as ledger:
        for n in (2, 1):
            ledger.record_local(verdict(n), pending_cloud=False).result(5)
        assert ledger.export_jsonl(out) == 2
        assert [verdict_from_json(line).part_id for line in out.read_text().splitlines()] == ["part-2", "part-1"]
        with pytest.raises(BadInput, match="cannot write"):
            ledger.export_jsonl(tmp_path / "missing" / "predictions.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l", "l.lock", "predictions.jsonl"]


def test_a_reader_sees_the_run_while_it_is_being_written(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        ledger.record_local(verdict(1), pending_cloud=False).result(5)
        assert [v.part_id for v in read_verdicts(tmp_path / "l")] == ["part-1"]
    with pytest.raises(BadInput, match="no ledger"):
        list(read_verdicts(tmp_path / "other"))


def test_more_than_500_verdicts_a_second_each_synced_before_its_receipt(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        begun = time.monotonic()
        receipts = [ledger.record_local(verdict(n), pending_cloud=False) for n in range(1000)]
        assert all(receipt.result(20).fresh for receipt in receipts)
        rate = 1000 / (time.monotonic() - begun)
    assert rate > 500, f"{rate:.0f} verdicts a second"


def test_every_commit_is_synced_and_the_log_is_written_ahead(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        assert ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert ledger._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_closed_ledger_takes_nothing_more(tmp_path):
    ledger = Ledger(tmp_path / "l")
    ledger.close()
    ledger.close()
    with pytest.raises(BadInput, match="closed"):
        ledger.record_local(verdict(1), pending_cloud=False)


# -- what can be wrong with the file --------------------------------------------------------------------------------


def test_two_runs_cannot_write_one_ledger(tmp_path):
    with Ledger(tmp_path / "l"), pytest.raises(BadInput, match="in use by another run"):
        Ledger(tmp_path / "l")
    Ledger(tmp_path / "l").close()


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "l").write_bytes(b"not a database, but long enough to have a header" * 100)
    with pytest.raises(BadInput, match="damaged"):
        Ledger(tmp_path / "l")


def test_a_damaged_ledger_is_refused(tmp_path):
    path = tmp_path / "l"
    with Ledger(path) as ledger:
        for n in range(300):
            receipt = ledger.record_local(verdict(n), pending_cloud=False)
        receipt.result(10)
    whole = bytearray(path.read_bytes())
    whole[2 * 4096 : 6 * 4096] = os.urandom(4 * 4096)
    path.write_bytes(whole)
    with pytest.raises(BadInput, match="damaged"):
        Ledger(path)


def test_another_programs_database_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "l") as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(BadInput, match="not a ledger"):
        Ledger(tmp_path / "l")


def test_a_ledger_from_a_newer_version_is_refused(tmp_path):
    Ledger(tmp_path / "l").close()
    with sqlite3.connect(tmp_path / "l") as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(BadInput, match="newer version"):
        Ledger(tmp_path / "l")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be read or written"):
        Ledger(tmp_path / "file" / "ledger.sqlite")


@pytest.mark.skipif(sys.platform == "win32", reason="limits the file size of a process, which Windows cannot")
def test_a_full_disk_is_reported_and_keeps_what_was_acknowledged(tmp_path):
    script = textwrap.dedent(
        """
        import resource, signal, sys
        from dataclasses import replace
        from pathlib import Path
        from saec.errors import BadInput
        from saec.fleet.ledger import Ledger
        from saec.types import Label, Reason, Verdict, Where
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        ledger = Ledger(Path(sys.argv[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        v = Verdict("", "", "widget", "x" * 500, Label.GOOD, 0.1, Where.EDGE, Reason.EDGE_CONFIDENT)
        acknowledged = 0
        try:
            for n in range(5000):
                ledger.record_local(replace(v, part_id=str(n)), pending_cloud=False).result(30)
                acknowledged += 1
        except BadInput as error:
            print(acknowledged, error)
        try:
            ledger.record_local(replace(v, part_id="late"), pending_cloud=False).result(30)
        except BadInput:
            print("still refused")
        ledger.close()
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "l")], capture_output=True, text=True, timeout=60, check=True
    )
    first, second = done.stdout.splitlines()
    count, _, message = first.partition(" ")
    assert 0 < int(count) < 5000
    assert "free space" in message
    assert second == "still refused"
    with Ledger(tmp_path / "l") as ledger:
        assert list(ledger.done_ids()) and len(ledger.done_ids()) == int(count)
        assert ledger.record_local(verdict(9999), pending_cloud=False).result(5).fresh
