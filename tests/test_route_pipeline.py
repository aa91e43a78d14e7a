"""The streaming pipeline: everything overlaps, nothing is lost, whatever fails."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from route_fakes import (
    FakeCloud,
    FakeEdge,
    fake_decode,
    fake_scene,
    make_part,
    make_parts,
    make_settings,
    run_line,
)
from saec.calibrate.fusion import Fusion
from saec.data.decode import read_with_hash
from saec.errors import BadInput
from saec.fleet.ledger import Ledger, read_verdicts
from saec.route.pipeline import inspect_stream
from saec.route.query import build_query, crop_region
from saec.types import (
    Box,
    CloudError,
    Evidence,
    Label,
    Opinion,
    Part,
    Reason,
    Where,
)


def verdicts_of(folder: Path) -> dict[str, object]:
    return {v.part_id: v for v in read_verdicts(folder / "ledger.sqlite")}


# -- verdicts and their order ---------------------------------------------------------------------------------------


def test_every_part_has_one_verdict_in_part_order_and_both_labels_come_from_the_edge(tmp_path):
    parts = make_parts(60)
    stats = run_line(tmp_path, parts, FakeEdge(), FakeCloud())
    verdicts = list(read_verdicts(tmp_path / "ledger.sqlite"))
    assert [v.part_id for v in verdicts] == [p.part_id for p in parts]
    kinds = {"good": (Where.EDGE, Label.GOOD), "bad": (Where.EDGE, Label.DEFECT), "hard": (Where.CLOUD, Label.DEFECT)}
    assert all((v.where, v.label) == kinds[v.part_id.split("-")[1]] for v in verdicts)
    assert (stats.parts, stats.escalated, stats.answered, stats.fallbacks, stats.left_pending) == (60, 20, 20, 0, 0)
    assert stats.uplink_bytes == 20 * 100


def test_an_amended_verdict_says_what_each_arm_said(tmp_path):
    run_line(tmp_path, [make_part(1, "hard")], FakeEdge(), FakeCloud())
    (v,) = read_verdicts(tmp_path / "ledger.sqlite")
    assert (v.edge_label, v.edge_p_defect, v.cloud_p_defect) == (Label.GOOD, 0.45, 0.8)
    assert (v.label, v.p_defect, v.where, v.reason) == (Label.DEFECT, 0.8, Where.CLOUD, Reason.IN_BAND)
    assert (v.amended_by, v.escalated_for) == ("fake-cloud-1", Reason.IN_BAND)
    assert v.models == {"edge": "fake-edge-1", "cloud": "fake-cloud-1"}
    assert v.evidence.kind == "scratch"
    assert v.truth is Label.GOOD
    assert {"decode", "scene", "edge", "wait_edge", "local", "wait_cloud", "cloud"} == v.timings_ms.keys()


def test_the_stations_fusion_makes_the_final_probability_except_in_cloud_only_operation(tmp_path):
    fusion = Fusion(1.0, 0.0, 0.0)  # the edge alone has the say
    run_line(tmp_path / "a", [make_part(1, "hard")], FakeEdge(fusion=fusion), FakeCloud())
    run_line(tmp_path / "b", [make_part(1, "hard")], FakeEdge(fusion=fusion, mode="cloud_only"), FakeCloud())
    (fused,), (alone,) = (list(read_verdicts(tmp_path / run / "ledger.sqlite")) for run in "ab")
    assert (fused.label, fused.p_defect) == (Label.GOOD, pytest.approx(0.45))
    assert (alone.label, alone.p_defect) == (Label.DEFECT, 0.8)


def test_verdicts_are_told_only_once_durable_and_local_ones_in_part_order(tmp_path):
    told = []

    def on_verdict(verdict, final):
        assert verdict.part_id in verdicts_of(tmp_path)
        told.append((verdict.part_id, final))

    parts = make_parts(30)
    run_line(tmp_path, parts, FakeEdge(), FakeCloud(0.002), on_verdict=on_verdict)
    first = list(dict.fromkeys(name for name, _ in told))
    assert first == [p.part_id for p in parts]
    assert Counter(final for _, final in told) == {True: 30, False: 10}


def test_edge_only_does_not_compute_the_scene_and_never_asks(tmp_path):
    cloud = FakeCloud()
    stats = run_line(tmp_path, make_parts(9), FakeEdge(mode="edge_only"), cloud)
    assert cloud.asked == []
    assert stats.scene_s is None
    assert {(v.where, v.reason) for v in verdicts_of(tmp_path).values()} == {(Where.EDGE, Reason.EDGE_ONLY)}


def test_cloud_only_still_has_a_local_verdict_for_every_part(tmp_path):
    run_line(tmp_path, make_parts(9), FakeEdge(mode="cloud_only"), FakeCloud())
    for v in verdicts_of(tmp_path).values():
        assert v.edge_label is not None
        assert (v.where, v.reason) == (Where.CLOUD, Reason.CLOUD_ONLY)


def test_without_a_cloud_a_wanted_part_stays_at_the_edge_and_says_why_it_was_wanted(tmp_path):
    run_line(tmp_path, [make_part(1, "hard")], FakeEdge(), None)
    (v,) = read_verdicts(tmp_path / "ledger.sqlite")
    assert (v.where, v.reason, v.escalated_for) == (Where.EDGE, Reason.EDGE_ONLY, Reason.IN_BAND)


def test_a_spent_budget_keeps_parts_at_the_edge(tmp_path):
    cloud = FakeCloud()
    stats = run_line(
        tmp_path, make_parts(40, hard_every=1), FakeEdge(), cloud, make_settings(route={"budget_share": 0.25})
    )
    reasons = Counter((v.where, v.reason, v.escalated_for) for v in verdicts_of(tmp_path).values())
    assert reasons == {
        (Where.CLOUD, Reason.IN_BAND, Reason.IN_BAND): 10,
        (Where.EDGE, Reason.EDGE_BUDGET, Reason.IN_BAND): 30,
    }
    assert stats.escalated == len(cloud.asked) == 10


def test_the_budget_of_bytes_holds(tmp_path):
    settings = make_settings(route={"budget_bytes": 300}, cloud={"in_flight": 1})
    # a question costs less than the one byte a pixel that is expected before the first answer (8 x 8 pixels)
    stats = run_line(tmp_path, make_parts(60, hard_every=1), FakeEdge(0.002), FakeCloud(uplink=50), settings)
    assert 50 <= stats.uplink_bytes <= 300


# -- what goes wrong with a part ------------------------------------------------------------------------------------


def test_an_unreadable_image_is_recorded_as_such_and_never_good(tmp_path):
    stats = run_line(tmp_path, [make_part(1, "broken"), make_part(2, "good")], FakeEdge(), FakeCloud())
    v = verdicts_of(tmp_path)["00001-broken"]
    assert (v.label, v.where, v.reason, v.p_defect) == (Label.UNREADABLE, Where.EDGE, Reason.UNREADABLE, None)
    assert v.error == "truncated file"
    assert (stats.parts, stats.unreadable) == (2, 1)


def test_missing_empty_and_truncated_files_are_recorded_with_the_real_decoder(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    parts = [Part(name, "widget", tmp_path / name) for name in ("missing.png", "empty.png", "cut.png")]
    stats = run_line(tmp_path, parts, FakeEdge(), FakeCloud(), decode=read_with_hash)
    found = verdicts_of(tmp_path)
    assert stats.unreadable == 3
    assert {v.label for v in found.values()} == {Label.UNREADABLE}
    assert all(v.error.startswith(str(tmp_path)) for v in found.values())
    assert [len(found[part.part_id].sha256) for part in parts][::2] == [0, 64]


def test_a_detector_that_fails_on_one_part_leaves_it_unjudged_and_goes_on(tmp_path):
    run_line(tmp_path, [make_part(1, "crash"), make_part(2, "good")], FakeEdge(), FakeCloud())
    found = verdicts_of(tmp_path)
    assert found["00001-crash"].label is Label.UNREADABLE
    assert found["00001-crash"].error == "the edge failed: RuntimeError: shape mismatch"
    assert found["00002-good"].label is Label.GOOD


def test_an_unknown_product_is_a_matter_of_its_parts_alone(tmp_path):
    class OneProduct(FakeEdge):
        def policy(self, product):
            if product != "widget":
                raise BadInput("the station does not know this product", where=product)
            return super().policy(product)

    strange = Part("00003-hard", "gadget", Path("00003-hard.png"))
    run_line(tmp_path, [strange, make_part(4, "good")], OneProduct(), FakeCloud())
    found = verdicts_of(tmp_path)
    assert found["00003-hard"].label is Label.UNREADABLE
    assert "does not know this product: gadget" in found["00003-hard"].error
    assert found["00004-good"].label is Label.GOOD


def test_a_scene_score_that_fails_escalates_the_part(tmp_path):
    def scene(image):
        raise ValueError("odd")

    run_line(tmp_path, [make_part(1, "good")], FakeEdge(), FakeCloud(), scene=scene)
    (v,) = read_verdicts(tmp_path / "ledger.sqlite")
    assert (v.where, v.reason, v.scene_score) == (Where.CLOUD, Reason.SCENE_COMPLEX, None)
    assert v.error == "scene complexity failed: ValueError: odd"


def test_an_edge_that_gives_nan_is_never_believed(tmp_path):
    class NanEdge(FakeEdge):
        def predict(self, image, product):
            return replace(super().predict(image, product), score=np.nan, p_defect=np.nan)

    run_line(tmp_path / "cloud", [make_part(1, "good")], NanEdge(), FakeCloud())
    run_line(tmp_path / "alone", [make_part(1, "good")], NanEdge(), None)
    (asked,) = read_verdicts(tmp_path / "cloud" / "ledger.sqlite")
    (alone,) = read_verdicts(tmp_path / "alone" / "ledger.sqlite")
    assert (asked.where, asked.edge_p_defect, asked.label) == (Where.CLOUD, None, Label.DEFECT)
    assert (alone.label, alone.p_defect, alone.error) == (Label.DEFECT, None, "the edge gave no finite score")


def test_a_file_name_that_is_not_utf8_does_not_end_the_run(tmp_path):
    name = os.fsdecode(b"00001-good-\xff")
    odd = Part(name, "widget", Path("00001-good.png"))
    run_line(tmp_path, [odd, make_part(2, "good")], FakeEdge(), None)
    stats = run_line(tmp_path, [odd, make_part(2, "good")], FakeEdge(), None)
    assert list(verdicts_of(tmp_path)) == ["00001-good-\\udcff", "00002-good"]
    assert stats.skipped == 2


# -- what goes wrong with the cloud ---------------------------------------------------------------------------------


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("error", "reason", "text"),
    [
        (CloudError(Reason.CLOUD_TIMEOUT, "too slow"), Reason.CLOUD_TIMEOUT, "too slow"),
        (CloudError(Reason.CLOUD_REFUSED, "status 401"), Reason.CLOUD_REFUSED, "status 401"),
        (CloudError(Reason.CLOUD_UNREACHABLE, "no route"), Reason.CLOUD_UNREACHABLE, "no route"),
        (CloudError(Reason.EDGE_ONLY, "misused"), Reason.CLOUD_BAD_ANSWER, "misused"),
        (ZeroDivisionError("oops"), Reason.CLOUD_BAD_ANSWER, "the client failed: ZeroDivisionError: oops"),
    ],
)
def test_a_failing_cloud_leaves_the_edges_verdict_with_the_reason(tmp_path, error, reason, text):
    cloud = FakeCloud(fails=lambda number: raise_(error))
    stats = run_line(tmp_path, [make_part(1, "hard")], FakeEdge(), cloud, make_settings(cloud={"retries": 0}))
    (v,) = read_verdicts(tmp_path / "ledger.sqlite")
    assert (v.where, v.reason, v.escalated_for, v.error) == (Where.FALLBACK, reason, Reason.IN_BAND, text)
    assert (v.label, v.p_defect, v.amended_by) == (Label.GOOD, 0.45, None)
    assert (stats.fallbacks, stats.left_pending) == (1, 0)


@pytest.mark.parametrize(
    "answer",
    [
        Opinion(float("nan"), Evidence(), "m"),
        Opinion(1.5, Evidence(), "m"),
        Opinion(0.9, Evidence((Box(0, 0, 1, 1, float("inf")),)), "m"),
        Opinion(0.9, Evidence(text="\ud800"), "m"),
        None,
    ],
)
def test_a_wrong_answer_is_a_fallback(tmp_path, answer):
    class Wrong(FakeCloud):
        def judge(self, query, *, deadline_s):
            return answer

    run_line(tmp_path, [make_part(1, "hard")], FakeEdge(), Wrong())
    (v,) = read_verdicts(tmp_path / "ledger.sqlite")
    assert (v.where, v.reason, v.label) == (Where.FALLBACK, Reason.CLOUD_BAD_ANSWER, Label.GOOD)
    assert v.error


def test_a_cloud_that_dies_mid_run_costs_no_verdict_and_is_used_again_once_it_is_back(tmp_path):
    dead = {"from": 10, "until": time.monotonic() + 3600}

    def fails(number):
        if number == dead["from"]:
            dead["until"] = time.monotonic() + 0.15
        if number >= dead["from"] and time.monotonic() < dead["until"]:
            raise CloudError(Reason.CLOUD_UNREACHABLE, "connection refused")

    settings = make_settings(cloud={"in_flight": 2, "retries": 0, "breaker_failures": 3, "breaker_cooldown_s": 0.1})
    stats = run_line(tmp_path, make_parts(200, hard_every=2), FakeEdge(0.003), FakeCloud(fails=fails), settings)
    hard = [v for v in read_verdicts(tmp_path / "ledger.sqlite") if v.escalated_for]
    reasons = Counter(v.reason for v in hard if v.where is Where.FALLBACK)
    assert len(hard) == 100 and stats.parts == 200
    assert all(v.error for v in hard if v.where is Where.FALLBACK)
    assert set(reasons) == {Reason.CLOUD_UNREACHABLE, Reason.CIRCUIT_OPEN}
    assert reasons[Reason.CLOUD_UNREACHABLE] < reasons[Reason.CIRCUIT_OPEN] + 10
    assert stats.circuit_opened >= 1
    assert hard[0].where is Where.CLOUD  # before
    assert hard[-1].where is Where.CLOUD  # a probe found it alive again
    assert stats.answered + stats.fallbacks == 100


def test_a_client_that_ignores_its_deadline_does_not_hold_up_the_run(tmp_path):
    release = threading.Event()

    class Hung(FakeCloud):
        def judge(self, query, *, deadline_s):
            if query.part_id == "00001-hard":
                release.wait(30)
            return super().judge(query, deadline_s=deadline_s)

    cloud = Hung()
    settings = make_settings(cloud={"in_flight": 1, "timeout_s": 0.1})
    run_line(tmp_path, [make_part(1, "hard"), make_part(2, "hard")], FakeEdge(), cloud, settings)
    release.set()
    found = verdicts_of(tmp_path)
    assert (found["00001-hard"].where, found["00001-hard"].reason) == (Where.FALLBACK, Reason.CLOUD_TIMEOUT)
    assert found["00002-hard"].where is Where.CLOUD


# -- overlap and bounds ---------------------------------------------------------------------------------------------


def test_edge_and_cloud_overlap_so_that_the_wall_time_is_that_of_the_longer_branch(tmp_path):
    parts = [make_part(i, "hard" if i % 10 in (1, 4, 7) else "good") for i in range(150)]  # 30 % escalated
    stats = run_line(tmp_path, parts, FakeEdge(0.003), FakeCloud(0.010), make_settings(cloud={"in_flight": 1}))
    assert stats.escalated == 45
    edge_alone, cloud_alone = stats.edge_s, 45 * 0.010
    assert stats.wall_s < edge_alone + cloud_alone  # they cannot have run one after the other
    assert stats.wall_s <= 1.35 * max(stats.local_s, stats.cloud_s)  # generous: the machine is shared
    assert stats.overlap > 0.7


def test_the_first_escalated_image_is_asked_about_while_the_rest_is_still_being_decoded(tmp_path):
    decoded_before_first_question = []
    decoded = itertools.count(1)
    seen = 0

    def decode(path):
        nonlocal seen
        time.sleep(0.002)
        seen = next(decoded)
        return fake_decode(path)

    class Watching(FakeCloud):
        def judge(self, query, *, deadline_s):
            decoded_before_first_question.append(seen)
            return super().judge(query, deadline_s=deadline_s)

    run_line(tmp_path, make_parts(100, hard_every=1), FakeEdge(), Watching(), decode=decode)
    assert decoded_before_first_question[0] < 50


def test_scene_and_edge_work_beside_each_other(tmp_path):
    def scene(image):
        time.sleep(0.004)
        return fake_scene(image)

    stats = run_line(tmp_path, make_parts(60, hard_every=99), FakeEdge(0.004), None, scene=scene)
    assert stats.wall_s < 0.8 * (stats.scene_s + stats.edge_s)


def test_memory_is_bounded_by_the_queues_however_many_parts_there_are(tmp_path):
    alive = 0
    most = 0
    lock = threading.Lock()

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            if self.base is not None:
                with lock:
                    alive -= 1

    def decode(path):
        nonlocal alive, most
        sha256, image = fake_decode(path)
        with lock:
            alive += 1
            most = max(most, alive)
        return sha256, image.view(Counted)

    settings = make_settings(route={"queue": 4, "decode_workers": 2}, cloud={"in_flight": 2})
    cloud = FakeCloud(0.001)
    cloud.queries = deque(maxlen=1)
    run_line(tmp_path, (p for p in make_parts(400)), FakeEdge(), cloud, settings, decode=decode)
    # decoded and waiting (4), in the feeder's hand, at the edge, questions waiting (4) and in flight (2), the last
    # question of the fake, and a few that a thread's local variables still hold
    assert most <= 18


def test_an_endless_source_ends_when_the_run_is_stopped(tmp_path):
    def endless():
        for i in itertools.count():
            yield make_part(i, "good")

    count = 0

    def on_verdict(verdict, final):
        nonlocal count
        count += 1
        if count == 30:
            raise KeyboardInterrupt

    stats = run_line(tmp_path, endless(), FakeEdge(), None, on_verdict=on_verdict)
    assert stats.interrupted
    assert stats.parts == len(verdicts_of(tmp_path)) >= 30


def test_the_questions_under_way_are_bounded_and_the_edge_keeps_going(tmp_path):
    cloud = FakeCloud(0.03)
    told = []
    settings = make_settings(route={"queue": 16}, cloud={"in_flight": 2})
    parts = make_parts(45, hard_every=3)

    def on_verdict(verdict, final):
        told.append((verdict.part_id, final, len(cloud.asked)))

    run_line(tmp_path, parts, FakeEdge(), cloud, settings, on_verdict=on_verdict)
    assert cloud.most_inside == 2
    locals_told = [asked for name, final, asked in told if not (final and name.endswith("hard"))]
    assert len(locals_told) == 45
    assert locals_told[-1] < 15  # all local verdicts were out before all questions were even asked


def test_a_slow_cloud_makes_the_edge_wait_between_parts_but_no_local_verdict_late(tmp_path):
    settings = make_settings(route={"queue": 1, "deadline_ms": 300}, cloud={"in_flight": 1})
    stats = run_line(tmp_path, make_parts(5, hard_every=1), FakeEdge(), FakeCloud(0.4), settings)
    assert stats.answered == 5
    assert stats.deadline_misses == 0


def test_a_late_local_verdict_is_counted_and_not_dropped(tmp_path):
    settings = make_settings(route={"deadline_ms": 5})
    stats = run_line(tmp_path, make_parts(3, hard_every=99), FakeEdge(0.02), None, settings)
    assert (stats.parts, stats.deadline_misses) == (3, 3)


# -- stopping, crashing, resuming -----------------------------------------------------------------------------------


def test_ctrl_c_drains_and_the_run_can_be_resumed(tmp_path):
    parts = make_parts(80)
    told = itertools.count(1)

    def on_verdict(verdict, final):
        if next(told) == 20:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    first_edge, edge, cloud = FakeEdge(0.001), FakeEdge(), FakeCloud()
    stats = run_line(tmp_path, parts, first_edge, FakeCloud(0.02), on_verdict=on_verdict)
    assert signal.getsignal(signal.SIGINT) is before
    assert stats.interrupted and 20 <= stats.parts < 80
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert len(ledger.pending()) == stats.left_pending
    resumed = run_line(tmp_path, parts, edge, cloud)
    assert (resumed.skipped, resumed.parts) == (stats.parts, 80 - stats.parts)
    assert first_edge.calls + edge.calls == 80
    assert resumed.requeued == stats.left_pending > 0
    run_line(tmp_path / "undisturbed", parts, FakeEdge(), FakeCloud())
    assert export(tmp_path) == export(tmp_path / "undisturbed")


def export(folder: Path) -> list[object]:
    return [replace(v, timings_ms={}) for v in read_verdicts(folder / "ledger.sqlite")]


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def on_verdict(verdict, final):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_line(tmp_path, make_parts(50), FakeEdge(), FakeCloud(), on_verdict=on_verdict)
    assert run_line(tmp_path, make_parts(50), FakeEdge(), FakeCloud()).left_pending == 0
    assert len(verdicts_of(tmp_path)) == 50


class Crash(BaseException):
    pass


@pytest.mark.parametrize("stage", ["decode", "scene", "edge", "cloud", "callback", "source"])
def test_a_crashing_stage_ends_the_run_with_its_error_and_never_hangs(tmp_path, stage):
    def crash_from(number):
        counter = itertools.count(1)

        def check(*_):
            if next(counter) >= number:
                raise Crash(stage) if stage != "callback" else RuntimeError(stage)

        return check

    crash = crash_from(8)

    def source():
        for part in make_parts(300):
            if stage == "source":
                crash()
            yield part

    def decode(path):
        if stage == "decode":
            crash()
        return fake_decode(path)

    def scene(image):
        if stage == "scene":
            crash()
        return fake_scene(image)

    edge = FakeEdge()
    if stage == "edge":
        edge.on_predict = crash
    cloud = FakeCloud(fails=crash if stage == "cloud" else None)
    begun = time.monotonic()
    with pytest.raises((Crash, RuntimeError), match=stage):
        run_line(
            tmp_path,
            source(),
            edge,
            cloud,
            decode=decode,
            scene=scene,
            on_verdict=crash if stage == "callback" else None,
        )
    assert time.monotonic() - begun < 5
    run_line(tmp_path, make_parts(300), FakeEdge(), FakeCloud())
    assert export(tmp_path) == export_undisturbed(tmp_path, make_parts(300))


def export_undisturbed(tmp_path: Path, parts: list[Part]) -> list[object]:
    run_line(tmp_path / "undisturbed", parts, FakeEdge(), FakeCloud())
    return export(tmp_path / "undisturbed")


def test_a_run_that_ends_while_a_part_waits_for_its_scene_score_does_not_call_it_unreadable(tmp_path):
    failed = threading.Event()

    def scene(image):
        if image[0, 0, 0] == 2:
            failed.wait(10)
            time.sleep(0.5)
        return fake_scene(image)

    def on_verdict(verdict, final):
        failed.set()
        raise RuntimeError("callback")

    with pytest.raises(RuntimeError, match="callback"):
        run_line(tmp_path, make_parts(5), FakeEdge(), None, scene=scene, on_verdict=on_verdict)
    assert list(verdicts_of(tmp_path)) == ["00001-good"]


def test_a_source_that_waits_for_ever_holds_up_neither_ctrl_c_nor_a_crash(tmp_path):
    never = threading.Event()

    def source():
        yield from make_parts(3)
        never.wait(30)

    def interrupt(verdict, final):
        if final:
            raise KeyboardInterrupt

    def crash(image):
        raise Crash("edge")

    begun = time.monotonic()
    assert run_line(tmp_path, source(), FakeEdge(), None, on_verdict=interrupt_once(interrupt)).interrupted
    edge = FakeEdge()
    edge.on_predict = crash
    with pytest.raises(Crash):
        run_line(tmp_path / "crash", source(), edge, None)
    assert time.monotonic() - begun < 5
    never.set()


def interrupt_once(callback):
    calls = itertools.count()
    return lambda verdict, final: callback(verdict, final) if next(calls) == 0 else None


def test_a_source_that_fails_gets_verdicts_for_all_parts_before_the_failure(tmp_path):
    def source():
        yield from make_parts(25)
        raise BadInput("the folder vanished", where="parts/")

    with pytest.raises(BadInput, match="the folder vanished"):
        run_line(tmp_path, source(), FakeEdge(), FakeCloud())
    found = verdicts_of(tmp_path)
    assert len(found) == 25
    assert all(v.where is Where.CLOUD for v in found.values() if v.escalated_for)


def test_a_disk_that_fills_up_ends_the_run_with_one_clear_line(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger._db.execute("PRAGMA max_page_count = 100")  # SQLite's own way of having no room
        with pytest.raises(BadInput, match="free space"):
            inspect_stream(
                make_parts(2000),
                FakeEdge(),
                decode=fake_decode,
                scene=fake_scene,
                cloud=FakeCloud(),
                settings=make_settings(),
                ledger=ledger,
            )
    assert run_line(tmp_path, make_parts(200), FakeEdge(), FakeCloud()).skipped > 0


def test_a_resumed_run_with_another_station_or_other_routing_is_refused(tmp_path):
    class Other(FakeEdge):
        @property
        def models(self):
            return {"edge": "fake-edge-2"}

    run_line(tmp_path, make_parts(3), FakeEdge(), None)
    with pytest.raises(BadInput, match="another station"):
        run_line(tmp_path, make_parts(3), Other(), None)
    with pytest.raises(BadInput, match="other settings"):
        run_line(tmp_path, make_parts(3), FakeEdge(), None, make_settings(route={"budget_share": 0.5}))
    timeouts = make_settings(cloud={"timeout_s": 3}, route={"queue": 2})
    assert run_line(tmp_path, make_parts(3), FakeEdge(), None, timeouts).skipped == 3


def test_a_finished_run_resumed_does_nothing(tmp_path):
    run_line(tmp_path, make_parts(20), FakeEdge(), FakeCloud())
    edge, cloud = FakeEdge(), FakeCloud()
    stats = run_line(tmp_path, make_parts(20), edge, cloud)
    assert (edge.calls, len(cloud.asked), stats.parts, stats.skipped) == (0, 0, 0, 20)


def leave_pending(folder: Path, part: Part) -> None:
    """Stop a run between its local verdict and the cloud's answer."""

    def on_verdict(verdict, final):
        raise KeyboardInterrupt

    cloud = FakeCloud(fails=lambda number: raise_(CloudError(Reason.CLOUD_UNREACHABLE, "gone")))
    settings = make_settings(cloud={"retries": 5, "timeout_s": 60})
    stats = run_line(folder, [part], FakeEdge(), cloud, settings, on_verdict=on_verdict)
    assert stats.left_pending == 1


