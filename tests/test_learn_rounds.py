"""Rounds: every arm sees the same stream with its own station, and a killed run goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from saec.learn.apply import Applied
from saec.learn.line import Learnt
from saec.learn.rounds import ADAPTED, ARMS, RECORD, UNADAPTED, Inspected, figures, run_rounds
from saec.learn.rulings import Ruling
from saec.learn.stream import Stream
from saec.types import Label, Part, Reason, Verdict, Where


def some_parts(name: str, count: int) -> tuple[Part, ...]:
    return tuple(
        Part(f"{name}{n}", "plate", Path(f"{name}{n}.png"), Label.DEFECT if n % 3 == 0 else Label.GOOD)
        for n in range(count)
    )


STREAM = Stream(
    (some_parts("a", 6), some_parts("b", 6), some_parts("c", 6)), some_parts("held", 9), some_parts("old", 6)
)


class World:
    """A station is a folder with a number in it: so many of its mistakes has it learnt to avoid."""

    def __init__(self):
        self.inspected: list[tuple[str, str]] = []
        self.learnt: list[tuple[str, int, int]] = []
        self.killed_at: int | None = None

    def inspect(self, station, parts, out, mode, *, audited=False):
        assert not out.exists()
        out.mkdir()
        self.inspected.append((parts[0].part_id, mode))
        knows = int((station / "knows").read_text())
        found = []
        for number, part in enumerate(parts):
            right = mode == "cloud_only" or number < knows
            label = part.label if right else Label.DEFECT if part.label is Label.GOOD else Label.GOOD
            asked = mode == "cascade" and number >= knows
            verdict = Verdict(
                part_id=part.part_id,
                sha256=f"{abs(hash(part.part_id)):064x}",
                product=part.product,
                path=str(part.path),
                label=label,
                p_defect=0.5,
                where=Where.CLOUD if asked else Where.EDGE,
                reason=Reason.IN_BAND,
                edge_label=label,
                truth=part.label,
                escalated_for=Reason.IN_BAND if asked else None,
                uplink_bytes=10 if asked else 0,
            )
            found.append(verdict)
        return Inspected(found)

    def learn(self, arm, station, verdicts, labels):
        if self.killed_at == len(self.learnt):
            self.killed_at = None
            raise KeyboardInterrupt
        knows = int((station / "knows").read_text())
        self.learnt.append((arm.name, knows, len(labels)))
        (station / "knows").write_text(str(knows + 2))
        ruling = Ruling(verdicts[0].sha256, "a", 0.9, "model", "oracle", "now", "f" * 64)
        return Learnt(2, (ruling,), "cloud", Applied(1, station, 0.5, 1.0, kept=True), 7, 20, 7, 0.1)


@pytest.fixture
def station(tmp_path):
    folder = tmp_path / "station"
    folder.mkdir()
    (folder / "knows").write_text("0")
    return folder


def run(station, tmp_path, world, names=None):
    arms = [arm for arm in ARMS if names is None or arm.name in names]
    return run_rounds(STREAM, station, tmp_path / "out", world, arms=arms)


def test_every_arm_begins_with_the_station_as_it_was_fitted_and_keeps_what_it_learns(tmp_path, station):
    world = World()
    found = run(station, tmp_path, world)
    assert [arm["name"] for arm in found["arms"]] == [arm.name for arm in ARMS]
    by_arm = {arm["name"]: [round_["held_out"]["edge"] for round_ in arm["rounds"]] for arm in found["arms"]}
    assert by_arm[UNADAPTED] == [0, 0, 0]
    assert by_arm[ADAPTED] == pytest.approx([2 / 9, 4 / 9, 6 / 9])
    assert all(values == by_arm[ADAPTED] for name, values in by_arm.items() if name != UNADAPTED)
    assert (station / "knows").read_text() == "0"


def test_a_round_is_measured_before_it_is_learnt_from_and_the_held_out_parts_after(tmp_path, station):
    found = run(station, tmp_path, World(), {ADAPTED})
    first = found["arms"][0]["rounds"][0]
    assert first["stream"]["edge"] == 0
    assert first["held_out"]["edge"] > 0
    assert first["stream"]["escalated"] == 1
    assert first["stream"]["uplink_bytes"] == 60
    assert first["learnt"]["bytes_up"] == 20
    assert first["learnt"]["teacher_right"] == 1.0
    assert found["start"]["cloud_alone"] == 1.0


def test_how_often_the_teacher_is_right_is_over_this_rounds_parts(tmp_path, station):
    class Twice(World):
        """Samples of an update that was dropped come again."""

        def learn(self, arm, station, verdicts, labels):
            found = super().learn(arm, station, verdicts, labels)
            again = replace(found.rulings[0], sha256="9" * 64, p_defect=0.1)
            return replace(found, rulings=(*found.rulings, again))

    first = run(station, tmp_path, Twice(), {ADAPTED})["arms"][0]["rounds"][0]
    assert (first["learnt"]["rulings"], first["learnt"]["teacher_right"]) == (2, 1.0)


def test_people_label_as_many_of_the_least_certain_as_the_arm_says(tmp_path, station):
    world = World()
    run(station, tmp_path, world, {ADAPTED, "human labels"})
    assert {(name, labels > 0) for name, _, labels in world.learnt} == {(ADAPTED, False), ("human labels", True)}


def test_an_interrupted_run_goes_on_with_the_round_that_it_was_in(tmp_path, station):
    world, whole = World(), World()
    world.killed_at = 1
    with pytest.raises(KeyboardInterrupt):
        run(station, tmp_path, world, {ADAPTED})
    found = run(station, tmp_path, world, {ADAPTED})
    other = tmp_path / "other"
    other.mkdir()
    assert found == run(station, other, whole, {ADAPTED})
    assert world.learnt == whole.learnt  # nothing was learnt twice
    before = len(world.inspected)
    assert run(station, tmp_path, world, {ADAPTED}) == found
    assert len(world.inspected) == before


def test_a_finished_round_is_a_file_that_says_all_of_it(tmp_path, station):
    found = run(station, tmp_path, World(), {ADAPTED})
    file = tmp_path / "out" / "arms" / "adapted" / "2" / RECORD
    assert json.loads(file.read_text()) == found["arms"][0]["rounds"][2]


def test_only_the_last_rounds_station_is_kept(tmp_path, station):
    run(station, tmp_path, World(), {ADAPTED})
    folders = sorted((tmp_path / "out" / "arms" / "adapted").glob("*/station"))
    assert [folder.parent.name for folder in folders] == ["2"]


def test_unreadable_parts_and_parts_without_truth_enter_no_accuracy():
    good = Verdict("a", "", "p", "", Label.GOOD, 0.1, Where.EDGE, Reason.EDGE_CONFIDENT, edge_label=Label.GOOD)
    known = replace(good, truth=Label.GOOD)
    wrong = replace(good, truth=Label.DEFECT)
    broken = replace(known, label=Label.UNREADABLE, edge_label=None, p_defect=None)
    found = figures([good, known, wrong, broken])
    assert found["n"] == 4
    assert found["edge"] == found["final"] == 0.5
    assert figures([])["edge"] is None
