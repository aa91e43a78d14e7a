"""How images travel: shrunk, as JPEG. :func:`saec.data.decode.decode_image` is the other end.

Quality rule of the uplink: an image is shrunk to the longest side ``max_side`` (area averaging, aspect ratio kept,
never enlarged) and coded as JPEG with the given quality, full chroma resolution (4:4:4) so that thin coloured
scratches survive; an image whose three channels are equal goes as a one-channel JPEG.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from saec.types import Image


def shrink(image: Image, max_side: int) -> Image:
    """Return the image with its longest side at most ``max_side`` pixels; the same array if it already fits.

    Raises:
        ValueError: not a [H, W, 3] image with pixels.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"an image must be [height, width, 3], not {image.shape}")
    height, width = image.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def is_grey(image: Image) -> bool:
    """Say whether the three channels are equal everywhere."""
    # A sparse look settles almost every colour image without touching all of its pixels.
    sparse = image[::16, ::16]
    if (sparse[..., :2] != sparse[..., 1:]).any():
        return False
    blue, green, red = cv2.split(image)
    return cv2.norm(blue, green, cv2.NORM_INF) == 0 and cv2.norm(green, red, cv2.NORM_INF) == 0


def encode_jpeg(image: Image, quality: int) -> bytes:
    """Return the JPEG of a [H, W, 3] BGR image: one channel if it is grey, else 4:4:4.

    Raises:
        ValueError: an image that cannot be JPEG, such as one without pixels.
    """
    flags: Sequence[int] = (
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    )
    source = image[..., 0] if is_grey(image) else image
    return _coded(".jpg", source, flags)


def encode_png(image: Image) -> bytes:
    """Return the PNG of a [H, W, 3] BGR image: larger than JPEG, every pixel kept.

    Raises:
        ValueError: an image that cannot be PNG, such as one without pixels.
    """
    return _coded(".png", image)


def _coded(suffix: str, image: Image, flags: Sequence[int] = ()) -> bytes:
    done, coded = cv2.imencode(suffix, image, flags)
    if not done:
        raise ValueError(f"cannot code an image of shape {image.shape} as {suffix[1:]}")
    return coded.tobytes()