def test_a_pending_question_is_asked_again_exactly_as_it_was_without_judging_again(tmp_path):
    leave_pending(tmp_path, make_part(3, "hard"))
    edge, cloud = FakeEdge(), FakeCloud()
    stats = run_line(tmp_path, [make_part(3, "hard")], edge, cloud)
    fresh = FakeCloud()
    run_line(tmp_path / "undisturbed", [make_part(3, "hard")], FakeEdge(), fresh)
    (again,), (undisturbed,) = cloud.queries, fresh.queries
    np.testing.assert_array_equal(again.anomaly_map, undisturbed.anomaly_map)
    np.testing.assert_array_equal(again.image, undisturbed.image)
    assert (again.region, again.original_size, again.edge_p_defect) == (None, (8, 8), 0.45)
    assert (edge.calls, stats.requeued, stats.answered) == (0, 1, 1)


def test_a_pending_question_whose_image_is_gone_or_changed_falls_back(tmp_path):
    def gone(path):
        raise FileNotFoundError(path)

    def changed(path):
        return "another", fake_decode(path)[1]

    for name, decode, text in (("gone", gone, "no longer be read"), ("changed", changed, "has changed")):
        leave_pending(tmp_path / name, make_part(3, "hard"))
        run_line(tmp_path / name, [], FakeEdge(), FakeCloud(), decode=decode)
        (v,) = read_verdicts(tmp_path / name / "ledger.sqlite")
        assert (v.where, v.reason, v.label) == (Where.FALLBACK, Reason.UNREADABLE, Label.GOOD)
        assert text in v.error


