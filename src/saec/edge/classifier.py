"""Any ONNX image classifier as the edge: SAEC's own edge branch (YOLO11s-cls), kept as the baseline.

Two ways to read one:

* ``normality`` - a classifier of something else (ImageNet). SAEC calls a part good when the classifier is confident:
  s_max >= 0.55, margin >= 0.03 and normalised entropy <= 0.95. The score is how far the worst of the three falls short,
  so that the reference's label is *defect iff score > 0*.
* ``binary`` - a classifier of good and defect; the score is the temperature-scaled logit of the defect class.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import cv2
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from pydantic import ConfigDict

from saec.calibrate.score import class_confidences, fit_temperature
from saec.edge.backbone import one_line, open_session, read_model
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

    def __init__(
        self, content: bytes, name: str, spec: ClassifierSpec, *, threads: int = 2, where: object = None
    ) -> None:
        """Open the content of an ONNX file and show it a blank image, to see that it fits ``spec``.

        ``name`` becomes part of the model's id; ``where`` stands in errors.

        Raises:
            BadInput: not an ONNX file, or its input or output has another form.
        """
        self.content, self.name, self.spec = content, name, spec
        self.model_id = f"{name}@{hashlib.sha256(content).hexdigest()[:12]}"
        self._session: ort.InferenceSession = open_session(content, threads=threads, where=where or name)
        self._input = self._check(where or name)

    @classmethod
    def load(cls, model: Path, spec: ClassifierSpec, *, threads: int = 2) -> Self:
        """Read an ONNX file.

        Raises:
            BadInput: the file cannot be read, or as the constructor.
        """
        return cls(read_model(model), model.stem, spec, threads=threads, where=model)

    def at_temperature(self, temperature: float) -> OnnxClassifier:
        """Return the same classifier with another temperature."""
        twin = copy(self)
        twin.spec = replace(self.spec, temperature=temperature)
        return twin

    def _check(self, where: object) -> str:
        """Return the input's name."""
        side, form = self.spec.side, "it takes one float32 input [1, 3, S, S] and gives [1, K]"
        if side < 1:
            raise BadInput(f"no image has a side of {side} px", where=where, fix="pass the classifier's side")
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise BadInput(f"not an image classifier ({len(inputs)} inputs)", where=where, fix=form)
        name: str = inputs[0].name
        shape = inputs[0].shape
        fixed = [length for length in shape[2:] if isinstance(length, int)]
        if len(shape) == 4 and any(length != side for length in fixed):
            fix = f"pass side {fixed[0]}" if len(set(fixed)) == 1 else form
            raise BadInput(f"the classifier wants {shape[2]} x {shape[3]} px, not {side}", where=where, fix=fix)
        try:
            answer = self._run(name, np.zeros((1, 3, side, side), dtype=np.float32))
        except Exception as error:  # noqa: BLE001 - ONNX Runtime raises half a dozen unrelated classes for a bad input
            raise BadInput(f"not an image classifier ({one_line(error)})", where=where, fix=form) from None
        classes, defect = answer.size, self.spec.defect_class
        if answer.shape[:1] != (1,) or classes < 2:
            raise BadInput(f"not a classifier: its output is {list(answer.shape)}", where=where, fix=form)
        if self.spec.rule == "binary" and not 0 <= defect < classes:
            fix = f"pass a defect class from 0 to {classes - 1}"
            raise BadInput(f"the classifier has {classes} classes, none is number {defect}", where=where, fix=fix)
        return name

    def _run(self, name: str, shown: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.asarray(self._session.run(None, {name: shown})[0], dtype=np.float64)

    def logits(self, image: Image) -> NDArray[np.float64]:
        """Return the class logits [K] of one image; probabilities come back as their logarithms."""
        shown = (_centre(image, self.spec.side)[:, :, ::-1].astype(np.float32) - self.spec.mean) / self.spec.std
        values = self._run(self._input, np.ascontiguousarray(shown.transpose(2, 0, 1))[None]).reshape(-1)
        if values.min() >= 0 and abs(values.sum() - 1) < 1e-3:
            values = np.log(np.maximum(values, 1e-12))
        return values

    def observe(self, image: Image) -> Observation:
        """Return the score of one image; a classifier has no heatmap.

        The router sees the confidences of the calibrated P(defect), as of every detector: those of the classifier's own
        classes are in the score, and routing by them too would escalate more than the calibrated share.
        """
        logits = self.logits(image) / self.spec.temperature
        p = np.exp(logits - logits.max())
        p /= p.sum()
        s_max, margin, entropy = (float(value) for value in class_confidences(p))
        if self.spec.rule == "normality":
            score = max(TAU_SMAX - s_max, TAU_MARGIN - margin, entropy - TAU_ENTROPY)
        else:
            defect = min(max(float(p[self.spec.defect_class]), 1e-9), 1 - 1e-9)
            score = math.log(defect / (1 - defect))
        return Observation(score=score)


def temperature_of(classifier: OnnxClassifier, images: Iterable[Image], is_defect: Sequence[bool]) -> float:
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
