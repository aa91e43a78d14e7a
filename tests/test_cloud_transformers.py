"""The transformers backend with tiny models of the real classes."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from cloud_fakes import query  # noqa: E402
from saec.cloud import transformers as backend_module  # noqa: E402
from saec.cloud.ahead import Ahead, PreparedQuery  # noqa: E402
from saec.cloud.embedded import EmbeddedClient  # noqa: E402
from saec.cloud.transformers import TransformersBackend  # noqa: E402
from saec.config import PromptSettings, Settings, load_settings  # noqa: E402
from saec.errors import BadInput  # noqa: E402
from saec.types import Box, CloudError, Opinion, Query, Reason  # noqa: E402
from saec.vlm.decide import p_defect, rank  # noqa: E402
from saec.vlm.load import load_vlm  # noqa: E402
from saec.vlm.looks import five_crops, mirrored  # noqa: E402
from saec.vlm.prompt import VERSION, Ask, build_question  # noqa: E402
from tiny_vlms import FAMILIES, save_tiny, save_tiny_adapter  # noqa: E402

EVIDENCE = {"kind": "surface", "bboxes": [[14, 28, 28, 56]], "desc": "A scratch near the left edge."}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / f"tiny-{family}") for family in FAMILIES}


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [save_tiny_adapter(folders["smolvlm"], root / str(seed), seed=seed) for seed in (1, 2)]


@contextmanager
def backend_of(folder: Path, *, max_batch: int = 4, **mllm: object) -> Iterator[TransformersBackend]:
    # A random model puts next to no probability on the labels, and knows no JSON.
    section = {"model": str(folder), "device": "cpu", "max_side": 112, "min_label_mass": 0, "tau": 1.0, **mllm}
    backend = TransformersBackend(Settings.model_validate({"mllm": section, "serve": {"max_batch": max_batch}}))
    backend.warm_up()
    try:
        yield backend
    finally:
        backend.close()


def part(number: int, **more: object) -> Query:
    rng = np.random.default_rng(number)
    image = rng.integers(0, 256, (60 + 20 * (number % 3), 112, 3), np.uint8)
    return query(f"p{number}", **{"image": image, "original_size": (112, len(image)), **more})


def opinions(answers: Sequence[Opinion | Exception]) -> list[Opinion]:
    assert all(isinstance(answer, Opinion) for answer in answers), answers
    return [answer for answer in answers if isinstance(answer, Opinion)]


def says(monkeypatch: pytest.MonkeyPatch, text: str) -> list[int]:
    """Let the model answer every evidence question with the same text; returns how many were asked at once."""
    asked: list[int] = []

    def generate(vlm: object, questions: Sequence[object], *, max_tokens: int) -> list[str]:
        asked.append(len(questions))
        return [text] * len(questions)

    monkeypatch.setattr(backend_module, "generate_evidence", generate)
    return asked


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gets_the_models_decisions_and_each_opinion_says_whose_it_is(folders, family):
    good = np.full((60, 60, 3), 90, np.uint8)
    queries = [part(number, references=(good,)) for number in range(3)]
    with backend_of(folders[family]) as backend:
        found = opinions(backend.judge(queries))
        again = opinions(backend.judge(queries[::-1]))[::-1]
        settings = backend._settings
    vlm = load_vlm(settings)
    wanted = p_defect(vlm, [build_question(one, Ask.LABEL, settings) for one in queries])
    for answer, repeated, decision in zip(found, again, wanted, strict=True):
        assert answer.p_defect == pytest.approx(decision.p_defect, abs=1e-5)
        assert repeated.p_defect == pytest.approx(decision.p_defect, abs=1e-5)
        assert answer.model_id == answer.evidence.source == f"tiny-{family}+{VERSION}"
        assert answer.diagnostics["label_mass"] == pytest.approx(decision.mass, rel=1e-3)
        assert answer.evidence.text is None
        assert set(answer.timing_ms) == {"prepare", "wait", "label"}


def test_only_defects_are_asked_a_second_time(folders, monkeypatch):
    asked = says(monkeypatch, json.dumps({**EVIDENCE, "bboxes": []}))
    queries = [part(number) for number in range(4)]
    with backend_of(folders["llava"]) as backend:
        decisions = [answer.p_defect for answer in opinions(backend.judge(queries))]
    assert asked == []
    tau = sorted(decisions)[1]
    with backend_of(folders["llava"], tau=tau) as backend:
        found = opinions(backend.judge(queries))
    assert asked == [3]
    assert [answer.p_defect for answer in found] == decisions
    for answer in found:
        assert (answer.evidence.text == EVIDENCE["desc"]) == (answer.p_defect >= tau)
        assert ("evidence" in answer.timing_ms) == (answer.p_defect >= tau)


def test_who_wants_p_defect_alone_does_not_wait_for_evidence(folders, monkeypatch):
    asked = says(monkeypatch, json.dumps(EVIDENCE))
    queries = [part(0, evidence=False), part(1), part(2, evidence=False)]
    with backend_of(folders["llava"], tau=0.0) as backend:
        found = opinions(backend.judge(queries))
    assert asked == [1]
    assert ["evidence" in answer.timing_ms for answer in found] == [False, True, False]


def test_boxes_are_in_pixels_of_the_original(folders, monkeypatch):
    says(monkeypatch, json.dumps(EVIDENCE))
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    shown = query(image=image, original_size=(1000, 800), region=Box(100, 200, 324, 424))
    with backend_of(folders["llava"], tau=0.0) as backend:
        (found,) = opinions(backend.judge([shown]))
    # The region is 224 pixels wide and was seen at 112: every seen pixel is two of the original.
    assert found.evidence.boxes == (Box(128, 256, 156, 312),)
    assert found.evidence.kind == "surface"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("The part is scratched.", "not the asked JSON"),
        (json.dumps(EVIDENCE)[:40], "not the asked JSON"),
        (json.dumps({**EVIDENCE, "bboxes": [[0, 0, 900, 20]]}), "not inside an image of"),
    ],
)
def test_without_usable_evidence_the_verdict_stands_and_the_record_says_why(folders, monkeypatch, text, message):
    with backend_of(folders["llava"], tau=1.0) as backend:
        (plain,) = opinions(backend.judge([part(0)]))
    says(monkeypatch, text)
    with backend_of(folders["llava"], tau=0.0) as backend:
        (found,) = opinions(backend.judge([part(0)]))
    assert found.p_defect == plain.p_defect
    assert found.evidence.boxes == ()
    assert found.evidence.text is not None
    assert found.evidence.text.startswith("no evidence: ")
    assert message in found.evidence.text


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_random_model_writes_is_recorded_as_no_evidence(folders, family):
    with backend_of(folders[family], tau=0.0, evidence_tokens=16) as backend:
        for answer in opinions(backend.judge([part(0), part(1)])):
            assert answer.evidence.text is not None
            assert answer.evidence.text.startswith("no evidence: not the asked JSON")


def test_a_model_that_fails_at_evidence_keeps_its_verdicts(folders, monkeypatch):
    def fail(*args: object, **more: object) -> list[str]:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(backend_module, "generate_evidence", fail)
    with backend_of(folders["llava"], tau=0.0) as backend:
        (found,) = opinions(backend.judge([part(0)]))
    assert found.evidence.text == "no evidence: out of memory"


def test_a_bad_image_fails_alone(folders):
    with backend_of(folders["smolvlm"]) as backend:
        odd = query("odd", image=np.zeros((0, 3, 3), np.uint8))
        answers = backend.judge([part(0), backend.prepare(odd), part(1)])
        assert [isinstance(answer, Opinion) for answer in answers] == [True, False, True]
        alone = opinions(backend.judge([part(0), part(1)]))
        assert [answer.p_defect for answer in opinions(answers[::2])] == pytest.approx([one.p_defect for one in alone])
        assert [isinstance(answer, Opinion) for answer in backend.judge([odd])] == [False]


def test_a_model_that_has_no_label_in_mind_gives_no_opinion_and_no_evidence(folders, monkeypatch):
    asked = says(monkeypatch, json.dumps(EVIDENCE))
    with backend_of(folders["smolvlm"], min_label_mass=0.9, tau=0.0) as backend:
        (error,) = backend.judge([part(0)])
    assert isinstance(error, CloudError)
    assert error.reason is Reason.CLOUD_BAD_ANSWER
    assert "0 and 1 have only" in str(error)
    assert asked == []


def test_mirror_images_are_averaged_map_and_all_and_are_another_model_id(folders):
    heatmap = np.arange(16, dtype=np.float32).reshape(4, 4)
    query = part(0, anomaly_map=heatmap)
    asked = build_question(query, Ask.LABEL, PromptSettings())
    views = mirrored(asked, 4)
    assert [view.anomaly_map[0, 0] for view in views] == [0, 15, 3, 12]
    assert all(np.array_equal(view.part, view.content[-2]) and view.seen == asked.seen for view in views)
    assert np.array_equal(views[1].part, asked.part[::-1, ::-1])
    assert load_settings(overrides=["mllm.mirrors=4"], environ={}).mllm.mirrors == 4  # a command line has only text
    with backend_of(folders["qwen2.5-vl"], mirrors=4) as backend:
        (found,) = opinions(backend.judge([query]))
        settings = backend._settings
        assert backend.model_id.endswith("+mirrors4")
    views = mirrored(build_question(query, Ask.LABEL, settings), 4)
    (wanted,) = rank(load_vlm(settings), [views])
    assert found.p_defect == pytest.approx(wanted.p_defect, abs=1e-5)


def test_ranking_judges_by_five_crops_and_is_another_model_id(folders):
    queries = [part(0), part(1)]
    with backend_of(folders["smolvlm"], ranking=True, crop_side=56) as backend:
        found = opinions(backend.judge(queries))
        settings = backend._settings
    vlm = load_vlm(settings)
    wanted = rank(vlm, [five_crops(build_question(one, Ask.LABEL, settings), 56) for one in queries])
    for answer, decision in zip(found, wanted, strict=True):
        assert answer.p_defect == pytest.approx(decision.p_defect, abs=1e-5)
        assert answer.model_id == f"tiny-smolvlm+{VERSION}+rank"


# -- adapters


def test_an_adapter_is_swapped_between_batches_and_every_opinion_names_its_own(folders, adapters):
    with backend_of(folders["smolvlm"]) as backend:
        ids, decisions = [], []
        for adapter in (None, adapters[0], adapters[1], None, adapters[0]):
            backend.swap_adapter(adapter)
            (found,) = opinions(backend.judge([part(0)]))
            assert found.model_id == backend.model_id
            ids.append(found.model_id)
            decisions.append(found.p_defect)
    assert ids[0] == ids[3] == f"tiny-smolvlm+{VERSION}"
    assert ids[1] == ids[4]
    assert len(set(ids)) == 3
    assert decisions[0] == decisions[3]
    assert decisions[1] == decisions[4]
    assert len(set(decisions)) == 3


def test_a_backend_that_starts_with_an_adapter_can_drop_it(folders, adapters):
    with backend_of(folders["smolvlm"], adapter=adapters[0]) as backend:
        assert "+adapter:" in backend.model_id
        backend.swap_adapter(None)
        assert backend.model_id == f"tiny-smolvlm+{VERSION}"
        opinions(backend.judge([part(0)]))


def test_a_failing_swap_leaves_the_old_adapter_at_work(folders, adapters, tmp_path):
    with backend_of(folders["smolvlm"], adapter=adapters[0]) as backend:
        (before,) = opinions(backend.judge([part(0)]))
        other = save_tiny_adapter(folders["llava"], tmp_path / "other")
        for wrong in (tmp_path / "nowhere", other):
            with pytest.raises(BadInput, match="adapter"):
                backend.swap_adapter(wrong)
        (after,) = opinions(backend.judge([part(0)]))
    assert (after.model_id, after.p_defect) == (before.model_id, before.p_defect)


def test_swapping_drops_no_question_and_mixes_no_answers(folders, adapters):
    with backend_of(folders["smolvlm"]) as backend:
        wanted: dict[str, float] = {}
        for adapter in (*adapters, None):
            backend.swap_adapter(adapter)
            (answer,) = opinions(backend.judge([part(0)]))
            wanted[answer.model_id] = answer.p_defect
        client = EmbeddedClient(backend, max_batch=4)
        found: list[Opinion] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                found.append(client.judge(part(0), deadline_s=60))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for adapter in (*adapters, None, *adapters):
            backend.swap_adapter(adapter)
            seen = len(found)
            give_up = time.monotonic() + 60
            while len(found) < seen + 8 and time.monotonic() < give_up:
                time.sleep(0.01)
        stop.set()
        for thread in threads:
            thread.join()
        client.close()
    with pytest.raises(CloudError, match="was closed"):
        client.judge(part(0), deadline_s=1)
    assert {answer.model_id for answer in found} == set(wanted)
    for answer in found:
        assert answer.p_defect == pytest.approx(wanted[answer.model_id], abs=1e-5)


def test_a_question_prepared_before_a_swap_is_asked_at_the_new_adapters_size(folders, adapters, tmp_path):
    small = shutil.copytree(adapters[0], tmp_path / "small")
    (small / "train.json").write_text(json.dumps({"settings": {"max_side": 56, "side_multiple": 28}}))
    mllm = {"model": str(folders["smolvlm"]), "device": "cpu", "min_label_mass": 0, "tau": 1.0}
    backend = TransformersBackend(Settings.model_validate({"mllm": mllm}))
    backend.warm_up()
    before = backend.prepare(part(0))
    wait_until(lambda: before.slot.future.done())
    backend.swap_adapter(small)
    early, late = opinions(backend.judge([before, part(0)]))
    backend.swap_adapter(adapters[0])  # the same weights, asked at the default size
    (large,) = opinions(backend.judge([part(0)]))
    backend.close()
    assert early.p_defect == pytest.approx(late.p_defect, abs=1e-5)
    assert abs(late.p_defect - large.p_defect) > 1e-3


def test_a_model_that_cannot_be_loaded_is_bad_input_at_warm_up(tmp_path):
    backend = TransformersBackend(Settings.model_validate({"mllm": {"model": str(tmp_path / "nowhere")}}))
    with pytest.raises(BadInput):
        backend.warm_up()
    with pytest.raises(RuntimeError, match="warm_up"):
        backend.judge([part(0)])


# -- preparing ahead


def wait_until(what: object) -> None:
    give_up = time.monotonic() + 20
    while not what():  # type: ignore[operator]
        assert time.monotonic() < give_up
        time.sleep(0.002)


def test_questions_are_prepared_before_their_turn_in_order_and_only_so_many():
    done: list[str] = []

    def work(asked: Query) -> str:
        done.append(asked.part_id)
        return asked.part_id

    ahead: Ahead[str] = Ahead(work, threads=1, ahead=3)
    line = [ahead.put(query(f"p{number}")) for number in range(8)]
    wait_until(lambda: len(done) == 3)
    assert [future.result() for future in ahead.take(line[:2])] == ["p0", "p1"]
    wait_until(lambda: len(done) == 5)
    assert [future.result() for future in ahead.take([*line[2:], query("late")])][-2:] == ["p7", "late"]
    assert done == [*(f"p{number}" for number in range(8)), "late"]
    ahead.close()


def test_a_question_that_nobody_waits_for_any_more_makes_room():
    done: list[str] = []

    def work(asked: Query) -> np.ndarray:
        done.append(asked.part_id)
        return np.zeros(1)

    ahead: Ahead[np.ndarray] = Ahead(work, threads=1, ahead=2)
    line = [ahead.put(query(f"p{number}")) for number in range(4)]
    wait_until(lambda: len(done) == 2)
    del line[:3]
    gc.collect()
    last = ahead.put(query("last"))
    wait_until(lambda: len(done) == 4)
    assert done == ["p0", "p1", "p3", "last"], "p2 was gone before its turn"
    ahead.take([*line, last])
    ahead.close()


def test_a_prepared_query_is_the_query():
    ahead: Ahead[int] = Ahead(lambda asked: 1, threads=1, ahead=1)
    asked = query("p1", edge_p_defect=0.5)
    placed = ahead.put(asked)
    assert isinstance(placed, PreparedQuery)
    assert placed.image is asked.image
    assert (placed.part_id, placed.edge_p_defect, placed.original_size) == ("p1", 0.5, (64, 64))
    ahead.close()


def test_a_work_that_fails_fails_its_own_query():
    def work(asked: Query) -> int:
        if asked.part_id == "bad":
            raise ValueError("no")
        return 1

    ahead: Ahead[int] = Ahead(work, threads=2, ahead=4)
    good, bad = ahead.take([ahead.put(query("good")), ahead.put(query("bad"))])
    assert good.result() == 1
    with pytest.raises(ValueError, match="no"):
        bad.result()
    ahead.close()


def test_images_are_prepared_while_the_model_is_at_work(folders, monkeypatch):
    at_work, go_on = threading.Event(), threading.Event()
    decide = backend_module.rank

    def slow(*args: object, **more: object) -> object:
        at_work.set()
        assert go_on.wait(20)
        return decide(*args, **more)  # type: ignore[arg-type]

    with backend_of(folders["smolvlm"], workers=2) as backend:
        monkeypatch.setattr(backend_module, "rank", slow)
        first = [backend.prepare(part(number)) for number in range(2)]
        answers: list[Opinion | Exception] = []
        model = threading.Thread(target=lambda: answers.extend(backend.judge(first)))
        model.start()
        assert at_work.wait(20)
        second = [backend.prepare(part(number)) for number in range(2, 5)]
        slots = [one.slot for one in second if isinstance(one, PreparedQuery)]
        wait_until(lambda: all(slot.future is not None and slot.future.done() for slot in slots))
        assert not answers
        go_on.set()
        model.join()
        assert len(opinions(answers)) == 2
        assert len(opinions(backend.judge(second))) == 3
