"""Rounding a bundle: what it costs is measured on real questions, and its ranges come from them or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

pytest.importorskip("onnx")

from cli_run import saec
from saec.config import PromptSettings
from saec.errors import BadInput
from saec.types import Query
from saec.vlm.compile.source import open_source
from saec.vlm.contract.bundle import Precision, read_bundle
from saec.vlm.edge.vlm import OnnxVlm
from saec.vlm.export.quality import Asked, Example, losses
from saec.vlm.export.quantize import Format, Quantization, quantize
from saec.vlm.prompt import Ask, Question, build_question
from tiny_bundle import save_bundle


def _question(seed: int) -> Question:
    image = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
    return build_question(Query("p", "cell", image, (32, 24)), Ask.LABEL, PromptSettings(max_side=56))


def _examples(count: int) -> list[Example]:
    return [Example(f"{seed}.png", f"{seed:064x}", _question(seed)) for seed in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("bundle") / "tiny", cache=1023)


@pytest.mark.parametrize(("to", "most"), [("int8", 0.02), ("int4", 0.15)])
def test_rounded_weights_give_a_bundle_whose_measured_loss_is_recorded(
    tmp_path: Path, folder: Path, to: Format, most: float
) -> None:
    made = quantize(folder, to, _examples(12), tmp_path / "out")

    assert made == read_bundle(tmp_path / "out")
    assert (made.precision, made.model_id) == (to, f"tiny-0@{to}+p2")
    assert made.fingerprint != read_bundle(folder).fingerprint
    assert made.quality["measured_on"] == 12
    assert 0 < made.quality["mean_delta_p"] < most
    record = Quantization.model_validate_json((tmp_path / "out" / "quantization.json").read_bytes())
    assert [named.name for named in record.measured] == [f"{seed}.png" for seed in range(12)]
    assert record.calibration == ()
    one, other = (OnnxVlm.load(each, threads=1).decide(_question(0))[0].p_defect for each in (folder, tmp_path / "out"))
    assert 0 < abs(one - other) <= made.quality["max_delta_p"]


def test_rounding_and_exporting_give_the_same_decoder(tmp_path: Path, folder: Path) -> None:
    quantize(folder, "int8", _examples(4), tmp_path / "out")
    exported = save_bundle(tmp_path / "exported", precision="int8", cache=1023)

    one, other = (Asked(each, threads=1).logits(_examples(1)[0]) for each in (tmp_path / "out", exported))
    decoders = [onnx.load(each / "decoder.onnx").graph for each in (tmp_path / "out", exported)]

    assert decoders[0].node == decoders[1].node
    assert decoders[0].initializer == decoders[1].initializer
    assert np.abs(np.exp(one) - np.exp(other)).max() < 0.05  # the tower is rounded too


def test_the_tower_keeps_what_is_no_product_and_rounds_what_is(tmp_path: Path, folder: Path) -> None:
    quantize(folder, "int8", _examples(4), tmp_path / "out")

    before, after = (onnx.load(each / "vision.onnx").graph for each in (folder, tmp_path / "out"))

    assert [node.op_type for node in before.node] == ["Reshape", "MatMul"]
    assert "MatMulIntegerToFloat" in [node.op_type for node in after.node]
    assert list(before.output) == list(after.output)


def test_w8a16_is_calibrated_on_some_examples_and_measured_on_others(tmp_path: Path, folder: Path) -> None:
    made = quantize(folder, "w8a16", _examples(12), tmp_path / "out", n=64, calibrate=8)

    signature = made.signature
    assert (signature.n, signature.context, signature.dtype) == (64, 1024, "float32")
    assert 0 < made.quality["mean_delta_p"] < 0.05
    assert made.quality["measured_on"] == 4
    record = json.loads((tmp_path / "out" / "quantization.json").read_text())
    names = [[each["name"] for each in record[part]] for part in ("calibration", "measured")]
    assert names == [[f"{seed}.png" for seed in range(8)], [f"{seed}.png" for seed in range(8, 12)]]
    graph = onnx.load(tmp_path / "out" / "decoder.onnx", load_external_data=False).graph
    types = {each.name: each.data_type for each in graph.initializer}
    quantised = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {types[node.input[2]] for node in quantised} == {onnx.TensorProto.UINT16}
    assert onnx.TensorProto.INT8 in types.values()
    # It is compiled as it is: built anew it would lose its ranges.
    assert not open_source(tmp_path / "out").fixed(1).rebuilt


def test_other_examples_give_other_ranges(tmp_path: Path, folder: Path) -> None:
    def scales(name: str, examples: list[Example]) -> list[float]:
        quantize(folder, "w8a16", examples, tmp_path / name, n=64, calibrate=4)
        graph = onnx.load(tmp_path / name / "decoder.onnx").graph
        found = [each for each in graph.initializer if each.name.endswith("_scale") and not each.dims]
        return [float(onnx.numpy_helper.to_array(each)) for each in found]

    examples = _examples(12)

    assert scales("one", examples) != scales("other", examples[::-1])


@pytest.mark.parametrize(
    ("to", "count", "precision", "said"),
    [
        ("w8a16", 0, "float32", "0 different examples are too few.*noise is no substitute"),
        ("w8a16", 34, "float32", "34 different examples"),
        ("int8", 3, "float32", "3 different examples"),
        ("int8", 4, "int8", "was rounded already"),
    ],
)
def test_nothing_is_rounded_without_real_examples_or_twice(
    tmp_path: Path, to: Format, count: int, precision: Precision, said: str
) -> None:
    folder = save_bundle(tmp_path / "tiny", precision=precision)

    with pytest.raises(BadInput, match=said):
        quantize(folder, to, _examples(count), tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_copies_of_an_image_count_once(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BadInput, match="2 different examples"):
        quantize(folder, "int8", [*_examples(2)] * 10, tmp_path / "out")


def test_losses_are_those_of_the_distributions() -> None:
    before = [np.log([0.2, 0.6, 0.2]), np.log([0.5, 0.4, 0.1])]
    after = [np.log([0.2, 0.6, 0.2]), np.log([0.4, 0.5, 0.1])]

    found = losses((0, 1), before, after)

    assert found["measured_on"] == 2
    assert found["label_agreement"] == found["top1_agreement"] == 0.5
    assert found["mean_delta_p"] == pytest.approx((5 / 9 - 4 / 9) / 2)
    assert found["mean_kl"] == pytest.approx((0.5 * np.log(5 / 4) + 0.4 * np.log(4 / 5)) / 2)
    assert "mean_delta_p" not in losses(None, before, after)


def test_the_command_rounds_with_a_folder_of_images_or_a_file_of_prompts(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "parts").mkdir()
    for seed in range(6):
        image = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "parts" / f"{seed}.png"), image)
    (tmp_path / "texts.txt").write_text("".join(f"What is a weld of kind {n}?\n" for n in range(6)))
    call = ("vlm", "quantize", folder, "--to", "int8", "--json")

    pictures = json.loads(saec(*call, "-o", tmp_path / "a", "--images", tmp_path / "parts").out)
    texts = json.loads(saec(*call, "-o", tmp_path / "b", "--prompts", tmp_path / "texts.txt").out)

    assert pictures["quality"]["measured_on"] == texts["quality"]["measured_on"] == 6
    assert texts["quality"]["mean_kl"] > 0
    assert "pass --images" in saec("vlm", "quantize", folder, "--to", "int8", "-o", tmp_path / "c").error()
    assert saec(*call, "-o", tmp_path / "a", "--images", tmp_path / "parts").error().startswith("error: this is in use")
