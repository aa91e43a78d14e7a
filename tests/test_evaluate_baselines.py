"""SAEC's baselines: what they are shown, by which rule they judge, and what an answer of theirs is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cli_fakes import ExpertBackend, Station, fit_station, tree
from cloud_fakes import FakeBackend, query
from saec.cloud.embedded import EmbeddedClient
from saec.config import Settings
from saec.data.hashing import sha256_file
from saec.data.readers import read_dataset
from saec.errors import BadInput
from saec.evaluate.baselines import (
    ZERO_SHOT_TAU,
    Asked,
    ClassifierEdge,
    Shown,
    as_baseline,
    image_alone,
    refuse_learnt,
    zero_shot,
)
from saec.evaluate.bench_table import classifier_arm, run_arm, zero_shot_arm
from saec.evaluate.generated import GeneratingBackend, read_label
from saec.evaluate.meter import Meter
from saec.evaluate.report_run import RunFolder
from saec.route.decide import edge_label
from saec.types import CloudError, Label, Observation, Opinion, Part, Query, Reason, Where

SETTINGS = Settings()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("data") / "parts")


@pytest.fixture(scope="module")
def station(root: Path) -> Station:
    return fit_station(read_dataset(root), SETTINGS, cloud=EmbeddedClient(ExpertBackend()))


@pytest.fixture(scope="module")
def parts(root: Path) -> list[Part]:
    return list(read_dataset(root).select(split="test"))


class Classifier:
    """A classifier with a given score for every image."""

    model_id = "yolo@0123"

    def __init__(self, score: float) -> None:
        self.score = score

    def observe(self, image: object) -> Observation:
        return Observation(self.score)


@settings(deadline=None, max_examples=60)
@given(score=st.floats(-0.45, 0.55))
@example(score=0.0)
@example(score=5e-324)
@example(score=1.1e-16)
def test_the_classifier_calls_good_iff_all_three_confidences_pass(station: Station, score: float) -> None:
    edge = ClassifierEdge(station, {}, Classifier(score))  # type: ignore[arg-type]
    result = edge.predict(np.zeros((8, 8, 3), np.uint8), "bolt")
    assert 0 <= result.p_defect <= 1
    called = edge_label(result.p_defect, edge.policy("bolt").thresholds)
    assert called is (Label.DEFECT if score > 0 else Label.GOOD)


@given(low=st.floats(-0.45, 0.55), high=st.floats(-0.45, 0.55))
@settings(deadline=None, max_examples=40)
def test_the_classifiers_figure_ranks_as_its_score(station: Station, low: float, high: float) -> None:
    low, high = sorted((low, high))
    image = np.zeros((8, 8, 3), np.uint8)
    p = [ClassifierEdge(station, {}, Classifier(s)).predict(image, "bolt").p_defect for s in (low, high)]  # type: ignore[arg-type]
    assert p[0] <= p[1]


@pytest.mark.parametrize("text", ["0", " 0", "0.", "0\n", "0,", "0 (good)", "\n0"])
def test_a_lone_zero_means_good(text: str) -> None:
    assert read_label(text) == 0


@pytest.mark.parametrize("text", ["1", " 1", "1.", "1</s>", '1"', "1 defect"])
def test_a_lone_one_means_defect(text: str) -> None:
    assert read_label(text) == 1


@pytest.mark.parametrize(
    "text", ["", " ", "2", "10", "01", "0.5", "1,5", "1st", "good", "Yes", "The image", "-1", "Label: 1", "(1", "¹"]
)
def test_anything_else_is_no_answer(text: str) -> None:
    assert read_label(text) is None


@given(st.text(max_size=6))
@settings(deadline=None, max_examples=100)
def test_an_answer_begins_with_its_digit(text: str) -> None:
    label = read_label(text)
    assert label is None or text.lstrip()[0] == str(label)


def test_a_generated_answer_becomes_0_or_1_and_an_unusable_one_is_quoted() -> None:
    backend = GeneratingBackend(lambda queries: ["1.", "0", "The part"][: len(queries)], "llava+p2")
    defect, good, none = backend.judge([query(), query(), query()])
    assert isinstance(defect, Opinion) and isinstance(good, Opinion) and isinstance(none, CloudError)
    assert (defect.p_defect, good.p_defect, defect.model_id) == (1.0, 0.0, "llava+p2+generated")
    assert none.reason is Reason.CLOUD_BAD_ANSWER
    assert "'The part'" in str(none)


def test_a_client_shows_no_more_than_it_is_told_to() -> None:
    backend = FakeBackend()
    client = EmbeddedClient(backend)
    whole = query(references=(np.zeros((4, 4, 3), np.uint8),), anomaly_map=np.ones((2, 2), np.float32))
    for shown in (client, Shown(client, references=False), Shown(client, anomaly_map=False), image_alone(client)):
        shown.judge(whole, deadline_s=5)
    client.close()
    seen = [(len(q.references), q.anomaly_map is not None, q.edge_p_defect) for q in backend.seen]
    assert seen == [(1, True, 0.25), (0, True, 0.25), (1, False, 0.25), (0, False, None)]
    assert all(q.image is whole.image for q in backend.seen)


def test_a_zero_shot_verdict_is_the_clouds_alone_at_the_published_threshold(station: Station) -> None:
    varied = zero_shot(station, {"arm": "zero-shot"})
    assert station.fusion("bolt") is not None
    assert varied.fusion("bolt") is None
    assert varied.policy("bolt").thresholds.tau_cloud == ZERO_SHOT_TAU
    assert varied.policy("bolt").thresholds.tau_edge == station.policy("bolt").thresholds.tau_edge
    assert varied.models == {**station.models, "arm": "zero-shot"}


def test_a_model_in_this_process_is_waited_for_and_a_baselines_circuit_never_opens() -> None:
    def cloud(embedded: bool, baseline: bool) -> Any:
        return Asked("x", embedded=embedded).patient(SETTINGS, baseline=baseline).cloud

    assert cloud(False, False) == SETTINGS.cloud
    assert cloud(True, False).timeout_s == 600
    service = cloud(False, True)
    assert (service.timeout_s, service.breaker_failures) == (SETTINGS.cloud.timeout_s, 10**9)
    cropped = Settings.model_validate({"cloud": {"uplink": "crop"}, "route": {"budget_share": 0.1}})
    whole = Asked("x").patient(cropped, baseline=True)
    assert (whole.cloud.uplink, whole.route.budget_share) == ("image", None)
    assert Asked("x", embedded=True).patient(cropped, baseline=False).route.budget_share == 0.1


def test_what_is_not_at_hand_cannot_be_opened() -> None:
    with pytest.raises(BadInput, match="not pulled"):
        Asked("x", missing=BadInput("not pulled", fix="saec models pull x")).opened()


def test_parts_that_the_adapter_was_trained_on_are_refused(tmp_path: Path, parts: list[Part]) -> None:
    adapter = tmp_path / "run" / "best"
    adapter.mkdir(parents=True)
    refuse_learnt(None, parts)
    refuse_learnt(adapter, parts)
    listed = adapter.parent / "trained_on.txt"
    listed.write_text(f"{'0' * 64}  another\n")
    refuse_learnt(adapter, parts)
    listed.write_text(f"{sha256_file(parts[3].path)}  {parts[3].part_id}\n")
    with pytest.raises(BadInput, match="1 images were also used for training the adapter") as error:
        refuse_learnt(adapter, parts)
    assert str(parts[3].path) in str(error.value)
    listed.rename(adapter / "trained_on.txt")  # a release carries it inside
    with pytest.raises(BadInput, match="training the adapter"):
        refuse_learnt(adapter, parts)


def run(
    tmp_path: Path, parts: Sequence[Part], station: Station, answers: Sequence[str | float]
) -> tuple[dict[str, Any], RunFolder]:
    """Run a zero-shot baseline whose model has an answer for each part: a generated text, or P(defect)."""
    of_part = {part.part_id: answer for part, answer in zip(parts, answers, strict=False)}

    class Model:
        model_id = "m"

        def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
            return [self._one(of_part[q.part_id], q) for q in queries]

        def _one(self, answer: str | float, q: Query) -> Opinion | Exception:
            if isinstance(answer, str):
                return GeneratingBackend(lambda _: [answer], "m").judge([q])[0]
            return FakeBackend().judge([replace(q, edge_p_defect=answer)])[0]

    asked = Asked.of_backend("m", Model, max_batch=1)
    arm = zero_shot_arm("zero", asked)
    with asked.opened() as client:
        outcome = run_arm(
            arm, parts, station, SETTINGS, cloud=client, out=tmp_path / "run", meter=lambda: Meter(()), report=True
        )
    assert outcome.summary is not None
    return outcome.summary, RunFolder.load(tmp_path / "run")


def test_a_part_without_a_usable_answer_is_recorded_as_such_and_counts_as_wrong(
    tmp_path: Path, parts: list[Part], station: Station
) -> None:
    answers = ["No idea"] * 10 + ["1" if p.label is Label.DEFECT else "0" for p in parts[10:]]
    summary, folder = run(tmp_path, parts, station, answers)
    silent = [v for v in folder.verdicts if v.where is Where.FALLBACK]
    assert len(silent) == summary["unanswered"] == 10
    assert all(v.reason is Reason.CLOUD_BAD_ANSWER and "'No idea'" in (v.error or "") for v in silent)
    assert folder.summary == summary
    assert summary["accuracy"] == (len(parts) - 10) / len(parts)
    assert sum(summary["confusion"].values()) == len(parts)
    assert summary["routing"]["reasons"]["cloud_bad_answer"] == 10
    assert "published" in summary["calibration"]["statement"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "published" in page


def test_repeating_a_baseline_changes_nothing(tmp_path: Path, parts: list[Part], station: Station) -> None:
    first, folder = run(tmp_path, parts, station, ["?"] * 3 + [0.5] * (len(parts) - 3))
    again, _ = run(tmp_path, parts, station, [])
    assert again == first
    assert as_baseline(first, folder.verdicts) == first


def test_where_everything_is_answered_the_summary_is_the_recorded_one(
    tmp_path: Path, parts: list[Part], station: Station
) -> None:
    summary, folder = run(tmp_path, parts, station, [0.9] * len(parts))
    assert summary["unanswered"] == 0
    assert summary["accuracy"] == 0.5 == sum(v.label is v.truth for v in folder.verdicts) / len(parts)
    assert summary["overkill_rate"] == 1.0
    assert summary["status"].keys() == {"energy"}


def test_the_classifier_baseline_asks_nobody_and_keeps_no_calibration(
    tmp_path: Path, parts: list[Part], station: Station
) -> None:
    arm = classifier_arm("yolo-cls", Classifier(0.2))  # type: ignore[arg-type]
    outcome = run_arm(arm, parts, station, SETTINGS, cloud=None, out=tmp_path / "run", meter=lambda: Meter(()))
    assert outcome.summary is not None
    assert outcome.summary["called"] == {"good": 0, "defect": len(parts)}
    assert outcome.summary["accuracy"] == 0.5
    assert outcome.summary["unanswered"] == 0
    assert outcome.summary["models"]["edge"] == "yolo@0123"
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == outcome.summary
