"""How images travel: shrink, JPEG out, checked JPEG or PNG in.

Quality rule of the uplink: an image is shrunk to the longest side ``max_side`` (area averaging, aspect ratio kept,
never enlarged) and coded as JPEG with the given quality, full chroma resolution (4:4:4) so that thin coloured
scratches survive; an image whose three channels are equal goes as a one-channel JPEG.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image as Pillow

from saec.types import Image


class UnusableImage(ValueError):
    """The bytes are not an image that this service reads; the message says why."""


def shrink(image: Image, max_side: int) -> Image:
    """Return the image with its longest side at most ``max_side`` pixels; the same array if it already fits."""
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
    """Return the JPEG of a [H, W, 3] BGR image: one channel if it is grey, else 4:4:4."""
    flags: Sequence[int] = (
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    )
    source = image[..., 0] if is_grey(image) else image
    done, coded = cv2.imencode(".jpg", source, flags)
    if not done:
        raise UnusableImage(f"cannot code an image of shape {image.shape} as JPEG")
    return coded.tobytes()


def decode_image(data: bytes | bytearray | memoryview, *, max_pixels: int) -> Image:
    """Return the [H, W, 3] BGR image in JPEG or PNG bytes.

    The size is read from the header and checked before a pixel is decoded. A truncated or damaged file is an error, not
    a half-grey image: Pillow refuses it where some OpenCV versions do not.

    Raises:
        UnusableImage: not JPEG or PNG, damaged, or more than ``max_pixels`` pixels.
    """
    try:
        with Pillow.open(io.BytesIO(data), formats=("JPEG", "PNG")) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise UnusableImage(f"{width} x {height} pixels are more than the allowed {max_pixels}")
            if opened.mode == "L":
                return _bgr(np.asarray(opened), cv2.COLOR_GRAY2BGR)
            return _bgr(np.asarray(opened if opened.mode == "RGB" else opened.convert("RGB")), cv2.COLOR_RGB2BGR)
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning) as error:
        raise UnusableImage(str(error)) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # all of these come out of Pillow's parsers
        if isinstance(error, UnusableImage):
            raise
        raise UnusableImage(f"not a readable JPEG or PNG ({error})") from None


def _bgr(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], conversion: int) -> Image:
    return np.asarray(cv2.cvtColor(pixels, conversion), dtype=np.uint8)
