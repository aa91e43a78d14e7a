"""``summary.json``: stable keys, honest nulls, and where unreadable parts go."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saec.calibrate.calibration import ONE_GOOD, CalibrationData, calibrate
from saec.config import CalibrationSettings
from saec.errors import BadInput
from saec.evaluate.meter import Energy, Reading
from saec.evaluate.summary import RunTimes, calibration_summary, summarise, write_summary
from saec.route.stats import PipelineStats
from saec.types import Label, Reason, Verdict, Where

GOOD, BAD, LOST = Label.GOOD, Label.DEFECT, Label.UNREADABLE


def verdict(label: Label, truth: Label | None = None, p: float | None = None, **more: Any) -> Verdict:
    values: dict[str, Any] = {
        "part_id": "p",
        "sha256": "0" * 64,
        "product": "cell",
        "path": "cell.png",
        "where": Where.EDGE,
        "reason": Reason.EDGE_CONFIDENT,
    }
    return Verdict(label=label, truth=truth, p_defect=p, **values | more)


RUN = [
    verdict(BAD, BAD, 0.9, timings_ms={"local": 10.0}),
    verdict(GOOD, BAD, 0.3, timings_ms={"local": 20.0}),
    verdict(BAD, GOOD, 0.6, timings_ms={"local": 30.0}, where=Where.CLOUD, reason=Reason.IN_BAND, uplink_bytes=700),
    verdict(GOOD, GOOD, 0.1, where=Where.FALLBACK, reason=Reason.CLOUD_TIMEOUT, uplink_bytes=300, product="wafer"),
    verdict(LOST, BAD, reason=Reason.UNREADABLE, error="truncated"),
]
METER = Reading(2.0, 3.0, 210.0, 250.0, Energy("measured", 36.0, "processor packages"), None, None, 11)


def test_the_summary_has_the_designs_keys() -> None:
    summary = summarise(RUN)
    assert {
        *("n", "accuracy", "balanced_accuracy", "auroc", "escape_rate", "overkill_rate", "confusion", "per_product"),
        *("routing", "time", "latency_ms", "uplink_bytes", "energy", "memory", "models", "calibration"),
        *("unreadable", "intervals", "status"),
    } <= set(summary)
    assert set(summary["confusion"]) == {"tp", "fp", "tn", "fn"}
    assert set(summary["routing"]) == {"edge", "cloud", "fallback", "reasons"}
    assert {"wall_s", "scene_s", "edge_s", "cloud_s", "overlap"} <= set(summary["time"])
    assert set(summary["latency_ms"]) == {"p50", "p90", "p99"}
    assert {"status", "joules", "mwh_per_correct"} <= set(summary["energy"])
    assert set(summary["memory"]) == {"rss_mean_mb", "rss_peak_mb"}


def test_the_figures_of_a_worked_run() -> None:
    summary = summarise(
        RUN, stats=RunTimes(wall_s=2.0, edge_s=1.5, cloud_s=1.0, deadline_ms=25.0), meter=METER, models={"edge": "e1"}
    )
    assert (summary["n"], summary["labelled"], summary["unreadable"]) == (5, 4, 1)
    assert summary["confusion"] == {"tp": 1, "fp": 1, "tn": 1, "fn": 1}
    assert (summary["accuracy"], summary["escape_rate"], summary["overkill_rate"]) == (0.5, 0.5, 0.5)
    assert summary["auroc"] == 0.75
    assert summary["routing"] == {
        "edge": 3,
        "cloud": 1,
        "fallback": 1,
        "reasons": {"edge_confident": 2, "unreadable": 1, "in_band": 1, "cloud_timeout": 1},
    }
    assert summary["latency_ms"]["p50"] == 20.0
    assert summary["deadline"] == {"ms": 25.0, "late": 1}
    assert summary["uplink_bytes"] == 1000
    assert summary["energy"]["mwh_per_correct"] == pytest.approx(36.0 * 1000 / 3600 / 2)
    assert summary["per_product"]["wafer"]["n"] == 1
    assert summary["intervals"]["escape_rate"] == pytest.approx([0.0126, 0.9874], abs=1e-4)  # Clopper–Pearson, 1 of 2


def test_an_unreadable_part_is_counted_but_enters_no_rate() -> None:
    with_lost, without = summarise(RUN), summarise(RUN[:4])
    assert with_lost["unreadable"] == 1 and with_lost["n"] == without["n"] + 1
    for key in ("accuracy", "escape_rate", "overkill_rate", "auroc", "confusion"):
        assert with_lost[key] == without[key]


def test_without_truth_the_rates_are_null_and_the_status_says_why() -> None:
    summary = summarise([verdict(GOOD, None, 0.2), verdict(BAD, None, 0.8)])
    for key in ("accuracy", "balanced_accuracy", "auroc", "escape_rate", "overkill_rate"):
        assert summary[key] is None
        assert summary["status"][key] == "no part with known truth"
    assert summary["confusion"] == {"tp": None, "fp": None, "tn": None, "fn": None}


def test_with_one_class_only_what_can_be_known_is_given() -> None:
    summary = summarise([verdict(GOOD, GOOD, 0.2), verdict(BAD, GOOD, 0.8)])
    assert summary["overkill_rate"] == 0.5 and summary["escape_rate"] is None
    assert summary["status"]["escape_rate"] == "one class is missing"


def test_what_was_not_measured_is_null_with_a_status() -> None:
    summary = summarise([verdict(GOOD, GOOD, 0.1)])
    assert summary["energy"]["status"] == "unavailable" and summary["energy"]["joules"] is None
    assert summary["memory"]["rss_peak_mb"] is None and summary["time"]["wall_s"] is None
    assert summary["latency_ms"]["p99"] is None
    assert {"energy", "memory", "time", "latency_ms"} <= set(summary["status"])


def test_an_empty_run_has_a_summary() -> None:
    summary = summarise([])
    assert summary["n"] == 0 and summary["accuracy"] is None and summary["per_product"] == {}


def test_the_pipelines_own_times_are_taken_over() -> None:
    counts = dict.fromkeys((f.name for f in fields(PipelineStats)), 0)
    busy = {
        "wall_s": 2.5,
        "decode_s": 0.5,
        "scene_s": None,
        "edge_s": 1.5,
        "local_s": 2.0,
        "cloud_s": 1.0,
        "busy_s": 2.5,
        "explain_s": None,
    }
    stats = PipelineStats(**(counts | busy | {"deadline_ms": 200.0, "interrupted": False}))  # type: ignore[arg-type]
    assert RunTimes.of(stats) == RunTimes(2.5, 0.5, None, 1.5, 1.0, overlap=0.5, deadline_ms=200.0)
    assert summarise(RUN, stats=RunTimes.of(stats))["time"]["overlap"] == 0.5


def test_the_calibration_says_in_words_what_is_guaranteed() -> None:
    good = np.random.default_rng(0).normal(0, 1, 99)
    fitted = calibrate(CalibrationData(good, np.full(99, 0.4)), CalibrationSettings(overkill=0.05))
    product = calibration_summary({"cell": fitted})["products"]["cell"]
    assert "99 good parts" in product["statement"] and "5.00% overkill" in product["statement"]
    assert "Escape: no bound was asked for" in product["statement"]
    assert product["thresholds"]["tau_edge"] == 0.5
    json.dumps(product, allow_nan=False)


def test_one_good_part_is_not_said_to_prove_anything() -> None:
    copies = np.random.default_rng(0).normal(0, 1, 8)
    fitted = calibrate(CalibrationData(copies, np.full(8, 0.4)), CalibrationSettings(overkill=0.05))
    said = calibration_summary({"cell": replace(fitted, notes=(ONE_GOOD,))})["products"]["cell"]["statement"]
    assert "nothing can be proven from one good part" in said and "8 good parts" not in said


def test_the_verdicts_are_counted_also_where_nothing_is_known_about_the_truth() -> None:
    summary = summarise([verdict(GOOD), verdict(BAD), verdict(BAD, product="wafer"), verdict(LOST)])
    assert summary["called"] == {"good": 1, "defect": 2}
    assert summary["per_product"]["wafer"]["called"] == {"good": 0, "defect": 1}


def test_parts_that_the_station_has_learnt_from_are_counted() -> None:
    assert summarise(RUN, learnt={"0" * 64})["learnt"] == len(RUN)
    assert summarise(RUN)["learnt"] == 0


def test_models_come_from_the_verdicts_when_not_given() -> None:
    run = [verdict(GOOD, models={"edge": "a"}), verdict(GOOD, models={"edge": "b", "cloud": "c"})]
    assert summarise(run)["models"] == {"edge": "a, b", "cloud": "c"}


def test_the_summary_survives_the_round_trip_through_its_file(tmp_path: Path) -> None:
    summary = summarise(RUN, stats=RunTimes(2.0), meter=METER)
    write_summary(summary, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_that_cannot_be_written_is_one_clear_line_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "summary.json"
    file.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BadInput, match=r"cannot write \(No space left on device\): .*summary\.json"):
        write_summary({"n": 1}, file)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
