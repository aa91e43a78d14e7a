"""Any ONNX image classifier as the edge: SAEC's own edge branch (YOLO11s-cls), kept as the baseline.

Two ways to read one:

* ``normality`` - a classifier of something else (ImageNet). SAEC calls a part good when the classifier is confident:
  s_max >= 0.55, margin >= 0.03 and normalised entropy <= 0.95. The score is how far the worst of the three falls short,
  so that the reference's label is *defect iff score > 0*.
* ``binary`` - a classifier of good and defect; the score is the temperature-scaled logit of the defect class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from pydantic import ConfigDict

from saec.calibrate.score import class_confidences, fit_temperature
from saec.edge.backbone import file_sha256, open_session
from saec.errors import BadInput
from saec.types import Image, Observation

Rule = Literal["normality", "binary"]
TAU_SMAX, TAU_MARGIN, TAU_ENTROPY = 0.55, 0.03, 0.95


@dataclass(frozen=True, slots=True)
class ClassifierSpec:
    """How to show an image to the classifier and how to read its answer; saved with the station.

    ``side`` is the input's height and width: the shorter side is scaled to it and the centre is cut out, as YOLO's
    classifiers are trained. ``mean`` and ``std`` are in units of 0-255. ``defect_class`` matters to ``binary`` only.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    rule: Rule = "normality"
    side: int = 224
    mean: float = 0.0
    std: float = 255.0
    defect_class: int = 1
    temperature: float = 1.0


class OnnxClassifier:
    """A classifier with input [1, 3, S, S] RGB float32 and output [1, K]: logits or probabilities."""

    def __init__(self, model: Path, spec: ClassifierSpec, *, threads: int = 2) -> None:
        """Load the model and check its shapes.

        Raises:
            BadInput: not an ONNX file, or its input or output has another form.
        """
        self.model, self.spec = model, spec
        self.model_id = f"{model.stem}@{file_sha256(model)[:12]}"
        self._session: ort.InferenceSession = open_session(model, threads=threads)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or len(outputs) < 1:
            raise BadInput("not an image classifier", where=model, fix="one input [n, 3, S, S] and one output [n, K]")
        fixed = inputs[0].shape[2]
        if isinstance(fixed, int) and fixed != spec.side:
            raise BadInput(f"the classifier wants {fixed} px, not {spec.side}", where=model, fix=f"pass side {fixed}")
        self._input = inputs[0].name

    def logits(self, image: Image) -> NDArray[np.float64]:
        """Return the class logits [K] of one image; probabilities come back as their logarithms."""
        shown = (_centre(image, self.spec.side)[:, :, ::-1].astype(np.float32) - self.spec.mean) / self.spec.std
        answer = self._session.run(None, {self._input: np.ascontiguousarray(shown.transpose(2, 0, 1))[None]})[0]
        values = np.asarray(answer, dtype=np.float64).reshape(-1)
        if values.size < 2 or (self.spec.rule == "binary" and values.size <= self.spec.defect_class):
            raise BadInput(f"the classifier has {values.size} classes", where=self.model)
        if values.min() >= 0 and abs(values.sum() - 1) < 1e-3:
            values = np.log(np.maximum(values, 1e-12))
        return values

    def observe(self, image: Image) -> Observation:
        """Return score and confidences of one image; a classifier has no heatmap."""
        logits = self.logits(image) / self.spec.temperature
        p = np.exp(logits - logits.max())
        p /= p.sum()
        s_max, margin, entropy = (float(value) for value in class_confidences(p))
        if self.spec.rule == "normality":
            score = max(TAU_SMAX - s_max, TAU_MARGIN - margin, entropy - TAU_ENTROPY)
        else:
            defect = min(max(float(p[self.spec.defect_class]), 1e-9), 1 - 1e-9)
            score = math.log(defect / (1 - defect))
        return Observation(score=score, confidences=(s_max, margin, entropy))


def temperature_of(classifier: OnnxClassifier, images: list[Image], is_defect: list[bool]) -> float:
    """Return the temperature of a ``binary`` classifier on labelled parts (:func:`fit_temperature`)."""
    defect = classifier.spec.defect_class
    logits = np.stack([classifier.logits(image) for image in images])
    two = np.stack([np.delete(logits, defect, axis=1).max(axis=1), logits[:, defect]], axis=1)
    return fit_temperature(two, np.array(is_defect, dtype=np.int64))


def _centre(image: Image, side: int) -> Image:
    height, width = image.shape[:2]
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR))
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return np.asarray(image[top : top + side, left : left + side], dtype=np.uint8)
