"""Scene complexity: how hard an image is to judge, before any model has looked at it (SAEC, arXiv 2509.17136).

Two definitions of the same five terms with the same weights, S = 0.30 H + 0.25 E + 0.20 L + 0.15 G + 0.10 R:

* :func:`scene_complexity`, the product's own: multiscale, every term in [0, 1], one image at a time, fast.
* :func:`legacy_complexity`, the published reference value for comparisons: one scale, unclipped, with its fault that
  the edge density is counted on the 0-255 scale and so dominates the sum.

How the product's score is made. The image is turned grey, halved while it is at least twice the working size (the exact
2x2 mean, OpenCV's cheapest shrink), then brought to about 128 x 128 pixels *of its own aspect ratio*: a long thin part
squeezed to a square would gain edges that it does not have. The terms are measured there and at half that size and
averaged: fine texture shows at the first scale only, structure at both. Two scales of this size keep the ranking of the
reference (finer detail vanishes in deeper levels) at a fraction of its cost. Everything is integer arithmetic up to the
last division.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from cv2.typing import MatLike

from saec.errors import BadInput
from saec.types import Image, SceneScore, SceneTerms

WEIGHTS = (0.30, 0.25, 0.20, 0.15, 0.10)
"""Weights of entropy, edges, Laplacian, gradient and JPEG residual, in this order."""

LEGACY_SIDE = 192
JPEG_QUALITY = 30
CANNY = (64, 128)

_SIDE = 128
_SCALES = 2
_MIN_SIDE, _MAX_SIDE = 32, 800

# Largest possible values of the raw terms on 8-bit grey: the Laplacian kernel (1, 1, -4, 1, 1) reaches 4 * 255, each
# Sobel derivative too. ln(1 + x) / ln(1 + largest) is then in [0, 1] for every image and strictly monotone in x.
_LOG_LAPLACIAN = math.log1p(1020.0**2)
_LOG_GRADIENT = math.log1p(2 * 1020.0)
_LOG_RESIDUAL = math.log1p(255.0)
_LOG_LEVELS = math.log(256.0)


def scene_complexity(image: Image) -> SceneScore:
    """Return the product's complexity score of one image.

    Terms, each in [0, 1] and averaged over the scales; n is the number of pixels of a scale:

    * ``entropy``: -sum p ln p / ln 256 of the 256 grey levels;
    * ``edges``: share of pixels on a Canny edge (thresholds 64 and 128);
    * ``laplacian``: ln(1 + variance of the Laplacian) / ln(1 + 1020^2);
    * ``gradient``: ln(1 + mean(abs(Sobel_x) + abs(Sobel_y))) / ln(1 + 2040);
    * ``jpeg``: ln(1 + mean absolute difference, in grey levels, to the image after JPEG at quality 30) / ln 256.

    A constant image scores 0 but for JPEG's rounding of its level, at most 0.02.

    Args:
        image: uint8 ``[H, W, 3]``, BGR.

    Raises:
        BadInput: not such an array, or empty.
    """
    grey = _working_copy(cv2.cvtColor(_checked(image), cv2.COLOR_BGR2GRAY))
    entropy = edges = laplacian = gradient = jpeg = 0.0
    for scale in range(_SCALES):
        if scale:
            grey = cv2.resize(grey, (grey.shape[1] // 2, grey.shape[0] // 2), interpolation=cv2.INTER_AREA)
        n = grey.size
        dx, dy = cv2.spatialGradient(grey)
        entropy += _entropy(grey)
        edges += cv2.countNonZero(cv2.Canny(dx, dy, *CANNY)) / n
        laplacian += math.log1p(_variance(cv2.Laplacian(grey, cv2.CV_16S)))
        gradient += math.log1p((cv2.norm(dx, cv2.NORM_L1) + cv2.norm(dy, cv2.NORM_L1)) / n)
        jpeg += math.log1p(cv2.norm(grey, _through_jpeg(grey, cv2.IMREAD_GRAYSCALE), cv2.NORM_L1) / n)
    return _weighted(
        SceneTerms(
            entropy=entropy / _SCALES,
            edges=edges / _SCALES,
            laplacian=laplacian / (_SCALES * _LOG_LAPLACIAN),
            gradient=gradient / (_SCALES * _LOG_GRADIENT),
            jpeg=jpeg / (_SCALES * _LOG_RESIDUAL),
        )
    )


def legacy_complexity(image: Image) -> SceneScore:
    """Return the reference's complexity score, within 1e-4 of a plain transcription of its definition.

    The image is resized to 192 x 192 first (``INTER_AREA``) and *every* term is measured on that copy: four on its grey
    version, the JPEG residual on its colours. The variance is the population variance, the Laplacian has OpenCV's
    default aperture of 1, both Sobel derivatives have aperture 3. Terms are unclipped, and ``edges`` is the mean of the
    0-255 Canny image, as in the reference; none of them is confined to [0, 1].

    Raises:
        BadInput: not a uint8 ``[H, W, 3]`` array, or empty.
    """
    small = cv2.resize(_checked(image), (LEGACY_SIDE, LEGACY_SIDE), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)
    dx, dy = (derivative.astype(np.float32) for derivative in cv2.spatialGradient(grey))
    residual = cv2.norm(small, _through_jpeg(small, cv2.IMREAD_COLOR), cv2.NORM_L1) / small.size
    return _weighted(
        SceneTerms(
            entropy=_entropy(grey),
            edges=255.0 * cv2.countNonZero(cv2.Canny(grey, *CANNY)) / grey.size,
            laplacian=math.log1p(_variance(cv2.Laplacian(grey, cv2.CV_16S))) / 8.0,
            gradient=cv2.mean(cv2.magnitude(dx, dy))[0] / 16.0,
            jpeg=residual / 255.0,
        )
    )


def _weighted(terms: SceneTerms) -> SceneScore:
    values = (terms.entropy, terms.edges, terms.laplacian, terms.gradient, terms.jpeg)
    return SceneScore(score=sum(w * value for w, value in zip(WEIGHTS, values, strict=True)), terms=terms)


def _checked(image: Image) -> Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise BadInput("not an image", where=f"{image.dtype}{list(image.shape)}", fix="pass uint8 [height, width, 3]")
    return image


def _working_copy(grey: MatLike) -> MatLike:
    """Shrink (or enlarge) to about 128^2 pixels, aspect ratio kept, sides multiples of 4."""
    height, width = grey.shape
    stretch = math.sqrt(width / height)
    target_w = _side(_SIDE * stretch)
    target_h = _side(_SIDE / stretch)
    while height >= 2 * target_h and width >= 2 * target_w:
        # An odd last row or column is dropped: with exact halves OpenCV takes its fast 2x2 path.
        height, width = height // 2, width // 2
        grey = cv2.resize(grey[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
    return cv2.resize(grey, (target_w, target_h), interpolation=cv2.INTER_LINEAR)


def _side(length: float) -> int:
    return min(_MAX_SIDE, max(_MIN_SIDE, 4 * round(length / 4)))


def _entropy(grey: MatLike) -> float:
    counts = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel()
    p = counts[counts > 0].astype(np.float64) / grey.size
    return max(0.0, -float(np.dot(p, np.log(p)))) / _LOG_LEVELS


def _variance(values: MatLike) -> float:
    n = values.size
    mean = cv2.sumElems(values)[0] / n
    return max(0.0, cv2.norm(values, cv2.NORM_L2SQR) / n - mean * mean)


def _through_jpeg(image: MatLike, flag: int) -> MatLike:
    encoded = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))[1]
    return np.asarray(cv2.imdecode(encoded, flag), dtype=np.uint8)