def test_pending_questions_resumed_without_a_cloud_fall_back(tmp_path):
    leave_pending(tmp_path, make_part(3, "hard"))
    stats = run_line(tmp_path, [], FakeEdge(), None)
    (v,) = read_verdicts(tmp_path / "ledger.sqlite")
    assert (v.where, v.reason) == (Where.FALLBACK, Reason.CLOUD_UNREACHABLE)
    assert (stats.requeued, stats.fallbacks, stats.left_pending) == (1, 1, 0)


def test_the_same_part_twice_in_one_stream_is_judged_once(tmp_path):
    cloud = FakeCloud()
    run_line(tmp_path, [make_part(3, "hard")] * 3, FakeEdge(), cloud)
    assert len(verdicts_of(tmp_path)) == len(cloud.asked) == 1


# -- the question ---------------------------------------------------------------------------------------------------


def test_a_crop_shows_the_anomaly_with_its_surroundings_and_says_where_it_lies():
    image = np.arange(100 * 200 * 3, dtype=np.uint32).astype(np.uint8).reshape(100, 200, 3)
    evidence = Evidence((Box(180, 10, 200, 30),))
    query = build_query(
        "p", "widget", image, heatmap=None, evidence=evidence, p_defect=0.5, uplink="crop", references=(image,)
    )
    region = query.region
    assert region is not None
    assert region.x1 <= 180 and region.x2 == 200 and region.y1 <= 10 and region.y2 >= 30
    assert region.x2 - region.x1 >= 50  # a quarter of the width
    np.testing.assert_array_equal(query.image, image[region.y1 : region.y2, region.x1 : region.x2])
    assert query.image.base is None  # it does not keep the whole image alive
    assert (query.original_size, len(query.references)) == ((200, 100), 1)


def test_without_boxes_the_crop_is_around_the_heatmaps_maximum():
    heatmap = np.zeros((4, 4), dtype=np.float32)
    heatmap[3, 0] = 1
    region = crop_region(heatmap, Evidence(), (400, 400))
    assert region is not None
    assert (region.x1, region.y2) == (0, 400)
    assert region.x1 <= 50 < region.x2 and region.y1 <= 350 < region.y2


@pytest.mark.parametrize("heatmap", [None, np.full((2, 2), np.nan, np.float32), np.zeros((0, 2), np.float32)])
def test_with_nothing_to_crop_around_the_whole_image_goes(heatmap):
    assert crop_region(heatmap, Evidence(), (50, 50)) is None
