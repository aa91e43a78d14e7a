"""Whose word counts, how the model is asked, and what is remembered of it."""

from __future__ import annotations

import weakref
from dataclasses import asdict, replace

import numpy as np
import pytest

from edge_parts import SETTINGS, plate
from learn_parts import PRODUCT, DeskClient, fitted, judged, knows, line_of, new_parts, sampler
from saec.config import LearnSettings
from saec.edge.station import Station
from saec.errors import BadInput
from saec.fleet.frame import Frame
from saec.learn.judged import LABELS
from saec.learn.line import learn
from saec.learn.probe import allowed_loss, is_proven
from saec.learn.rulings import OPINIONS, Ruling, append_rulings, open_rulings, parse_rulings, read_labels
from saec.learn.samples import decode_sample, encode_sample
from saec.learn.state import station_state
from saec.learn.teacher import Teacher
from saec.learn.teaching import lessons_of
from saec.learn.update import decode_update
from saec.types import Label

LEARN = LearnSettings()
PIXELS = plate(0).shape[0] * plate(0).shape[1]


def frames(tmp_path, count: int, *, heat: float = 1.0, human: Label | None = None) -> dict[str, Frame]:
    station = fitted()
    sample_of = sampler(station)
    found = {}
    for number, verdict in enumerate(judged(station, new_parts(tmp_path / "parts", count))):
        sample = sample_of(verdict, human)
        hot = replace(sample, query=replace(sample.query, anomaly_map=sample.query.anomaly_map * np.float32(heat)))
        found[f"{number:064x}"] = encode_sample(hot, SETTINGS.cloud)
    return found


class Asked:
    """A judge that remembers what it was asked."""

    def __init__(self):
        self.queries = []

    def __call__(self, queries):
        self.queries += queries
        return [knows(query) for query in queries]


def run(teacher, some, judge, **request):
    tree = {"product": PRODUCT, "frames": list(some), "learn": LEARN.model_dump(mode="json"), **request}
    return teacher(tree, some.__getitem__, judge, lambda done, total: None)


def test_without_a_copy_of_the_station_there_are_opinions_and_no_update(tmp_path):
    some, judge = frames(tmp_path, 4), Asked()
    result = run(Teacher(tmp_path / "home", SETTINGS), some, judge)
    assert set(result) == {"opinions"}
    assert [each["p_defect"] for each in result["opinions"]] == [0.95, 0.05, 0.05, 0.95]
    assert {each["model_id"] for each in result["opinions"]} == {"oracle"}


def test_maps_are_shown_relative_to_the_samples_own_background(tmp_path):
    shown = []
    for number, heat in enumerate((1.0, 2.5)):
        judge = Asked()
        some = frames(tmp_path, 5, heat=heat)
        run(Teacher(tmp_path / str(number), SETTINGS), some, judge, background=(0.5, 0.6))
        shown.append(np.stack([query.anomaly_map for query in judge.queries]))
    np.testing.assert_allclose(shown[0], shown[1], rtol=0.04)  # both maps are quantised
    assert np.median(np.median(shown[0], axis=(1, 2))) == pytest.approx(0.5, rel=0.01)


def test_maps_as_hot_as_good_parts_can_be_stay_as_they_are(tmp_path):
    some, judge = frames(tmp_path, 5, heat=1.0), Asked()
    run(Teacher(tmp_path / "home", SETTINGS), some, judge, background=(0.5, 9.0))
    sent = [decode_sample(frame, max_pixels=10**6).query.anomaly_map for frame in some.values()]
    for query, heatmap in zip(judge.queries, sent, strict=True):
        np.testing.assert_array_equal(query.anomaly_map, heatmap)


def test_the_model_is_not_told_what_the_edge_thinks(tmp_path):
    judge = Asked()
    run(Teacher(tmp_path / "home", SETTINGS), frames(tmp_path, 3), judge)
    assert {query.edge_p_defect for query in judge.queries} == {None}
    assert not any(query.evidence for query in judge.queries)


def test_what_was_said_about_a_frame_is_said_again_without_asking(tmp_path):
    some, judge = frames(tmp_path, 4), Asked()
    first = run(Teacher(tmp_path / "home", SETTINGS), some, judge)
    again = run(Teacher(tmp_path / "home", SETTINGS), some, judge)  # another process
    assert first == again
    assert len(judge.queries) == 4


def test_a_part_on_which_the_model_has_no_opinion_is_left_out(tmp_path):
    def judge(queries):
        return [ValueError("no such product") if query.part_id.startswith("bad") else knows(query) for query in queries]

    result = run(Teacher(tmp_path / "home", SETTINGS), frames(tmp_path, 4), judge)
    assert [each["part_id"] for each in result["opinions"]] == ["fine-1", "fine-2"]
    assert (result["failed"], result["failure"]) == (2, "no such product"), "and is told"


def test_a_job_of_which_nothing_can_be_judged_fails_with_the_reason(tmp_path, caplog):
    def judge(queries):
        return [ValueError("the expert takes no tokens") for _ in queries]

    with pytest.raises(BadInput, match="none of the 3 samples could be judged; the first: the expert takes no tokens"):
        run(Teacher(tmp_path / "home", SETTINGS), frames(tmp_path, 3), judge)
    assert caplog.text.count("the expert takes no tokens") == 3


