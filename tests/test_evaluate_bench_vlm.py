"""``saec bench vlm``: real processes, a tiny bundle; figures that are measured, and none that are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import cli_fakes
from cli_fakes import flat, tree
from cli_run import process, saec
from saec.config import MllmSettings, Settings
from saec.errors import BadInput
from saec.evaluate import bench_vlm as bench
from saec.evaluate.bench_vlm import bench_vlm
from saec.evaluate.bench_vlm_arm import Cell, Job, Reading, measure
from tiny_bundle import save_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("bundles") / "tiny", cache=1023)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    folder = flat(tmp_path_factory.mktemp("images"), 4)
    np.save(folder / "map.npy", np.ones((4, 4), np.float32))
    return [Cell(image=path, product="bolt", anomaly_map=folder / "map.npy") for path in sorted(folder.glob("*.png"))]


@pytest.fixture(scope="module")
def settings(bundle: Path) -> MllmSettings:
    return MllmSettings(model=str(bundle), threads=1, max_side=56, evidence_tokens=16)


def reading(**changes: object) -> Reading:
    ms = {"decision": [40.0, 60.0], "decode": [5.0], "first token": [30.0], "second question": [9.0]}
    figures = {"cold_s": 2.0, "embedded_s": 1.0, "load_s": 0.5, "steady_mb": 100.0, "peak_mb": 120.0}
    return Reading.model_validate({"model_id": "m", "p_defect": [0.2, 0.9], "ms": ms, **figures, **changes})


def rows(table: bench.Table, key: str) -> dict[str, dict[str, object]]:
    return {str(row[key]): dict(row) for row in table.rows}


def test_without_torch_the_bundle_is_measured_alone_and_nothing_is_compared(bundle, settings, cells):
    told = []
    stages, ratios = bench_vlm(
        {"float32": bundle},
        settings,
        cells,
        torch=False,
        rounds=2,
        answers=1,
        tokens=4,
        progress=lambda *step: told.append(step),
    )
    assert stages.columns == ("stage", "float32")
    assert all(row["float32"] is None or row["float32"] > 0 for row in stages.rows)
    measured = rows(stages, "stage")
    for name in ("decision, ms", "vision, ms", "first token, ms", "load, s", "memory, MB"):
        assert measured[name]["float32"] is not None, name
    assert measured["decision, ms"]["float32"] >= measured["vision, ms"]["float32"]
    found = rows(ratios, "figure")
    assert found[bench.COLD.name]["float32"] > measured["load and first decision, s"]["float32"]
    assert found[bench.SECOND.name]["float32"] is not None
    for target in (bench.DECISION, bench.DECODE, bench.MEMORY, bench.AGREEMENT):
        assert found[target.name]["float32"] is None
        assert found[target.name]["target"]
    assert any("no torch arm" in note for note in stages.notes)
    assert told == [("rounds of all arms", 0, 2), ("rounds of all arms", 1, 2)]
    assert json.dumps([stages.to_json(), ratios.to_json()])


def test_arms_are_compared_cell_by_cell_and_by_medians(monkeypatch, settings, cells):
    """Torch takes twice as long and four times the memory, and calls one cell of four another way."""
    asked = []

    def run(name: str, job: Job) -> Reading:
        asked.append((name, [cell.image.name for cell in job.cells]))
        if name != bench.TORCH:
            return reading()
        slow = {"decision": [100.0], "decode": [20.0]}
        second = job.cells[0].image.name == "0001.png"
        return reading(steady_mb=400.0, ms=slow, p_defect=[0.2, 0.4 if second else 0.85])

    monkeypatch.setattr(bench, "_run", run)
    bundles = {"int8": Path("a"), "int4": Path("b")}
    stages, ratios = bench_vlm(bundles, settings, cells, torch=True, rounds=2)
    assert stages.columns == ("stage", "torch", "int8", "int4")
    shares = {0: ["0000.png", "0002.png"], 1: ["0001.png", "0003.png"]}
    assert asked == [(name, shares[number]) for number in (0, 1) for name in ("torch", "int8", "int4")]
    figures = rows(ratios, "figure")
    assert figures[bench.DECISION.name] == {"figure": bench.DECISION.name, "target": "≥ 2", "int8": 2.0, "int4": 2.0}
    assert figures[bench.DECODE.name]["int8"] == 4.0
    assert figures[bench.MEMORY.name]["int8"] == 0.25
    assert figures[bench.SECOND.name]["int8"] == pytest.approx(0.3)
    assert figures[bench.AGREEMENT.name]["int8"] == 75.0
    assert figures["largest difference of P(defect) to torch's"]["int8"] == pytest.approx(0.5)
    assert figures["mean difference of P(defect) to torch's"]["int8"] == pytest.approx(0.1375)


def test_an_arm_that_fails_is_named_with_its_own_last_words(tmp_path, settings, cells):
    with pytest.raises(BadInput, match=r"the arm failed .*no exported model here.*: int8"):
        bench_vlm({"int8": tmp_path}, settings, cells, torch=False, rounds=1)


def test_too_few_images_for_the_rounds_are_refused(bundle, settings, cells):
    with pytest.raises(BadInput, match="nothing to measure"):
        bench_vlm({"float32": bundle}, settings, cells, torch=False, rounds=3)


def test_the_first_decision_counts_as_the_start_and_in_no_median(bundle, settings, cells):
    found = measure(Job(settings=settings, bundle=bundle, cells=cells, answers=2, tokens=4))
    assert len(found.p_defect) == len(cells)
    assert len(found.ms["decision"]) == len(cells) - 1
    assert len(found.ms["first token"]) == len(found.ms["evidence"]) == 2
    assert found.load_s < found.embedded_s < found.cold_s


def test_the_command_measures_a_bundle_and_saves_its_tables(tmp_path, bundle):
    small = ("--set", "mllm.max_side=56", "--set", "mllm.evidence_tokens=16", "--set", "mllm.threads=1")
    folder = flat(tmp_path / "parts", 4)
    found = saec("bench", "vlm", bundle, "--images", folder, "--rounds", 1, *small, "--json", tmp_path / "bench.json")
    assert found.code == 0, found.err
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert [table["columns"] for table in saved["tables"]] == [["stage", "float32"], ["figure", "target", "float32"]]
    assert saved["environment"]["cpu"]
    assert "no torch arm" in found.out


def test_an_unknown_precision_is_one_line():
    assert "unknown precision: int3 (of float32, int8, int4" in saec("bench", "vlm", "--precision", "int3").error()


def test_a_station_gives_each_cell_its_anomaly_map(tmp_path, monkeypatch):
    data = tree(tmp_path / "parts", train=6, other=4)
    assert process("fit", data, "--out", tmp_path / "station").code == 0
    cli_fakes.install(monkeypatch)
    from saec.cli.measured import cells_of

    cells = cells_of(data, tmp_path / "station", Settings(), tmp_path, 6)
    assert len(cells) == 6
    assert all("test" in cell.image.parts and cell.product == "bolt" for cell in cells)
    maps = [np.load(cell.anomaly_map, allow_pickle=False) for cell in cells if cell.anomaly_map]
    assert [values.shape for values in maps] == [(16, 16)] * 6


def test_torch_and_the_exported_model_measure_the_same_stages_and_decide_alike(tmp_path, cells, monkeypatch):
    torch_itself = pytest.importorskip("torch")
    monkeypatch.setattr(torch_itself, "set_num_threads", lambda threads: None)  # of all the tests after this one
    from saec.vlm.export.bundle import export_bundle
    from tiny_vlms import save_tiny

    tiny = save_tiny("llava", tmp_path / "tiny")
    export_bundle(str(tiny), tmp_path / "bundle", precision="float32")
    settings = MllmSettings(model=str(tiny), threads=1, max_side=56, evidence_tokens=16)
    jobs = [
        Job(settings=settings, bundle=of, cells=cells[:3], answers=2, tokens=4) for of in (None, tmp_path / "bundle")
    ]
    torch, onnx = (measure(job) for job in jobs)
    assert onnx.p_defect == pytest.approx(torch.p_defect, abs=1e-4)
    for reading in (torch, onnx):
        assert reading.ms.keys() >= {"decision", "vision", "prefill", "first token", "second question", "evidence"}
        assert all(0 < v < d for v, d in zip(reading.ms["vision"], reading.ms["decision"], strict=True))
    assert len(torch.ms["decode"]) == 2
