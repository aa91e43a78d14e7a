"""Any ONNX classifier as the edge: SAEC's normality rule, the binary rule, and what is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_parts import SETTINGS, dataset, parts, plate
from saec.calibrate.score import class_confidences
from saec.edge.classifier import ClassifierSpec, OnnxClassifier, temperature_of
from saec.edge.fit import fit_classifier_station
from saec.edge.station import INDEX, Station
from saec.errors import BadInput
from saec.types import Label

SIDE = 32


def classifier_file(
    path: Path,
    weights: np.ndarray,
    *,
    softmax: bool = False,
    side: int | str = SIDE,
    batch: int | str = 1,
    channels: int = 3,
    kind: int = TensorProto.FLOAT,
) -> Path:
    """Write a classifier whose logits are ``weights`` [3, K] times the mean of each colour, blue last."""
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["f"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["m", "w"], ["logits"]),
        helper.make_node("Softmax" if softmax else "Identity", ["logits"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("x", kind, [batch, channels, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, weights.shape[1]])],
        [numpy_helper.from_array(weights.astype(np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


TWO = np.array([[4.0, -4.0], [0.0, 0.0], [-4.0, 4.0]])
"""Red means good, blue means defect."""


def coloured(red: int, green: int, blue: int, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    return np.full((*size, 3), (blue, green, red), np.uint8)


@pytest.mark.parametrize("softmax", [False, True], ids=["logits", "softmax"])
@pytest.mark.parametrize(("side", "batch"), [(SIDE, 1), ("side", "n")], ids=["fixed", "dynamic"])
def test_logits_and_probabilities_of_fixed_and_dynamic_inputs_say_the_same(tmp_path, softmax, side, batch):
    path = classifier_file(tmp_path / "c.onnx", TWO, softmax=softmax, side=side, batch=batch)
    seen = OnnxClassifier.load(path, ClassifierSpec(rule="binary", side=SIDE)).observe(coloured(51, 0, 153))
    logits = np.array([0.2, 0.6]) @ TWO[[0, 2]]  # colours in 0-1
    assert seen.score == pytest.approx(logits[1] - logits[0], abs=1e-4)
    assert seen.heatmap is None


def test_the_centre_is_cut_out_and_colours_are_red_first(tmp_path):
    wing = coloured(0, 0, 255, (40, 60))
    wide = np.concatenate([wing, coloured(255, 0, 0, (40, 40)), wing], axis=1)
    found = OnnxClassifier.load(classifier_file(tmp_path / "c.onnx", TWO), ClassifierSpec("binary", SIDE))
    assert found.observe(wide).score == pytest.approx(-8, abs=0.1)
    assert found.observe(np.ascontiguousarray(wide.transpose(1, 0, 2))).score == pytest.approx(-8, abs=0.1)


def test_mean_and_std_are_those_of_the_spec(tmp_path):
    spec = ClassifierSpec("binary", SIDE, mean=51.0, std=51.0)
    found = OnnxClassifier.load(classifier_file(tmp_path / "c.onnx", TWO), spec)
    assert found.observe(coloured(51, 51, 102)).score == pytest.approx(8, abs=1e-3)


# -- the rules


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> OnnxClassifier:
    """Three classes; any distribution can be painted."""
    path = tmp_path_factory.mktemp("onnx") / "imagenet.onnx"
    return OnnxClassifier.load(classifier_file(path, 8 * np.eye(3)), ClassifierSpec("normality", SIDE), threads=1)


@given(st.tuples(*[st.integers(0, 255)] * 3))
@settings(deadline=None, max_examples=150)
def test_normality_is_saecs_rule_of_three_thresholds(imagenet, colour):
    """saec.md, section 2: good when s_max >= 0.55, margin >= 0.03 and normalised entropy <= 0.95, else defect."""
    seen = imagenet.observe(coloured(*colour))
    p = np.exp(8 / 255 * np.array(colour))
    p /= p.sum()
    ordered = np.sort(p)[::-1]
    s_max, margin = ordered[0], ordered[0] - ordered[1]
    entropy = -(p * np.log(p)).sum() / math.log(3)
    if min(abs(s_max - 0.55), abs(margin - 0.03), abs(entropy - 0.95)) > 1e-5:
        assert (seen.score <= 0) == bool(s_max >= 0.55 and margin >= 0.03 and entropy <= 0.95)
    assert seen.score == pytest.approx(max(0.55 - s_max, 0.03 - margin, entropy - 0.95), abs=1e-5)


def test_the_temperature_divides_the_logits(tmp_path):
    path = classifier_file(tmp_path / "c.onnx", TWO)
    sharp = OnnxClassifier.load(path, ClassifierSpec("binary", SIDE))
    soft = sharp.at_temperature(4.0)
    image = coloured(51, 0, 153)
    assert soft.observe(image).score == pytest.approx(sharp.observe(image).score / 4, rel=1e-6)
    assert sharp.spec.temperature == 1


def test_the_defect_class_may_be_any(tmp_path):
    path = classifier_file(tmp_path / "c.onnx", 8 * np.eye(3))
    scores = [
        OnnxClassifier.load(path, ClassifierSpec("binary", SIDE, defect_class=k)).observe(coloured(255, 0, 0)).score
        for k in range(3)
    ]
    assert scores[0] > 5
    assert max(scores[1:]) < -5


def test_an_overconfident_classifier_is_cooled_down(tmp_path):
    path = classifier_file(tmp_path / "c.onnx", 10 * TWO)
    found = OnnxClassifier.load(path, ClassifierSpec("binary", SIDE))
    rng = np.random.default_rng(0)
    is_defect = [bool(k % 2) for k in range(40)]
    wrong = rng.random(40) < 0.2
    looks_bad = np.array(is_defect) != wrong
    images = [coloured(100, 0, 130) if bad else coloured(130, 0, 100) for bad in looks_bad]
    temperature = temperature_of(found, iter(images), is_defect)
    assert temperature > 3
    p = 1 / (1 + math.exp(-found.at_temperature(temperature).observe(coloured(100, 0, 130)).score))
    assert p == pytest.approx(1 - wrong.mean(), abs=0.05)


# -- what is refused


@pytest.mark.parametrize(
    ("change", "spec", "line"),
    [
        ({"side": 64}, {}, r"the classifier wants 64 x 64 px, not 32.*pass side 64"),
        ({"channels": 1, "weights": np.ones((1, 2))}, {}, "not an image classifier"),
        ({"kind": TensorProto.UINT8}, {}, "not an image classifier"),
        ({"batch": 4}, {}, "not an image classifier"),
        ({"weights": np.ones((3, 1))}, {}, r"not a classifier: its output is \[1, 1\]"),
        ({}, {"rule": "binary", "defect_class": 2}, "has 2 classes, none is number 2.*from 0 to 1"),
        ({}, {"rule": "binary", "defect_class": -1}, "has 2 classes, none is number -1"),
        ({}, {"side": 0}, "no image has a side of 0 px"),
    ],
    ids=str,
)
def test_a_model_of_another_form_is_one_line(tmp_path, change, spec, line):
    path = classifier_file(tmp_path / "c.onnx", **({"weights": TWO} | change))
    with pytest.raises(BadInput, match=line) as caught:
        OnnxClassifier.load(path, ClassifierSpec(**({"side": SIDE} | spec)))
    assert "\n" not in str(caught.value)
    assert "c.onnx" in str(caught.value)


def test_a_model_of_two_inputs_is_one_line(tmp_path):
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "ab"]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["y"])], "sum", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "c.onnx")
    with pytest.raises(BadInput, match=r"not an image classifier \(2 inputs\)"):
        OnnxClassifier.load(tmp_path / "c.onnx", ClassifierSpec(side=SIDE))


def test_what_is_no_model_is_one_line(tmp_path):
    (tmp_path / "text.onnx").write_text("hello")
    for name, line in (("text.onnx", "not a usable ONNX model"), ("none.onnx", "cannot read the model")):
        with pytest.raises(BadInput, match=f"{line}.*{name}"):
            OnnxClassifier.load(tmp_path / name, ClassifierSpec())


# -- a station of it


@pytest.fixture
def colours(tmp_path):
    """Red good parts and blue defects, none like another."""
    good = [np.maximum(plate(n), 1) // 4 + coloured(150 + n, 20, 10, (160, 160)) for n in range(12)]
    bad = [np.maximum(plate(n), 1) // 4 + coloured(20, 20, 120 + n, (160, 160)) for n in range(12)]
    return dataset(
        tmp_path, parts(tmp_path, good, label=Label.GOOD), parts(tmp_path, bad, label=Label.DEFECT, split=None)
    )


@pytest.mark.parametrize("rule", ["binary", "normality"])
def test_a_station_of_a_classifier_gives_the_same_score_after_loading(tmp_path, colours, rule):
    model = classifier_file(tmp_path / "colour.onnx", TWO)
    made = fit_classifier_station(colours, SETTINGS, model, ClassifierSpec(rule, SIDE))
    model.unlink()
    made.save(tmp_path / "station")
    loaded = Station.load(tmp_path / "station", settings=SETTINGS)
    shutil.rmtree(tmp_path / "station")
    assert loaded.models == made.models
    assert loaded.models["edge"].startswith("classifier colour@")
    for image in (coloured(200, 20, 20), coloured(20, 20, 200), plate(3)):
        one, other = made.predict(image, "plate"), loaded.predict(image, "plate")
        assert one == other
        assert one.heatmap is None
        assert one.evidence.boxes == ()
    loaded.save(tmp_path / "again")
    assert Station.load(tmp_path / "again", settings=SETTINGS).manifest == made.manifest


def test_a_fine_tuned_classifier_judges_by_its_calibrated_class(tmp_path, colours):
    model = classifier_file(tmp_path / "c.onnx", TWO)
    made = fit_classifier_station(colours, SETTINGS, model, ClassifierSpec("binary", SIDE))
    assert made.calibration("plate").method == "labelled"
    assert made.predict(coloured(200, 20, 20), "plate").p_defect < 0.5
    assert made.predict(coloured(20, 20, 200), "plate").p_defect > 0.5


def test_a_classifier_is_routed_by_its_calibrated_probability(tmp_path, colours):
    model = classifier_file(tmp_path / "c.onnx", 8 * np.eye(3))
    made = fit_classifier_station(colours, SETTINGS, model, ClassifierSpec("normality", SIDE))
    seen = made.predict(coloured(255, 255, 0), "plate")
    expected = class_confidences(np.array([1 - seen.p_defect, seen.p_defect]))
    assert (seen.s_max, seen.margin, seen.entropy) == pytest.approx([float(value) for value in expected])


def test_a_damaged_classifier_in_a_station_is_refused(tmp_path, colours):
    model = classifier_file(tmp_path / "c.onnx", TWO)
    made = fit_classifier_station(colours, SETTINGS, model, ClassifierSpec(side=SIDE))
    made.save(tmp_path / "station")
    assert (tmp_path / "station" / INDEX).is_file()
    inside = tmp_path / "station" / "plate" / "classifier.onnx"
    inside.write_bytes(inside.read_bytes()[:-3])
    with pytest.raises(BadInput, match=r"damaged.*classifier\.onnx"):
        Station.load(tmp_path / "station", settings=SETTINGS)