def test_a_sample_that_cannot_be_used_keeps_no_other_from_being_judged(tmp_path):
    some = frames(tmp_path, 3)
    some[f"{1:064x}"] = Frame("sample", {"part_id": "half"})
    result = run(Teacher(tmp_path / "home", SETTINGS), some, Asked())
    assert [each["part_id"] for each in result["opinions"]] == ["bad-0", "fine-2"]
    assert result["failed"] == 1
    assert "not a sample" in result["failure"]


def test_a_persons_changed_word_is_kept_too(tmp_path):
    some, teacher = frames(tmp_path, 1), Teacher(tmp_path / "home", SETTINGS)
    for label in ("good", "defect", "defect"):
        (tmp_path / "home" / LABELS).write_text(f"part,label\nbad-0,{label}\n")
        run(teacher, some, Asked())
    assert [each.label for each in open_rulings(tmp_path / "home" / OPINIONS)] == ["good", "defect"]


def test_images_are_decoded_a_few_at_a_time(tmp_path, monkeypatch):
    """Alive at once: those of one batch, in which pixels are limited too, not those of the job."""
    some, alive, counts = frames(tmp_path, 12), [], []

    def read(frame, *, max_pixels):
        sample = decode_sample(frame, max_pixels=10**9)
        alive.append(weakref.ref(sample.query.image))
        counts.append(sum(each() is not None for each in alive))
        return sample

    monkeypatch.setattr("saec.learn.teacher.decode_sample", read)
    for pixels, limit in ((10**9, 9), (2 * PIXELS, 4)):
        counts.clear()
        serve = SETTINGS.serve.model_copy(update={"max_pixels": pixels})
        settings = SETTINGS.model_copy(update={"serve": serve})
        run(Teacher(tmp_path / str(pixels), settings), some, lambda queries: [knows(query) for query in queries])
        assert max(counts) <= limit


def test_lessons_beyond_what_memory_is_for_wait_for_the_next_round(tmp_path, monkeypatch):
    line = line_of(tmp_path)
    monkeypatch.setattr("saec.learn.teacher.LESSONS", 3)
    small = SETTINGS.serve.model_copy(update={"max_pixels": PIXELS})
    settings = SETTINGS.model_copy(update={"serve": small})
    client = DeskClient(tmp_path / "cloud", settings, station=line.station)
    taught = []
    for _ in range(2):
        station = Station.load(line.station, settings=SETTINGS)
        parts = new_parts(tmp_path / "parts", 7)
        assert learn(line, judged(station, parts), client, sampler(station)).taught == "cloud"
        replay = Station.load(line.station, settings=SETTINGS).model(PRODUCT).replay
        taught.append(int(replay.lesson.sum()))
    client.close()
    assert taught[0] == 3 < taught[1]


def test_a_service_whose_station_lacks_the_product_sends_opinions(tmp_path):
    line = line_of(tmp_path)
    result = run(
        Teacher(tmp_path / "home", SETTINGS, station=line.station),
        frames(tmp_path, 3),
        Asked(),
        state="0" * 64,
        product="bottle",
    )
    assert set(result) == {"opinions"}


def test_a_request_does_not_set_the_services_limits(tmp_path, monkeypatch):
    line, rows = line_of(tmp_path, learn={"bank_rows": 500, "bank_most": 100_000}), []
    for number, allowed in enumerate((500, 5)):
        own = SETTINGS.model_copy(update={"learn": LearnSettings(bank_rows=allowed)})
        teacher = Teacher(tmp_path / str(number), own, station=line.station)
        state = station_state(line.station, PRODUCT).sha256
        asked = line.settings.learn.model_dump(mode="json")
        result = run(teacher, frames(tmp_path, 9), Asked(), state=state, learn=asked)
        rows.append(decode_update(result["update"], None, 10**9).figures["rows"])
    assert rows[0] > 5 == rows[1]


def test_a_list_of_labels_in_the_clouds_folder_wins_over_the_model(tmp_path):
    some, judge = frames(tmp_path, 3), Asked()
    teacher = Teacher(tmp_path / "home", SETTINGS)
    run(teacher, some, judge)
    (tmp_path / "home" / LABELS).write_text("part,label\nbad-0,good\n")  # while the service runs
    result = run(teacher, some, judge)
    assert (result["opinions"][0]["who"], result["opinions"][0]["p_defect"]) == ("human", 0.0)
    assert [each["who"] for each in result["opinions"]][1:] == ["model", "model"]
    assert len(open_rulings(tmp_path / "home" / OPINIONS)) == 4


def test_a_label_beside_the_sample_wins_over_the_model(tmp_path):
    judge = Asked()
    result = run(Teacher(tmp_path / "home", SETTINGS), frames(tmp_path, 2, human=Label.DEFECT), judge)
    assert {(each["who"], each["p_defect"]) for each in result["opinions"]} == {("human", 1.0)}
    assert not judge.queries


