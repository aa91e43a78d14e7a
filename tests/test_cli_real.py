"""The command as a user has it, on photographs of solar cells: the shipped detector, no fakes, processes of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli_run import Result, environment
from saec.data.readers import read_dataset
from saec.data.verify import content_hashes
from saec.evaluate.report_run import RunFolder
from saec.types import Label

elpv_dataset = pytest.importorskip("elpv_dataset")


def saec(*args: object) -> Result:
    found = subprocess.run(
        [sys.executable, "-m", "saec", *map(str, args)], capture_output=True, text=True, timeout=120, env=environment()
    )
    return Result(found.returncode, found.stdout, found.stderr)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen good and twelve defective monocrystalline cells to fit on, six of each to test."""
    source, out = Path(elpv_dataset.__file__).parent / "data", tmp_path_factory.mktemp("cells")
    rows = [line.split() for line in (source / "labels.csv").read_text().splitlines() if line.strip()]
    for probability, name, count in (("0.0", "good", 16), ("1.0", "defect", 12)):
        chosen = [path for path, p, kind in rows if float(p) == float(probability) and kind == "mono"]
        for split, some in (("fit", chosen[:count]), ("test", chosen[count : count + 6])):
            (out / split / name).mkdir(parents=True)
            for path in some:
                shutil.copy(source / path, out / split / name)
    return out


@pytest.fixture(scope="module")
def station(cells: Path) -> Path:
    found = saec("fit", cells / "fit", "--out", cells / "station", "--json")
    assert found.code == 0, found.err
    assert found.err == ""
    tree = json.loads(found.out)
    assert list(tree["products"]) == ["fit"]
    assert "Overkill" in tree["products"]["fit"]["statement"]
    return cells / "station"


def test_cells_are_inspected_with_heatmaps_boxes_and_a_report(cells, station, tmp_path):
    found = saec("evaluate", cells / "test", "-s", station, "-o", tmp_path / "run", "--product", "fit", "--json")
    assert found.code == 0, found.err
    assert found.err == ""
    run = RunFolder.load(tmp_path / "run")
    assert run.summary["n"] == 12
    assert run.summary["auroc"] > 0.6
    assert all(run.heatmap(v).is_file() for v in run.verdicts)
    assert any(v.evidence.boxes for v in run.verdicts if v.label is Label.DEFECT)
    assert run.manifest["station"]["dataset"] == "fit"
    assert "data:image/jpeg;base64" in (tmp_path / "run" / "report.html").read_text()


def test_the_same_image_in_any_file_format_gets_the_same_verdict(cells, station, tmp_path):
    """16-bit, palette, alpha and EXIF-turned twins of one cell score as the cell does."""
    from PIL import Image

    with Image.open(next((cells / "test" / "defect").iterdir())) as picture:
        grey = picture.convert("L")
    (tmp_path / "twins").mkdir()
    grey.save(tmp_path / "twins" / "plain.png")
    grey.convert("RGBA").save(tmp_path / "twins" / "alpha.png")
    grey.convert("P").save(tmp_path / "twins" / "palette.png")
    grey.convert("I;16").point(lambda v: v * 257).save(tmp_path / "twins" / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    grey.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "twins" / "turned.png", exif=exif)
    found = saec("inspect", tmp_path / "twins", "-s", station, "-o", tmp_path / "run")
    assert found.code == 0, found.err
    scores = {v.part_id: v.edge_score for v in RunFolder.load(tmp_path / "run").verdicts}
    assert len(scores) == 5
    assert all(abs(score - scores["plain.png"]) < 1e-5 for score in scores.values()), scores


def test_what_the_station_was_fitted_on_cannot_be_evaluated(cells, station, tmp_path):
    line = saec("evaluate", cells / "fit", "-s", station, "-o", tmp_path / "run", "--product", "fit").error()
    assert "also used for" in line
    index = json.loads((station / "station.json").read_text())
    known = {*index["train_sha256"], *index["calibration_sha256"]}
    assert known == content_hashes([cells / "fit"])
    assert len(read_dataset(cells / "fit")) == 28


def test_a_damaged_or_foreign_station_is_refused(cells, station, tmp_path):
    copy = shutil.copytree(station, tmp_path / "station")
    base = ("inspect", cells / "test", "-s", copy, "-o", tmp_path / "run")
    bank = next(copy.rglob("*.safetensors"))
    whole = bank.read_bytes()
    bank.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "damaged" in saec(*base).error()
    bank.write_bytes(whole)
    index = copy / "station.json"
    tree = json.loads(index.read_text())
    index.write_text(json.dumps(tree | {"format": 99}))
    assert "99" in saec(*base).error()
    index.write_text("{")
    assert "damaged" in saec(*base).error()
    shutil.rmtree(copy)
    assert "no station here" in saec(*base).error()
    assert not (tmp_path / "run").exists()


def test_fitting_on_an_unreadable_image_names_it(cells, tmp_path):
    shutil.copytree(cells / "fit", tmp_path / "fit")
    victim = next((tmp_path / "fit" / "good").iterdir())
    victim.write_bytes(victim.read_bytes()[:1000])
    line = saec("fit", tmp_path / "fit", "--out", tmp_path / "station").error()
    assert str(victim) in line
    assert "truncated" in line
    assert [path.name for path in tmp_path.iterdir()] == ["fit"]


def test_a_classifier_can_be_the_edge(cells, tmp_path):
    """Bright or dark: two classes from the mean of the image."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    mean = helper.make_node("ReduceMean", ["x"], ["m"], axes=[1, 2, 3], keepdims=0)
    column = helper.make_node("Reshape", ["m", "shape"], ["c"])
    scores = helper.make_node("MatMul", ["c", "w"], ["y"])
    graph = helper.make_graph(
        [mean, column, scores],
        "bright",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [
            helper.make_tensor("shape", TensorProto.INT64, [2], [1, 1]),
            helper.make_tensor("w", TensorProto.FLOAT, [1, 2], [4.0, -4.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "bright.onnx")
    args = ("--classifier", tmp_path / "bright.onnx", "--rule", "binary", "--side", "64")
    found = saec("fit", cells / "fit", "--out", tmp_path / "station", *args)
    assert found.code == 0, found.err
    found = saec(
        "evaluate", cells / "test", "-s", tmp_path / "station", "-o", tmp_path / "run", "--product", "fit", "--json"
    )
    assert found.code == 0, found.err
    assert json.loads(found.out)["models"]["edge"].startswith("classifier bright@")
    line = saec("fit", cells / "fit", "--out", tmp_path / "other", "--classifier", tmp_path / "none.onnx").error()
    assert "none.onnx" in line
