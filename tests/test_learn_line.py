"""A round of learning on the line: what goes up, what comes down, and what a cut in the middle leaves."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

import saec.learn.line
from edge_parts import SETTINGS, defects, good_parts
from learn_parts import DeskClient, accuracy, current, fitted, judged, line_of, new_parts, one_round, sampler
from saec.errors import BadInput
from saec.fleet.slots import Slots
from saec.learn.line import learn
from saec.learn.probe import probe_set
from saec.learn.round import ROUND
from saec.learn.rulings import OPINIONS, open_rulings
from saec.learn.samples import for_probe
from saec.types import CloudError, Evidence, Label, Opinion


@pytest.fixture
def line(tmp_path):
    return line_of(tmp_path)


@pytest.fixture
def client(tmp_path, line):
    client = DeskClient(tmp_path / "cloud", SETTINGS, station=line.station)
    yield client
    client.close()


def test_a_round_on_a_new_product_makes_the_edge_better_there(tmp_path, line, client):
    fresh = new_parts(tmp_path / "later", 18, first=300)
    before = accuracy(fitted(), fresh)
    found = one_round(line, client, new_parts(tmp_path / "parts", 36))
    assert found.applied.kept
    assert found.taught == "cloud"
    assert accuracy(current(line), fresh) >= before + 0.3
    assert found.bytes_up > 0 < found.bytes_down == found.update_bytes
    assert found.applied.after >= found.applied.before


def test_nothing_of_the_probe_set_is_taught(tmp_path, line, client):
    one_round(line, client, new_parts(tmp_path / "parts", 18))
    learnt = set(current(line).model("plate").replay.hashes)
    probes = {ruling.sha256 for ruling in probe_set(line.home, (), line.settings)}
    assert probes
    assert not probes & learnt
    assert all(map(for_probe, probes))


@pytest.mark.parametrize("call", ["send", "start", "finish", "download"])
def test_a_round_that_was_cut_off_goes_on_and_comes_to_the_same(tmp_path, line, client, call):
    parts = new_parts(tmp_path / "parts", 9)
    client.broken = call
    with pytest.raises(CloudError, match="cut off"):
        one_round(line, client, parts)
    assert Slots(line.station).pointer.highest == 0
    found = one_round(line, client, [])
    assert found.samples == 9
    assert found.applied.version == 1
    assert len(client.asked) == 9
    assert not (line.home / ROUND).exists()


@pytest.mark.parametrize("where", ["cloud", "line"])
def test_a_kill_after_the_switch_is_no_replay(tmp_path, line, monkeypatch, where):
    client = DeskClient(tmp_path / "cloud", SETTINGS, station=line.station if where == "cloud" else None)
    verdicts = judged(current(line), new_parts(tmp_path / "parts", 9))
    with monkeypatch.context() as patched:
        patched.setattr(saec.learn.line, "_close", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            learn(line, verdicts, client, sampler(current(line)))
    assert Slots(line.station).pointer.highest == 1
    found = learn(line, verdicts, client, sampler(current(line)))
    client.close()
    assert (found.taught, found.applied.version, found.applied.kept) == (where, 1, True)
    assert Slots(line.station).pointer.highest == 1


def test_no_part_goes_up_twice(tmp_path, line, client):
    parts = new_parts(tmp_path / "parts", 9)
    one_round(line, client, parts)
    assert one_round(line, client, parts).samples == 0
    assert one_round(line, client, new_parts(tmp_path / "more", 5, first=40)).samples == 5


def test_a_person_may_correct_what_the_model_has_said_once(tmp_path, line, client):
    parts = new_parts(tmp_path / "parts", 9)
    one_round(line, client, parts)
    verdicts = judged(current(line), parts)
    wrong = next(verdict.sha256 for verdict in verdicts if not for_probe(verdict.sha256))
    for samples in (1, 0):
        found = learn(line, verdicts, client, sampler(current(line)), labels={wrong: Label.GOOD})
        assert found.samples == samples
    replay = current(line).model("plate").replay
    assert replay.p_defect[replay.hashes.index(wrong)] == 0


def test_an_update_that_is_worse_on_the_probe_set_is_not_applied(tmp_path, line, client):
    parts = [*good_parts(tmp_path, 20, first=300), *defects(tmp_path, 20, first=300)]
    verdicts = judged(current(line), parts)
    truth = {verdict.part_id: verdict for verdict in verdicts}

    def lies(query):
        """It is right about the probe set, and wrong about all that is taught."""
        verdict = truth[query.part_id]
        bad = (verdict.truth is Label.DEFECT) is for_probe(verdict.sha256)
        return Opinion(0.95 if bad else 0.05, Evidence(), "liar")

    liar = DeskClient(tmp_path / "liar", SETTINGS, lies, station=line.station)
    found = learn(line, verdicts, liar, sampler(current(line)))
    liar.close()
    assert found.applied.before > found.applied.after
    assert not found.applied.kept
    assert Slots(line.station).current() == line.station
    # The next round starts from what counts, with a number that was not used before.
    assert one_round(line, client, new_parts(tmp_path / "more", 9, first=400)).applied.version == 2


def test_where_the_cloud_has_no_copy_of_the_station_the_line_teaches_itself(tmp_path, line):
    client = DeskClient(tmp_path / "cloud", SETTINGS)
    found = one_round(line, client, new_parts(tmp_path / "parts", 18))
    client.close()
    assert found.taught == "line"
    assert found.applied.kept
    assert found.bytes_down == 0 < found.update_bytes


def test_what_people_say_wins_and_is_kept_with_who_said_it(tmp_path, line, client):
    parts = new_parts(tmp_path / "parts", 12)
    verdicts = judged(current(line), parts)
    found = one_round(line, client, parts, labels={verdicts[0].sha256: Label.GOOD})
    ruling = next(each for each in found.rulings if each.sha256 == verdicts[0].sha256)
    assert (ruling.who, ruling.label) == ("human", Label.GOOD)  # the teacher would have said defect
    assert verdicts[0].part_id not in {query.part_id for query in client.asked}
    kept = open_rulings(line.home / OPINIONS)
    assert {each.sha256 for each in kept} == {verdict.sha256 for verdict in verdicts}
    assert {each.who for each in kept} == {"human", "model"}
    assert all(each.asked and each.frame for each in kept)


def test_without_compression_the_update_is_larger_and_teaches_the_same(tmp_path):
    sizes, replays = [], []
    for number, without in enumerate(((), ("compression",))):
        line = line_of(tmp_path / str(number))
        client = DeskClient(tmp_path / str(number) / "cloud", SETTINGS, station=line.station)
        found = one_round(line, client, new_parts(tmp_path / "parts", 9), without=without)
        client.close()
        sizes.append(found.update_bytes)
        replays.append(current(line).model("plate").replay.hashes)
    assert sizes[0] < sizes[1]
    assert replays[0] == replays[1]


def test_a_damaged_round_is_named_in_one_line(tmp_path, line, client):
    line.home.mkdir(parents=True)
    for text in ("{half", "{}", "[]"):
        (line.home / ROUND).write_text(text)
        with pytest.raises(BadInput, match=r"the round is damaged.*round\.json \(remove the file"):
            one_round(line, client, [])


def test_the_round_on_the_disk_holds_no_image(tmp_path, line, client):
    client.broken = "start"
    with pytest.raises(CloudError):
        one_round(line, client, new_parts(tmp_path / "parts", 6))
    tree = json.loads((line.home / ROUND).read_text())
    assert {Path(sample["verdict"]["path"]).name for sample in tree["samples"].values()} == {
        f"{n:03}.png" for n in range(6)
    }
