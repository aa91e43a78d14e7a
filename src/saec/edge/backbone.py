"""Patch features of an image: the shipped EfficientNet-Lite2, cut after stage 6, in ONNX Runtime."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from saec.errors import BadInput
from saec.types import Image

MODEL = Path(__file__).parent / "models" / "efficientnet-lite2.onnx"
STRIDE = 32
"""Pixels of the input per cell of the feature grid, along each side."""

MAX_SIDE = 448
"""Images are shown to the backbone with at most this side (the root of their area)."""

PASS_PIXELS = 1.25 * MAX_SIDE**2
"""What all passes over one part may show to the backbone together: the time of a part stays within it."""

MIN_SIDE = 96
"""Below three cells a side there is no neighbourhood to compare."""

Features = NDArray[np.float32]
"""[rows, columns, C] float32: one vector per cell."""


class Backbone:
    """A feature extractor with a dynamic input size; may be shared by threads."""

    def __init__(self, model: Path = MODEL, *, threads: int = 2) -> None:
        """Load the ONNX file; ``threads`` is the number of intra-op threads.

        Raises:
            BadInput: the file is missing or is not an ONNX model.
        """
        content = read_model(model)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.model_id = f"{model.stem}@{self.sha256[:12]}"
        self._session = open_session(content, threads=threads, where=model)
        # ONNX Runtime's threads and BLAS's want the same cores in turn; on two cores two pools cost more than they give
        # (41 ms a part instead of 18).
        threadpool_limits(limits=1, user_api="blas")

    def __call__(self, image: Image, side: int) -> Features:
        """Return the features of ``image`` ([H, W, 3] uint8 BGR) shown at an area of about ``side`` x ``side`` pixels.

        The aspect ratio is kept to the nearest multiple of the stride; nothing is cropped or padded.
        """
        height, width = grid_size(image.shape[0], image.shape[1], side)
        if (height, width) != image.shape[:2]:
            shrinks = height * width < image.shape[0] * image.shape[1]
            shrink_or_grow = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            image = np.asarray(cv2.resize(image, (width, height), interpolation=shrink_or_grow), dtype=np.uint8)
        (features,) = self._session.run(None, {"image": image[None]})
        return np.asarray(features[0], dtype=np.float32)


def grid_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Return (height, width) of about ``side`` squared pixels, the same aspect ratio, both multiples of the stride.

    A side is at least one stride, and the other one then at most what keeps the area below two ``side`` squared: an
    image of 1 x 60,000,000 pixels is legal, small as a file, and must not take the memory of the machine.
    """
    scale = side / math.sqrt(height * width)
    most = max(STRIDE, 2 * side * side // STRIDE)
    rows, columns = (STRIDE * round(min(most, max(STRIDE, length * scale)) / STRIDE) for length in (height, width))
    return rows, columns


def working_sides(sizes: list[tuple[int, int]]) -> tuple[int, ...]:
    """Return the sides at which a product's parts are shown to the backbone, largest first: one to three passes.

    The first is the images' own, up to :data:`MAX_SIDE`: enlarging a small image only blurs it and costs time (300 px
    solar cells score 0.92 AUROC at their own size, 0.90 at 448 px). Where there is room in :data:`PASS_PIXELS`, passes
    that are one and two grid cells smaller follow: looks at different grids average out their noise.

    Args:
        sizes: (height, width) of the good images.
    """
    own = math.sqrt(float(np.median([height * width for height, width in sizes])))
    first = int(min(MAX_SIDE, max(MIN_SIDE, STRIDE * math.ceil(own / STRIDE - 0.1))))
    sides = [first]
    for side in (first - STRIDE, first - 2 * STRIDE):
        if side >= MIN_SIDE and side**2 + sum(taken**2 for taken in sides) <= PASS_PIXELS:
            sides.append(side)
    return tuple(sides)


def read_model(path: Path) -> bytes:
    """Return the content of a model file.

    Raises:
        BadInput: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput("cannot read the model", where=path, fix=error.strerror or "check the path") from None


def open_session(content: bytes, *, threads: int, where: object) -> ort.InferenceSession:
    """Open the content of an ONNX file on the CPU; ``where`` names it in errors.

    Raises:
        BadInput: it is not an ONNX model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A pool that spins while it waits takes the cores from the rest of the pipeline.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - ONNX Runtime raises half a dozen unrelated classes for a bad file
        raise BadInput(f"not a usable ONNX model ({one_line(error)})", where=where) from None


def one_line(error: Exception) -> str:
    """Return the first line of an ONNX Runtime error, cut to what fits into a message."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]
