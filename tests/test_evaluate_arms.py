"""Baselines side by side, the sweep from recorded answers, gates, and the cloud's benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli_fakes import ExpertBackend, Station, fit_station, tree
from cloud_fakes import FakeBackend, query, service_process
from saec.cloud.client import HttpCloudClient
from saec.cloud.embedded import EmbeddedClient
from saec.config import CloudSettings, Settings
from saec.data.readers import read_dataset
from saec.errors import BadInput, GateFailed
from saec.evaluate.arms import AskAlways, Sweep, arm_settings, comparison, escalated_share, sweep
from saec.evaluate.bench_cloud import bench_cloud, http_batches
from saec.evaluate.gates import Gate, parse_gate, require
from saec.evaluate.meter import Meter
from saec.evaluate.report_run import RunFolder
from saec.evaluate.runner import run_parts
from saec.types import CloudError, Label, Opinion, Query, Reason, Where

SETTINGS = Settings()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("data") / "parts", products=("bolt", "nut"), other=14)


@pytest.fixture(scope="module")
def station(root: Path) -> Station:
    return fit_station(read_dataset(root), SETTINGS)


@pytest.fixture(scope="module")
def both(root: Path, station: Station, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Both arms recorded on all test parts."""
    client = EmbeddedClient(ExpertBackend())
    out = tmp_path_factory.mktemp("runs") / "both"
    parts = read_dataset(root).select(split="test")
    run_parts(parts, AskAlways(station), SETTINGS, cloud=client, out=out, meter=lambda: Meter(()), report=False)
    client.close()
    return RunFolder.load(out)


def test_asking_always_records_scene_edge_and_cloud_of_every_part(both: RunFolder) -> None:
    assert all(v.where is Where.CLOUD for v in both.verdicts)
    assert all(None not in (v.scene_score, v.edge_p_defect, v.cloud_p_defect) for v in both.verdicts)
    assert both.summary["models"]["router"] == "ask-always"


def test_the_ends_of_the_sweep_are_the_edge_alone_and_the_cloud_everywhere(both: RunFolder, station: Station) -> None:
    found = sweep(both.verdicts, station, cloud_seconds=0.1)
    shares = [p for p in found.points if p.knob == "share"]
    edge_right = sum(v.edge_label is v.truth for v in both.verdicts)
    cloud_right = sum(v.label is v.truth for v in both.verdicts)
    assert shares[0].escalation == 0
    assert shares[0].accuracy == pytest.approx(edge_right / len(both.verdicts))
    assert shares[-1].escalation == 1
    assert shares[-1].accuracy == pytest.approx(cloud_right / len(both.verdicts))
    assert shares[-1].cloud_s == pytest.approx(0.1 * len(both.verdicts))


def test_points_over_all_products_are_pooled_counts(both: RunFolder, station: Station) -> None:
    found = sweep(both.verdicts, station, cloud_seconds=None)
    assert set(found.per_product) == {"bolt", "nut"}
    for i, point in enumerate(found.points):
        of = [points[i] for points in found.per_product.values()]
        assert point.n == sum(p.n for p in of)
        assert point.accuracy * point.n == pytest.approx(sum(p.accuracy * p.n for p in of))
        assert point.escalation * point.n == pytest.approx(sum(p.escalation * p.n for p in of))
        assert point.escape_rate == pytest.approx(sum(p.escape_rate or 0 for p in of) / 2)  # as many defects each
        assert point.cloud_s is None


def test_a_part_without_an_opinion_keeps_the_edges_verdict_in_the_sweep(both: RunFolder, station: Station) -> None:
    from dataclasses import replace

    silent = [replace(v, where=Where.FALLBACK, cloud_p_defect=None, label=v.edge_label) for v in both.verdicts]
    points = [p for p in sweep(silent, station, cloud_seconds=None).points if p.knob == "share"]
    assert len({p.accuracy for p in points}) == 1


def test_a_sweep_survives_its_file(both: RunFolder, station: Station) -> None:
    found = sweep(both.verdicts, station, cloud_seconds=0.2)
    assert Sweep.from_json(json.loads(json.dumps(found.to_json())), where="sweep.json") == found
    assert len(found.table().rows) == len(found.points) == 20
    with pytest.raises(BadInput, match=r"not a sweep .*: sweep\.json"):
        Sweep.from_json({"points": [{"knob": 1}]}, where="sweep.json")


def test_a_sweep_needs_labels(both: RunFolder, station: Station) -> None:
    from dataclasses import replace

    with pytest.raises(BadInput, match="no part with a known label"):
        sweep([replace(v, truth=None) for v in both.verdicts], station, cloud_seconds=None)


def test_the_comparison_shows_what_was_measured_and_dashes_for_the_rest(both: RunFolder) -> None:
    unlabelled = dict(both.summary) | dict.fromkeys(("accuracy", "auroc", "escape_rate"))
    table = comparison({"cascade": both.summary, "unlabelled": unlabelled})
    figures = {row[""]: (row["cascade"], row["unlabelled"]) for row in table.rows}
    assert figures["accuracy"] == (f"{both.summary['accuracy']:.1%}", None)
    assert figures["AUROC"][1] is None
    assert figures["put to the cloud"] == ("100.0%", "100.0%")
    assert "| – |" in table.to_markdown()


