"""``saec learn once`` in this process, with a desk in the service's place: what it says, and how it ends."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cli_run import saec
from edge_parts import SETTINGS, defects, good_parts
from learn_parts import PRODUCT, DeskClient, fitted, judged, knows, line_of, new_parts
from saec.edge.station import Station, station_files
from saec.fleet.ledger import Ledger
from saec.fleet.slots import Slots
from saec.learn.round import ROUND, Line, alone
from saec.learn.samples import for_probe
from saec.types import Evidence, Label, Opinion, Where

URL = "http://127.0.0.1:9"  # nobody is there


@pytest.fixture
def line(tmp_path):
    return line_of(tmp_path)


@pytest.fixture
def desk(tmp_path, line, monkeypatch):
    """Serves in place of the network."""
    client = DeskClient(tmp_path / "cloud", SETTINGS, station=line.station)
    stop = client.desk.close
    monkeypatch.setattr("saec.cloud.learning.LearnClient", lambda url, settings, on_wait: client)
    monkeypatch.setattr(client, "close", lambda: None)
    yield client
    stop()


def record(folder: Path, verdicts) -> Path:
    """A run folder, as far as learning reads it."""
    with Ledger(folder / "ledger.sqlite") as ledger:
        for verdict in verdicts:
            ledger.record_local(replace(verdict, where=Where.EDGE), pending_cloud=False).result()
    return folder


def run_of(folder: Path, parts, station: Station | None = None) -> Path:
    return record(folder, judged(station or fitted(), parts))


def of_two_products(line: Line) -> None:
    """Put a station in the line's place that knows a second product, the sheet."""
    station = fitted()
    both = {name: station.model(PRODUCT) for name in (PRODUCT, "sheet")}
    shutil.rmtree(line.station)
    files = {name: hashlib.sha256(data).hexdigest() for name, data in station_files(both).items()}
    Station(both, replace(station.manifest, products=tuple(both), files=files)).save(line.station)


def once(run: Path, line: Line, *more: object):
    return saec("learn", "once", run, "--station", line.station, "--cloud", URL, "--set", "edge.threads=1", *more)


def test_a_round_is_told_with_what_its_proof_is_worth(tmp_path, line, desk):
    found = once(run_of(tmp_path / "run", new_parts(tmp_path / "parts", 9)), line)
    assert found.code == 0, found.err
    assert (
        "plate: version 1 counts from now on, taught in the cloud; not proven (1 probe part, it takes 5)." in found.out
    )
    assert "100.0\N{NARROW NO-BREAK SPACE}%" in found.out
    more = run_of(tmp_path / "more", new_parts(tmp_path / "others", 24, first=100))
    assert "version 2 counts from now on, taught in the cloud." in once(more, line).out


def test_a_line_that_teaches_itself_says_so(tmp_path, line, monkeypatch):
    client = DeskClient(tmp_path / "cloud", SETTINGS)
    monkeypatch.setattr("saec.cloud.learning.LearnClient", lambda url, settings, on_wait: client)
    assert "taught on the line" in once(run_of(tmp_path / "run", new_parts(tmp_path / "parts", 6)), line).out


def test_a_dropped_update_is_a_failed_gate(tmp_path, line, desk):
    parts = [*good_parts(tmp_path, 20, first=300), *defects(tmp_path, 20, first=300)]
    verdicts = judged(fitted(), parts)
    rows = []
    for verdict in verdicts:
        lie = Label.GOOD if verdict.truth is Label.DEFECT else Label.DEFECT
        rows.append(f"{verdict.sha256},{verdict.truth if for_probe(verdict.sha256) else lie}")
    (tmp_path / "labels.csv").write_text("\n".join(["part,label", *rows]) + "\n")
    found = once(record(tmp_path / "run", verdicts), line, "--labels", tmp_path / "labels.csv")
    assert found.code == 1
    assert "version 1 was worse on the probe set and was dropped; nothing has changed" in found.out
    assert "gate failed: worse on the probe set and dropped: version 1" in found.err
    assert Slots(line.station).pointer.current.version == 0


def test_opinions_that_failed_are_told(tmp_path, line, monkeypatch):
    def some(query):
        return ValueError("this model takes no such part") if query.part_id == "fine-2" else knows(query)

    client = DeskClient(tmp_path / "cloud", SETTINGS, some)
    monkeypatch.setattr("saec.cloud.learning.LearnClient", lambda url, settings, on_wait: client)
    found = once(run_of(tmp_path / "run", new_parts(tmp_path / "parts", 6)), line)
    assert "1 sample could not be judged; the first: this model takes no such part" in found.out


