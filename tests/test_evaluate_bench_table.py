"""SAEC's table: every arm on the same parts, nothing dropped, nothing invented, nothing done twice."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cli_fakes import ExpertBackend, Station, fit_station, tree
from cloud_fakes import FakeBackend
from saec.cloud.embedded import EmbeddedClient
from saec.config import Settings
from saec.data.decode import read_image
from saec.data.readers import read_dataset
from saec.errors import BadInput
from saec.evaluate.baselines import Asked
from saec.evaluate.bench_table import Arm, Row, TableRun, classifier_arm, run_table, table_arms, zero_shot_arm
from saec.evaluate.meter import Meter
from saec.evaluate.report_run import RunFolder
from saec.evaluate.table_view import published, saec_json, saec_table
from saec.scene import scene_complexity
from saec.types import Part, Query, Verdict

SETTINGS = Settings()
NAMES = (
    *("edge-only", "zero-shot", "cloud-only", "cascade", "no-tuning"),
    *("no-complexity", "random", "no-reference", "no-anomaly-map"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("data") / "parts", other=14)


def with_tau_scene(station: Station, tau_scene: float) -> Station:
    found = station.calibration("bolt")
    other = station.with_route(SETTINGS.route)
    other._calibrations = {"bolt": replace(found, thresholds=replace(found.thresholds, tau_scene=tau_scene))}
    return other


@pytest.fixture(scope="module")
def station(root: Path, parts: list[Part]) -> Station:
    """One for which half of the scenes are too complex."""
    fitted = fit_station(read_dataset(root), SETTINGS, cloud=EmbeddedClient(ExpertBackend()))
    scores = sorted(scene_complexity(read_image(part.path)).score for part in parts)
    return with_tau_scene(fitted, scores[len(scores) // 2])


@pytest.fixture(scope="module")
def parts(root: Path) -> list[Part]:
    return list(read_dataset(root).select(split="test"))


class Cloud:
    """A backend that can be opened several times, and remembers how often and what it was shown."""

    def __init__(self, name: str) -> None:
        self.opened = 0
        self.seen: list[Query] = []
        self.asked = Asked.of_backend(name, self._make, max_batch=8)

    def _make(self) -> FakeBackend:
        self.opened += 1
        backend = FakeBackend()
        backend.seen = self.seen
        return backend


class Shows:
    """Progress that writes down the arms, and presses Ctrl-C in one of them."""

    def __init__(self, stop_in: str = "") -> None:
        self.arms: list[str] = []
        self.stop_in = stop_in

    @contextmanager
    def __call__(self, name: str, total: int, done: Sequence[Verdict]) -> Iterator[Any]:
        self.arms.append(name)

        def progress(verdict: Verdict, final: bool) -> None:
            if name == self.stop_in:
                self.stop_in = ""
                raise KeyboardInterrupt

        yield progress


def table(
    out: Path, parts: Sequence[Part], station: Station, arms: Sequence[Arm], shows: Shows | None = None
) -> TableRun:
    return run_table(arms, parts, station, SETTINGS, out, shown=shows or Shows(), meter=lambda: Meter(()))


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, parts: list[Part], station: Station
) -> tuple[TableRun, Path, Cloud, Cloud]:
    """A whole table with both clouds at hand."""
    out = tmp_path_factory.mktemp("table")
    tuned, bare = Cloud("tuned"), Cloud("bare")
    return table(out, parts, station, table_arms(tuned.asked, bare.asked)), out, tuned, bare


def test_every_arm_runs_on_the_same_parts_and_each_model_is_opened_once(
    ran: tuple[TableRun, Path, Cloud, Cloud], parts: list[Part]
) -> None:
    run, out, tuned, bare = ran
    assert run.interrupted is None
    assert tuple(row.arm for row in run.rows) == NAMES
    assert (tuned.opened, bare.opened) == (1, 1)
    data = {RunFolder.load(folder).manifest["data"]["sha256"] for folder in (out / "arms").iterdir()}
    assert len(data) == 1
    assert all(row.summary is not None and row.summary["n"] == len(parts) for row in run.rows)


def test_each_arm_does_what_its_name_says(
    ran: tuple[TableRun, Path, Cloud, Cloud], parts: list[Part], station: Station
) -> None:
    run, _, tuned, bare = ran
    routing = {row.arm: row.summary["routing"] for row in run.rows if row.summary is not None}
    assert routing["edge-only"]["reasons"] == {"edge_only": len(parts)}
    assert routing["zero-shot"]["reasons"] == routing["cloud-only"]["reasons"] == {"cloud_only": len(parts)}
    assert set(routing["random"]["reasons"]) <= {"cloud_random", "edge_random"}
    assert "scene_complex" in routing["cascade"]["reasons"]
    assert "scene_complex" not in routing["no-complexity"]["reasons"]
    assert routing["no-tuning"]["cloud"] == routing["cascade"]["cloud"] == routing["no-reference"]["cloud"]
    # The two that a zero-shot model is put to: alone it sees nothing but the part, in the cascade all that there is.
    alone, inside = bare.seen[: len(parts)], bare.seen[len(parts) :]
    assert all(q.anomaly_map is None and q.edge_p_defect is None for q in alone)
    assert inside and all(q.anomaly_map is not None for q in inside)
    without_map = tuned.seen[-routing["no-anomaly-map"]["cloud"] :]
    assert without_map and all(q.anomaly_map is None for q in without_map)


def test_arms_that_are_done_are_not_run_again_and_no_model_is_opened_for_them(
    ran: tuple[TableRun, Path, Cloud, Cloud], parts: list[Part], station: Station
) -> None:
    run, out, _, _ = ran
    tuned, bare = Cloud("tuned"), Cloud("bare")
    again = table(out, parts, station, table_arms(tuned.asked, bare.asked))
    assert again == run
    assert (tuned.opened, bare.opened) == (0, 0)


def test_an_arm_is_never_taken_up_with_another_cloud(
    ran: tuple[TableRun, Path, Cloud, Cloud], parts: list[Part], station: Station
) -> None:
    with pytest.raises(BadInput):
        table(ran[1], parts, station, table_arms(Cloud("another").asked, Cloud("bare").asked))


def test_a_table_begun_on_other_parts_is_refused(
    ran: tuple[TableRun, Path, Cloud, Cloud], parts: list[Part], station: Station
) -> None:
    with pytest.raises(BadInput, match="begun on other parts"):
        table(ran[1], parts[:-1], station, table_arms(Cloud("tuned").asked, Cloud("bare").asked))


def test_an_interrupted_table_goes_on_where_it_was(tmp_path: Path, parts: list[Part], station: Station) -> None:
    def arms() -> list[Arm]:
        return table_arms(Cloud("tuned").asked, Cloud("bare").asked)

    shows = Shows(stop_in="cloud-only")
    broken = table(tmp_path, parts, station, arms(), shows)
    assert broken.interrupted is not None and broken.interrupted.summary is None
    assert shows.arms == ["edge-only", "zero-shot", "no-tuning", "cloud-only"]
    whole = table(tmp_path, parts, station, arms())
    assert whole.interrupted is None
    rows = {row.arm: row.summary for row in whole.rows}
    assert rows["cloud-only"] is not None and rows["cascade"] is not None
    assert rows["cloud-only"]["time"]["wall_s"] is None  # nobody measured all of it
    assert "resumed" in saec_json(whole.rows)["arms"][2]["status"]["wall_s"]
    assert rows["cascade"]["time"]["wall_s"] > 0


def test_where_calibration_found_no_use_for_the_scene_the_arm_without_it_is_not_run(
    tmp_path: Path, parts: list[Part], station: Station
) -> None:
    run = table(
        tmp_path, parts, with_tau_scene(station, float("inf")), table_arms(Cloud("tuned").asked, Cloud("bare").asked)
    )
    rows = {row.arm: row for row in run.rows}
    assert rows["no-complexity"].same_as == "cascade"
    assert rows["no-complexity"].summary == rows["cascade"].summary
    assert not (tmp_path / "arms" / "no-complexity").exists()
    assert any("no use for the scene score" in note for note in saec_table(run.rows, title="t").notes)


NOTHING = BadInput("the model x is not on this machine", where="x", fix="saec models pull x")


@pytest.fixture(scope="module")
def poor(tmp_path_factory: pytest.TempPathFactory, parts: list[Part], station: Station) -> TableRun:
    """A table for which no model is at hand."""
    none = Asked("", missing=NOTHING)
    missing = classifier_arm("yolo-cls", BadInput("no classifier", fix="pass --classifier"))
    arms = table_arms(none, none, missing, zero_shot_arm("llava-zero-shot", none))
    return table(tmp_path_factory.mktemp("poor"), parts, station, arms)


def test_arms_whose_model_is_missing_are_listed_with_the_way_to_get_it(poor: TableRun) -> None:
    names = [row.arm for row in poor.rows]
    assert names == ["edge-only", "yolo-cls", "zero-shot", "llava-zero-shot", *NAMES[2:]]
    assert [row.arm for row in poor.rows if row.summary is not None] == ["edge-only"]
    shown = saec_table(poor.rows, title="t")
    assert [row["arm"] for row in shown.rows] == names
    notes = {note[0]: note[2:] for note in shown.notes}
    said = {str(row["arm"]): notes[str(row["acc. %"])[1:]] for row in shown.rows[1:]}
    assert said["yolo-cls"] == "not at hand: no classifier (pass --classifier)"
    assert {why for name, why in said.items() if name != "yolo-cls"} == {f"not at hand: {NOTHING}"}
    states = {row["arm"]: row["state"] for row in saec_json(poor.rows)["arms"]}
    assert states["edge-only"] == "measured" and states["random"] == "not at hand"


def test_what_was_not_measured_is_null_with_its_reason_and_a_dash_with_a_footnote(poor: TableRun) -> None:
    tree_ = saec_json(poor.rows)
    json.dumps(tree_, allow_nan=False)
    edge = tree_["arms"][0]
    for figure in ("gpu_utilisation_percent", "power_w", "mwh_per_correct"):
        assert edge[figure] is None
        assert edge["status"][figure]
    assert edge["accuracy_percent"] > 50 and edge["wall_s"] > 0 and edge["memory_gb"] > 0
    assert edge["escalated_percent"] == 0.0
    absent = tree_["arms"][-1]
    assert all(absent[figure] is None for figure in ("accuracy_percent", "wall_s", "memory_gb"))
    assert "0.0" not in [str(value) for value in absent.values()]
    row = saec_table(poor.rows, title="t").rows[0]
    assert str(row["W"]).startswith("–") and row["W"] == row["mWh"]
    markdown = saec_table(poor.rows, title="t").to_markdown()
    assert f"{str(row['W'])[1:]} " in markdown


def measured(name: str, **changes: Any) -> Row:
    """A row as a machine with a GPU would give it."""
    summary: dict[str, Any] = {
        "n": 967,
        "labelled": 967,
        "unreadable": 0,
        "accuracy": 0.8511,
        "time": {"wall_s": 172.8},
        "machine": {"gpu_utilisation": 31.0, "gpu_w": 108.5, "problems": []},
        "energy": {"status": "measured", "joules": 108.5 * 172.8, "mwh_per_correct": 6.33, "detail": "GPU boards"},
        "memory": {"rss_peak_mb": 1300.0},
        "routing": {"cloud": 280, "fallback": 10},
        "status": {},
        **dict.fromkeys(("balanced_accuracy", "auroc", "escape_rate", "overkill_rate"), 0.8),
        "models": {},
    }
    return Row(name, {**summary, **changes})


def test_the_columns_are_saecs() -> None:
    """Values of saec.md §6, row SAEC, MVTec: 85.11 %, 172.8 s (0.179 s/img), 31.0 %, 108.5 W, 1.30 GB."""
    shown = saec_table([measured("cascade")], title="t")
    assert shown.columns == ("arm", "acc. %", "s", "s/img", "GPU %", "W", "mWh", "GB", "cloud %")
    assert list(shown.rows[0].values()) == ["cascade", "85.1", "172.8", "0.179", "31", "108.5", "6.33", "1.30", "30.0"]
    assert "power and energy of: GPU boards" in shown.notes
    assert any("for 10 parts the cloud gave no answer" in note for note in shown.notes)


def test_unanswered_parts_of_a_baseline_are_said() -> None:
    notes = saec_table([measured("zero-shot", unanswered=7)], title="t").notes
    assert "zero-shot: 7 parts without a usable answer, counted as wrong" in notes


def test_a_gpu_that_does_not_report_its_load_is_not_said_to_be_idle() -> None:
    row = measured("cascade", machine={"gpu_utilisation": None, "gpu_w": 20.0, "problems": ["nvml: no NVIDIA GPU"]})
    assert saec_json([row])["arms"][0]["status"] == {"gpu_utilisation_percent": "nvml: no NVIDIA GPU"}
    mig = measured("cascade", machine={"gpu_utilisation": None, "gpu_w": 20.0, "problems": []})
    assert "does not report" in saec_json([mig])["arms"][0]["status"]["gpu_utilisation_percent"]


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    rows = [measured(name) for name in (*NAMES, "llava-zero-shot")]
    console = Console(file=io.StringIO(), width=80, highlight=False)
    console.print(replace(saec_table(rows, title="t"), notes=()).to_rich())
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert sum("172.8" in line and "108.5" in line and "30.0" in line for line in lines) == len(rows)


def test_the_published_figures_are_marked_as_others() -> None:
    """saec.md §6."""
    shown = published()
    assert "other hardware and data" in shown.title
    assert "nothing of it was measured here" in shown.notes[0]
    accuracy = {(row["data"], row["model"]): row["acc. %"] for row in shown.rows}
    assert accuracy["MVTec AD", "SAEC"] == "85.11"
    assert accuracy["KSDD2", "YOLO11s-cls"] == "45.79"