def test_an_arm_changes_the_routing_and_nothing_else() -> None:
    arm = arm_settings(SETTINGS, "random", ratio=0.2)
    assert (arm.route.mode, arm.route.random_ratio) == ("random", 0.2)
    assert arm.model_copy(update={"route": SETTINGS.route}) == SETTINGS


def test_the_escalated_share_counts_fallbacks() -> None:
    assert escalated_share({"routing": {"cloud": 1, "fallback": 2}, "n": 10}) == 0.3
    assert escalated_share({"routing": {"cloud": 0, "fallback": 0}, "n": 0}) is None


SUMMARY = {"accuracy": 0.9, "auroc": None, "latency_ms": {"p99": 40.0}, "models": {"edge": "m"}}


@pytest.mark.parametrize(
    ("text", "holds"),
    [("accuracy>=0.9", True), ("accuracy > 0.9", False), ("latency_ms.p99<=60", True), ("latency_ms.p99<4e1", False)],
)
def test_a_gate_holds_or_names_the_figure(text: str, holds: bool) -> None:
    gates = [parse_gate(text)]
    if holds:
        require(gates, SUMMARY)
    else:
        with pytest.raises(GateFailed, match=r"is (0\.9|40), [<>]"):
            require(gates, SUMMARY)


def test_a_figure_that_was_not_measured_misses_its_gate() -> None:
    with pytest.raises(GateFailed, match="auroc was not measured"):
        require([parse_gate("auroc>=0.5")], SUMMARY)


def test_all_missed_gates_are_named() -> None:
    with pytest.raises(GateFailed, match=r"accuracy is 0\.9.*; latency"):
        require([parse_gate("accuracy>=1"), parse_gate("latency_ms.p99<=1"), parse_gate("accuracy>0")], SUMMARY)


@pytest.mark.parametrize("text", ["accuracy", "accuracy=0.9", "accuracy>=", "accuracy>=good", ">=1", "a>=1-2"])
def test_what_is_no_gate_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="not a gate"):
        parse_gate(text)


@pytest.mark.parametrize("figure", ["accurracy", "latency_ms.p98", "models.edge", "latency_ms"])
def test_a_gate_on_what_is_no_figure_is_refused(figure: str) -> None:
    with pytest.raises(BadInput, match=r"no such figure|not a figure"):
        require([parse_gate(f"{figure}>=0")], SUMMARY)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([">=", "<=", ">", "<"]), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_gate_says_what_its_sign_says(sign: str, value: float, limit: float) -> None:
    expected = {">=": value >= limit, "<=": value <= limit, ">": value > limit, "<": value < limit}[sign]
    assert (Gate("x", sign, limit).miss({"x": value}) is None) == expected


def test_the_cloud_benchmark_counts_answers_and_the_services_own_batches(tmp_path: Path) -> None:
    with service_process(tmp_path, seconds=0.01, max_batch=4) as (_, url):
        client = HttpCloudClient(url, CloudSettings(in_flight=4))
        speed, sizes = bench_cloud(
            client, [query("a"), query("b")], http_batches(url), timeout_s=5, concurrency=(1, 4), seconds=0.4
        )
        client.close()
    alone, four = speed.rows
    assert alone["mean_batch"] == 1.0
    assert four["mean_batch"] > 1.5
    assert four["per_s"] > alone["per_s"]
    assert alone["p50_ms"] >= 10
    assert alone["failed"] == four["failed"] == 0
    for row, figures in zip(sizes.rows, speed.rows, strict=True):
        batches = sum(int(count) for name, count in row.items() if name != "concurrency")
        assert batches * figures["mean_batch"] == pytest.approx(figures["answered"])
    assert sizes.rows[0]["<=1"] == alone["answered"]


def test_the_cloud_benchmark_counts_refusals_by_reason() -> None:
    class Busy:
        model_id = "busy"
        asked = 0

        def judge(self, query: Query, *, deadline_s: float) -> Opinion:
            self.asked += 1
            if self.asked % 2 == 0:
                raise CloudError(Reason.CLOUD_REFUSED, "429", retry_after_s=0.001)
            return Opinion(0.5, query and FakeBackend()._one(query).evidence, self.model_id)

        def close(self) -> None:
            return

    speed, _ = bench_cloud(Busy(), [query()], dict, timeout_s=1, concurrency=(1,), seconds=0.05)
    assert speed.rows[0]["failed"] > 0
    assert speed.rows[0]["mean_batch"] is None
    assert "cloud_refused" in speed.notes[1]


def test_the_cloud_benchmark_refuses_a_service_that_does_not_answer() -> None:
    client = HttpCloudClient("http://127.0.0.1:9", CloudSettings())
    with pytest.raises(BadInput, match="the service does not answer"):
        bench_cloud(client, [query()], dict, timeout_s=1)
    with pytest.raises(BadInput, match="nothing to ask"):
        bench_cloud(client, [], dict, timeout_s=1)
    client.close()


def test_labels_are_what_the_sweep_is_measured_against(both: RunFolder) -> None:
    assert {v.truth for v in both.verdicts} == {Label.GOOD, Label.DEFECT}