def test_beside_a_persons_label_it_is_kept_what_the_cloud_had_said(tmp_path):
    sample_of, (verdict,) = sampler(fitted()), judged(fitted(), new_parts(tmp_path / "parts", 1))
    sample = replace(sample_of(verdict, Label.DEFECT), p_cloud=0.2)
    result = run(Teacher(tmp_path / "home", SETTINGS), {"0" * 64: encode_sample(sample, SETTINGS.cloud)}, Asked())
    (ruling,) = open_rulings(tmp_path / "home" / OPINIONS)
    assert result["opinions"][0]["p_cloud"] == ruling.p_cloud == 0.2
    (lesson,) = lessons_of([replace(ruling, sha256="1" * 64)], lambda _: np.zeros((8, 8, 3), np.uint8), LEARN)
    assert (lesson.p_defect, lesson.p_cloud) == (1.0, 0.2)


def test_a_request_that_breaks_the_contract_fails_in_one_line(tmp_path):
    with pytest.raises(BadInput, match="not a request to learn: frames"):
        run(Teacher(tmp_path / "home", SETTINGS), {"short": None}, Asked())


def test_another_state_than_the_clouds_copy_is_not_taught(tmp_path):
    line = line_of(tmp_path)
    teacher = Teacher(tmp_path / "home", SETTINGS, station=line.station)
    assert "update" not in run(teacher, frames(tmp_path, 3), Asked(), state="0" * 64)


def test_the_state_that_was_taught_can_be_taught_further(tmp_path):
    line = line_of(tmp_path)
    client = DeskClient(tmp_path / "cloud", SETTINGS, station=line.station)
    for number in range(2):
        station = Station.load(line.station, settings=SETTINGS)
        parts = new_parts(tmp_path / str(number), 8, first=100 * number)
        found = learn(line, judged(station, parts), client, sampler(station))
        assert (found.taught, found.applied.version) == ("cloud", number + 1)
    client.close()


def ruling(p: float, who: str = "model", sha256: str = "1" * 64) -> Ruling:
    return Ruling(sha256, "part", p, who, "oracle", "2026-01-01T00:00:00+00:00", "f" * 64)


def test_an_unsure_opinion_teaches_nothing_and_a_persons_always_counts():
    image = np.zeros((8, 8, 3), np.uint8)
    given = [ruling(0.6), ruling(0.71, sha256="2" * 64), ruling(0.1, sha256="3" * 64), ruling(1.0, "human")]
    lessons = lessons_of(given, lambda _: image, LEARN)
    assert [(lesson.label, lesson.weight) for lesson in lessons] == [("defect", 0.71), ("good", 0.9), ("defect", 1.0)]


def test_a_line_that_a_killed_process_left_unfinished_is_dropped_and_others_are_kept(tmp_path):
    file = tmp_path / "opinions.jsonl"
    append_rulings(file, [ruling(0.2)])
    with file.open("a") as stream:
        stream.write('{"sha256": "12')
    assert open_rulings(file) == [ruling(0.2)]
    append_rulings(file, [ruling(0.9)])
    assert open_rulings(file) == [ruling(0.2), ruling(0.9)]
    file.write_text('{"sha256": 1}\n')
    with pytest.raises(BadInput, match=r"not opinions.*opinions\.jsonl"):
        open_rulings(file)


@pytest.mark.parametrize("text", ["part,label\na,maybe\n", "part,label\n,good\n", "name,label\na,good\n"])
def test_a_list_of_labels_that_is_none_is_refused_with_its_line(tmp_path, text):
    file = tmp_path / "labels.csv"
    file.write_text(text)
    with pytest.raises(BadInput, match=r"labels\.csv, line 2"):
        read_labels(file)


def test_a_list_of_labels_is_read_as_spreadsheets_write_it(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text("\ufeffpart,label,remark\r\na/1.png, Defect ,\r\n" + "b" * 64 + ",good,ok\r\n")
    assert read_labels(file) == {"a/1.png": Label.DEFECT, "b" * 64: Label.GOOD}


@pytest.mark.parametrize(
    "wrong", [{"sha256": "zz"}, {"frame": "f"}, {"p_defect": 7.0}, {"p_cloud": -1.0}, {"scale": 0.0}]
)
def test_opinions_are_held_to_their_ranges(tmp_path, wrong):
    with pytest.raises(BadInput, match=f"not opinions.*{next(iter(wrong))}"):
        parse_rulings([{**asdict(ruling(0.2)), **wrong}], where="here")


def test_a_list_of_labels_that_is_not_there_is_named_once(tmp_path):
    with pytest.raises(BadInput) as error:
        read_labels(tmp_path / "nope.csv")
    assert str(error.value).count("nope.csv") == 1
    assert error.value.fix


@pytest.mark.parametrize(("parts", "loss"), [(0, 1.0), (1, 1.0), (5, 0.2), (100, 0.01), (400, 0.005)])
def test_an_update_may_cost_one_part_or_the_stated_loss(parts, loss):
    assert allowed_loss(parts, 0.005) == pytest.approx(loss)
    assert is_proven(parts) is (parts >= 5)
