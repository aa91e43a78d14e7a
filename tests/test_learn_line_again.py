"""What a round leaves behind, and what the next call makes of it: uplinks, other services, rollbacks, new arguments."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from edge_parts import SETTINGS, defects, good_parts
from learn_parts import DeskClient, current, judged, line_of, new_parts, one_round, sampler
from saec.cloud.learning import JobFailed
from saec.config import Settings
from saec.edge.station import Station, station_files
from saec.errors import BadInput
from saec.fleet.outbox import Outbox, OutboxFull
from saec.fleet.slots import Slots
from saec.learn.line import OUTBOX, learn
from saec.learn.past import past_samples
from saec.learn.round import ROUND, RoundOver, alone
from saec.learn.rulings import OPINIONS, open_rulings
from saec.learn.samples import for_probe
from saec.types import CloudError, Label, Reason, Tokens


@pytest.fixture
def line(tmp_path):
    return line_of(tmp_path)


@pytest.fixture
def client(tmp_path, line):
    client = DeskClient(tmp_path / "cloud", SETTINGS, station=line.station)
    yield client
    client.close()


def with_settings(line, **sections):
    tree = line.settings.model_dump()
    return replace(
        line,
        settings=Settings.model_validate(
            {k: {**tree[k], **v} for k, v in sections.items()} | {k: v for k, v in tree.items() if k not in sections}
        ),
    )


def tokens_of(line):
    """Makes samples of tokens: of this line no image may go up."""
    plain = sampler(current(line))

    def sample_of(verdict, human):
        sample = plain(verdict, human)
        tokens = Tokens(np.ones((2, 3), np.int8), 1.0, np.arange(2, dtype=np.int32), 4, "tower")
        return replace(sample, query=replace(sample.query, image=None, tokens=tokens))

    return sample_of


def images_in(client) -> int:
    return sum("image" in frame.arrays for frame in client.sent)


def kill_before(monkeypatch, what):
    """As a kill there would."""
    monkeypatch.setattr(what, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))


def test_no_image_goes_up_under_tokens_though_a_killed_round_has_left_some(tmp_path, line, client, monkeypatch):
    verdicts = judged(current(line), new_parts(tmp_path / "parts", 5))
    with monkeypatch.context() as patched:
        kill_before(patched, "saec.learn.begin._saved")  # frames lie in the outbox, and no round names them
        with pytest.raises(KeyboardInterrupt):
            learn(line, verdicts, client, sampler(current(line)))
    with Outbox(line.home / OUTBOX, most_bytes=10**9) as outbox:
        assert len(outbox.pending()) == 5
    found = learn(with_settings(line, cloud={"uplink": "tokens"}), verdicts, client, tokens_of(line))
    assert (found.samples, len(client.sent), images_in(client)) == (5, 5, 0)


def test_an_open_round_of_images_is_begun_anew_where_tokens_are_to_go_up(tmp_path, line, client):
    verdicts = judged(current(line), new_parts(tmp_path / "parts", 5))
    client.broken = "send"
    with pytest.raises(CloudError):
        learn(line, verdicts, client, sampler(current(line)))
    told: list[str] = []
    found = learn(with_settings(line, cloud={"uplink": "tokens"}), [], client, tokens_of(line), tell=told.append)
    assert (found.samples, len(client.sent), images_in(client)) == (5, 5, 0)
    assert "goes on with the round begun at 2" in told[0]
    assert "samples go up as tokens now, not as image: the round is begun anew" in told[1]


def test_a_part_without_tokens_stays_here_where_no_image_may_go_up(tmp_path, line, client):
    strict = with_settings(line, cloud={"uplink": "tokens"})
    with pytest.raises(BadInput, match="no tokens of this part, and no image may go up"):
        one_round(strict, client, new_parts(tmp_path / "parts", 3))
    assert not client.sent


def test_another_service_gets_the_frames_that_only_the_first_one_has(tmp_path, line, client):
    client.broken = "start"
    with pytest.raises(CloudError):
        one_round(line, client, new_parts(tmp_path / "parts", 6))
    other = DeskClient(tmp_path / "other", SETTINGS, station=line.station)
    told: list[str] = []
    found = one_round(line, other, [], tell=told.append)
    other.close()
    assert found.applied.kept
    assert len(other.sent) == 6
    assert "the service lacks 6 frames; they go up again" in told[1]


def test_a_round_whose_images_are_gone_too_is_closed_with_a_word(tmp_path, line, client):
    parts = new_parts(tmp_path / "parts", 6)
    client.broken = "start"
    with pytest.raises(CloudError):
        one_round(line, client, parts)
    other = DeskClient(tmp_path / "other", SETTINGS, station=line.station)
    station = current(line)
    with pytest.raises(RoundOver, match="the images of its samples are gone"):
        learn(line, judged(station, parts), other, lambda verdict, human: None)
    other.close()
    assert not (line.home / ROUND).exists()


def test_a_job_that_failed_for_good_closes_its_round_and_the_samples_come_again(tmp_path, line, client, monkeypatch):
    parts = new_parts(tmp_path / "parts", 6)
    with monkeypatch.context() as patched:
        patched.setattr(
            client,
            "finish",
            lambda *_, **__: (_ for _ in ()).throw(JobFailed(Reason.CLOUD_BAD_ANSWER, "the job failed: no such thing")),
        )
        with pytest.raises(RoundOver, match=r"the job failed: no such thing; the round is closed"):
            one_round(line, client, parts)
    assert not (line.home / ROUND).exists()
    assert one_round(line, client, []).samples == 6, "wherever the next round's own parts come from"


def test_lessons_that_the_station_has_learnt_already_are_a_result_and_no_failure(tmp_path, line, client, monkeypatch):
    parts = new_parts(tmp_path / "parts", 9)
    assert one_round(line, client, parts).applied.kept
    monkeypatch.setattr("saec.learn.begin.known_parts", lambda *_: set())
    for teacher in (client, DeskClient(tmp_path / "without", SETTINGS)):
        found = one_round(line, teacher, parts)
        assert (found.samples, found.applied) == (9, None)
        assert found.nothing == "the station had learnt all of it before"
        assert not (line.home / ROUND).exists()
    teacher.close()


def test_a_round_that_is_open_at_a_rollback_is_begun_anew(tmp_path, line, client):
    assert one_round(line, client, new_parts(tmp_path / "one", 9)).applied.version == 1
    client.broken = "finish"
    with pytest.raises(CloudError):
        one_round(line, client, new_parts(tmp_path / "two", 9, first=100))
    Slots(line.station).back()
    told: list[str] = []
    found = one_round(line, client, [], tell=told.append)
    assert "the station is at version 0 now: the round is begun anew" in told[1]
    assert (found.earlier.applied.version, found.earlier.applied.kept) == (2, True)
    # And what was taken back is taught again, together with it.
    assert (found.applied.version, found.applied.kept) == (3, True)


def test_what_a_rollback_took_back_is_learnt_again(tmp_path, line, client):
    parts = new_parts(tmp_path / "one", 9)
    assert one_round(line, client, parts).applied.version == 1
    assert one_round(line, client, parts).samples == 0
    Slots(line.station).back()
    found = one_round(line, client, [])
    assert found.applied.version == 2
    taught = {each.sha256 for each in found.rulings}
    assert taught == {each.taken.sha256 for each in past_samples(line.home) if not for_probe(each.taken.sha256)}
    assert taught <= set(current(line).model("plate").replay.hashes)


def test_right_labels_count_after_wrong_ones_were_dropped(tmp_path, line, client):
    parts = [*good_parts(tmp_path, 20, first=300), *defects(tmp_path, 20, first=300)]
    verdicts = judged(current(line), parts)
    flip = {Label.GOOD: Label.DEFECT, Label.DEFECT: Label.GOOD}
    wrong = {v.sha256: v.truth if for_probe(v.sha256) else flip[v.truth] for v in verdicts}
    first = learn(line, verdicts, client, sampler(current(line)), labels=wrong)
    assert not first.applied.kept
    right = {verdict.sha256: verdict.truth for verdict in verdicts}
    found = learn(line, verdicts, client, sampler(current(line)), labels=right)
    assert found.applied.kept
    replay = current(line).model("plate").replay
    learnt = dict(zip(replay.hashes, replay.p_defect, strict=True))
    assert all(learnt[sha256] == (label is Label.DEFECT) for sha256, label in right.items() if not for_probe(sha256))


def test_a_person_may_correct_a_label_of_their_own(tmp_path, line, client):
    verdicts = judged(current(line), new_parts(tmp_path / "parts", 9))
    one = next(verdict.sha256 for verdict in verdicts if not for_probe(verdict.sha256))
    for label in (Label.GOOD, Label.DEFECT):
        learn(line, verdicts, client, sampler(current(line)), labels={one: label})
        replay = current(line).model("plate").replay
        assert replay.p_defect[replay.hashes.index(one)] == (label is Label.DEFECT)


def test_a_round_of_other_parts_is_ended_first_and_then_the_new_one_is_run(tmp_path, line, client):
    client.broken = "start"
    with pytest.raises(CloudError):
        one_round(line, client, new_parts(tmp_path / "two", 6))
    mine = new_parts(tmp_path / "one", 4, first=100)
    found = one_round(line, client, mine)
    assert (found.earlier.samples, found.samples) == (6, 4)
    assert {ruling.part_id for ruling in found.rulings} == {part.part_id for part in mine}


def test_the_same_call_again_ends_its_round_and_begins_no_other(tmp_path, line, client):
    small = with_settings(line, learn={"samples": 4})
    parts = new_parts(tmp_path / "parts", 9)
    client.broken = "start"
    with pytest.raises(CloudError):
        one_round(small, client, parts)
    found = one_round(small, client, parts)
    assert (found.samples, found.earlier) == (4, None)


def test_two_at_a_time_are_one_and_a_clear_line(tmp_path, line, client):
    with alone(line.home), pytest.raises(BadInput, match=r"learns already, in another process.*wait for it to end"):
        one_round(line, client, new_parts(tmp_path / "parts", 3))


def test_a_kill_while_a_round_is_closed_doubles_no_opinion(tmp_path, line, client, monkeypatch):
    parts = new_parts(tmp_path / "parts", 6)
    with monkeypatch.context() as patched:
        kill_before(patched, "saec.learn.line.add_past")
        with pytest.raises(KeyboardInterrupt):
            one_round(line, client, parts)
    one_round(line, client, [])
    assert len(open_rulings(line.home / OPINIONS)) == 6


GOOD = {"part_id": "p", "p_defect": 1.0, "who": "model", "model_id": "m", "asked": "x"}


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"opinions": [], "update": "../../../x"},
        {"opinions": [{"sha256": "zz"}]},
        {"opinions": [{"frame": "nope"}]},
        {"opinions": [{"frame": "1" * 64}]},
        {"opinions": [{"sha256": "1" * 64}]},
        {"opinions": [{"p_defect": 7.0}]},
        {"opinions": [{}, {}]},
    ],
)
def test_a_service_that_breaks_the_contract_is_told_in_one_line_and_leaves_no_trace(
    tmp_path, line, client, monkeypatch, broken
):
    def finish(job_id, **_):
        frame, sample = next(iter(json.loads((line.home / ROUND).read_text())["samples"].items()))
        told = {"frame": frame, "sha256": sample["verdict"]["sha256"], **GOOD}
        opinions = [{**told, **each} for each in broken.get("opinions", [])]
        job = client.desk.job(job_id)
        return job.model_copy(update={"result": {**broken, "opinions": opinions} if broken else {}})

    monkeypatch.setattr(client, "finish", finish)
    with pytest.raises(RoundOver, match="the service's answer cannot be used") as error:
        one_round(line, client, new_parts(tmp_path / "parts", 3))
    assert "remove the file" not in str(error.value)
    assert open_rulings(line.home / OPINIONS) == []
    assert not (line.home / ROUND).exists()


def test_a_round_is_as_large_as_the_outbox_and_the_next_one_takes_the_rest(tmp_path, line, client):
    parts = new_parts(tmp_path / "parts", 6)
    one_round(line, client, parts[:1])
    tight = with_settings(line, learn={"outbox_bytes": 3 * client.bytes_up + client.bytes_up // 2})
    found = one_round(tight, client, parts[1:])
    assert 0 < found.samples < 5
    assert found.passed.left == 5 - found.samples
    assert one_round(tight, client, parts[1:]).samples == found.passed.left
    with pytest.raises(OutboxFull, match=r"learn\.outbox_bytes"):
        one_round(with_settings(line, learn={"outbox_bytes": 10}), client, new_parts(tmp_path / "more", 2, first=50))


def test_why_a_part_is_no_sample_is_counted(tmp_path, line, client):
    parts = new_parts(tmp_path / "parts", 6)
    one_round(line, client, parts[:3])
    station = current(line)
    sure = judged(station, new_parts(tmp_path / "sure", 2, first=70), asked=False)
    found = learn(line, [*judged(station, parts), *sure], client, lambda verdict, human: None)
    passed = found.passed
    assert (found.samples, passed.known, passed.gone, passed.unwanted) == (0, 3, 3, 2)


def test_a_station_that_cannot_be_taught_is_told_before_anything_goes_up(tmp_path, line, client):
    model = replace(current(line).model("plate"), replay=None)
    files = {name: hashlib.sha256(data).hexdigest() for name, data in station_files({"plate": model}).items()}
    Station({"plate": model}, replace(current(line).manifest, files=files)).save(line.station)
    with pytest.raises(BadInput, match="cannot be taught: its station holds no replay"):
        one_round(line, client, new_parts(tmp_path / "parts", 3))
    assert not client.sent