def test_a_round_of_another_run_is_ended_first_and_named(tmp_path, line, desk):
    two = run_of(tmp_path / "two", new_parts(tmp_path / "parts2", 6))
    one = run_of(tmp_path / "one", new_parts(tmp_path / "parts1", 4, first=50))
    desk.broken = "start"
    assert once(two, line).error().endswith("(call again to go on)")
    found = once(one, line, "--json")
    assert "plate: goes on with the round begun at 2" in found.err
    tree = json.loads(found.out)[PRODUCT]
    assert (tree["earlier"]["samples"], tree["samples"]) == (6, 4)


def test_why_there_is_nothing_to_learn_is_said(tmp_path, line, desk):
    parts = new_parts(tmp_path / "parts", 6)
    run = run_of(tmp_path / "run", parts)
    once(run, line)
    found = once(run, line)
    assert found.code == 0
    assert "nothing to learn from: 6 parts learnt from before, 0 gone or changed, 0 that the router did" in found.out


def test_images_that_are_gone_are_no_lack_of_news(tmp_path, line, desk):
    run = run_of(tmp_path / "run", new_parts(tmp_path / "parts", 4))
    shutil.rmtree(tmp_path / "parts")
    found = once(run, line)
    assert "4 images are not there any more" in found.error()
    assert "call from the folder that saec inspect was called from" in found.error()


def test_images_are_found_from_another_folder_than_the_inspection_was_called_from(tmp_path, line, desk, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = [replace(part, path=part.path.relative_to(tmp_path)) for part in new_parts(tmp_path / "parts", 4)]
    run = run_of(tmp_path / "runs" / "run", parts)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "version 1 counts" in once(run, line).out


def test_labels_are_matched_aloud(tmp_path, line, desk):
    run = run_of(tmp_path / "run", new_parts(tmp_path / "parts", 4))
    labels = tmp_path / "labels.csv"
    labels.write_text("part,label\nbad-0,good\nnobody,good\n")
    assert "1 of 2 labels are about parts of this run; not about any: nobody" in once(run, line, "--labels", labels).err
    labels.write_text("part,label\nnobody,good\n")
    assert "such as bad-0; they are about nobody" in once(run, line, "--labels", labels).error()
    labels.write_text("part,label\n")
    assert "there are none" in once(run, line, "--labels", labels).error()


def test_two_at_a_time_are_one_and_a_clear_line(tmp_path, line, desk):
    run = run_of(tmp_path / "run", new_parts(tmp_path / "parts", 4))
    with alone(line.home):
        assert "this product learns already" in once(run, line).error()


def test_each_product_is_told_though_another_fails(tmp_path, line, desk):
    of_two_products(line)
    verdicts = judged(fitted(), new_parts(tmp_path / "parts", 4))
    other = judged(fitted(), new_parts(tmp_path / "others", 4, first=60))
    run = record(tmp_path / "run", [*verdicts, *(replace(each, product="sheet") for each in other)])
    sheet = Line(line.station, "sheet", SETTINGS).home
    sheet.mkdir(parents=True)
    (sheet / ROUND).write_text("{}")
    found = once(run, line)
    assert "plate: version 1 counts from now on" in found.out
    assert "the round is damaged" in found.error()


def test_where_the_service_goes_away_the_other_products_are_not_begun(tmp_path, line, desk):
    of_two_products(line)
    run = run_of(tmp_path / "run", new_parts(tmp_path / "parts", 2))
    desk.broken = "start"
    found = once(run, line)
    assert (found.code, "Not begun: sheet." in found.err) == (2, True)


def test_a_service_that_is_not_there_is_told_at_once(tmp_path, line):
    run = run_of(tmp_path / "run", new_parts(tmp_path / "parts", 2))
    assert "the cloud did not answer (no connection" in once(run, line).error()
    assert "correct the address" in once(run, line).error()
    assert not (line.home / ROUND).exists()


def test_a_service_that_does_not_answer_the_question_fails_its_job_with_the_reason(tmp_path, line, monkeypatch):
    client = DeskClient(tmp_path / "cloud", SETTINGS, lambda query: ValueError("the expert takes no tokens"))
    monkeypatch.setattr("saec.cloud.learning.LearnClient", lambda url, settings, on_wait: client)
    run = run_of(tmp_path / "run", new_parts(tmp_path / "parts", 3))
    said = once(run, line).error()
    assert "none of the 3 samples could be judged; the first: the expert takes no tokens" in said
    assert "the round is closed, and its samples come again with the next one" in said


def test_nothing_sure_enough_is_said(tmp_path, line, monkeypatch):
    client = DeskClient(tmp_path / "cloud", SETTINGS, lambda query: Opinion(0.55, Evidence(), "unsure"))
    monkeypatch.setattr("saec.cloud.learning.LearnClient", lambda url, settings, on_wait: client)
    found = once(run_of(tmp_path / "run", new_parts(tmp_path / "parts", 3)), line)
    assert "no update: no opinion was sure enough to learn from" in found.out
