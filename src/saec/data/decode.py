"""Reading image files: one read, one hash, a header check before any pixel is decoded, and no silent repair.

Two decoders are used. OpenCV takes the common case (8-bit grey or RGB JPEG and PNG), Pillow the unusual one (16 bit,
palette, alpha, CMYK, 1 bit, TIFF, BMP, WebP), where the two libraries and OpenCV's own versions disagree on rounding,
premultiplied alpha and orientation. Both give the pixels that a plain 8-bit RGB copy of the file would have.
"""

from __future__ import annotations

import errno
import hashlib
import stat
import struct
import zlib
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import (
    BmpImagePlugin,
    ImageChops,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from saec.types import Image

MAX_PIXELS = 64_000_000
"""Default of ``data.max_pixels``."""

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".dib", ".tif", ".tiff", ".webp"})
"""File name endings (lower case) that the readers take for images."""

# A 16-bit RGBA pixel takes 8 bytes uncompressed; a longer file cannot be an image within the limit, so it is not read.
_BYTES_PER_PIXEL = 8
_HEADER_ALLOWANCE = 1 << 20

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PLUGINS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (_PNG_SIGNATURE, PngImagePlugin.PngImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", TiffImagePlugin.TiffImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
)


class UnreadableImage(Exception):
    """One image cannot be used; the run records it and goes on, so this is no :class:`~saec.errors.BadInput`.

    ``path`` names the image, ``why`` says what is wrong in a few words, ``sha256`` is the hash of the file's bytes when
    they could be read at all.
    """

    def __init__(self, path: object, why: str, *, sha256: str | None = None) -> None:
        self.path = str(path)
        self.why = why
        self.sha256 = sha256
        super().__init__(f"{self.path}: {why}")


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Read an image file as ``uint8`` BGR ``[H, W, 3]``.

    Alpha is dropped, not blended: the colour stored under transparent pixels is what a camera saw. 16-bit values v map
    to v // 256, so that v * 257 gives back v. EXIF orientation is applied. The first frame or page counts.

    Raises:
        UnreadableImage: missing, empty, truncated, corrupt, larger than ``max_pixels``, or not an image.
    """
    return read_with_hash(path, max_pixels=max_pixels)[1]


def read_with_hash(path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[str, Image]:
    """Read a file once and return (sha256 hex of its bytes, image as :func:`read_image` gives it).

    Raises:
        UnreadableImage: as :func:`read_image`; carries the sha256 when the bytes could be read.
    """
    data = _read_bytes(path, max_bytes=max_pixels * _BYTES_PER_PIXEL + _HEADER_ALLOWANCE)
    sha256 = hashlib.sha256(data).hexdigest()
    return sha256, decode_image(data, name=str(path), max_pixels=max_pixels)


def decode_image(data: bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode the bytes of an image file; ``name`` stands for the path in errors. See :func:`read_image`."""
    try:
        return _decode_checked(data, max_pixels)
    except _Refused as refused:
        why = str(refused)
    except Exception as error:  # noqa: BLE001 - hostile bytes can raise anything in a decoder; the reason is recorded
        why = f"cannot be decoded ({_one_line(error)})"
    # Raised outside the handler, and with the digest of what was read, so that the part can be recorded by content.
    raise UnreadableImage(name, why, sha256=hashlib.sha256(data).hexdigest())


def _read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        UnreadableImage: not there, not a regular file (a pipe would block for ever), not permitted, or too long.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableImage(path, "is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage(path, "is not a regular file")
        if status.st_size > max_bytes:
            raise UnreadableImage(path, f"file of {status.st_size} bytes is larger than any permitted image")
        return path.read_bytes()
    except FileNotFoundError:
        raise UnreadableImage(path, "no such file") from None
    except OSError as error:
        why = "too many symbolic links" if error.errno == errno.ELOOP else (error.strerror or "cannot be read").lower()
        raise UnreadableImage(path, why) from None


class _Refused(Exception):
    """Why the bytes are not accepted; becomes ``UnreadableImage.why``."""


def _decode_checked(data: bytes, max_pixels: int) -> Image:
    if not data:
        raise _Refused("file is empty")
    plugin = next((plugin for magic, plugin in _PLUGINS if data.startswith(magic)), None)
    if plugin is None:
        raise _Refused("not an image (PNG, JPEG, BMP, TIFF or WebP)")
    stream = BytesIO(data)
    # The plugin itself rather than PIL.Image.open: the limit is ours, and Pillow's own would warn on stderr below it.
    header = plugin(stream)
    width, height = header.size
    if width * height > max_pixels:
        raise _Refused(f"{width} x {height} pixels are more than the limit of {max_pixels} (data.max_pixels)")
    if plugin is JpegImagePlugin.JpegImageFile:
        # Pillow stopped at the first scan. In the scans no FF D9 occurs but the end marker; a thumbnail's lies before.
        if data.rfind(b"\xff\xd9", stream.tell()) < 0:
            raise _Refused("truncated JPEG (no end marker)")
        plain = header.mode in ("L", "RGB")
    elif plugin is PngImagePlugin.PngImageFile:
        special = _check_png_chunks(data)
        depth, colour = data[24], data[25]
        plain = depth == 8 and colour in (0, 2) and not special
    else:
        plain = False
    return _decode_plain(data) if plain else _decode_unusual(header)


def _decode_plain(data: bytes) -> Image:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise _Refused("corrupt image data")
    return np.asarray(image, np.uint8)


def _check_png_chunks(data: bytes) -> bool:
    """Verify lengths and checksums up to IEND; return whether a chunk asks for Pillow (orientation, animation, key).

    OpenCV 4 pads a truncated PNG silently, and both decoders would accept some damaged streams. The checksums of a
    whole file cost about one hundredth of its decoding.
    """
    view = memoryview(data)
    at, special = len(_PNG_SIGNATURE), False
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data):
            break
        (stated,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(view[at + 4 : end - 4]) != stated:
            raise _Refused(f"corrupt PNG (checksum of chunk {kind.decode('ascii', 'replace')})")
        if kind == b"IEND":
            return special
        special = special or kind in (b"eXIf", b"acTL", b"tRNS")
        at = end
    raise _Refused("truncated PNG (no end chunk)")


def _decode_unusual(picture: ImageFile.ImageFile) -> Image:
    picture.load()
    # Transparency is dropped, not applied; a palette's own would only make Pillow warn on the way to RGB.
    picture.info.pop("transparency", None)
    upright = ImageOps.exif_transpose(picture)
    mode = upright.mode
    if mode == "CMYK" and picture.format == "JPEG" and "adobe" not in picture.info:
        upright = ImageChops.invert(upright)  # only Adobe stores inks inverted; Pillow undoes that for every writer
    if mode.startswith("I;16") or (mode == "I" and picture.format == "PNG"):
        grey = (np.asarray(upright).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if mode in ("I", "F", "LAB"):
        raise _Refused(f"pixel format {mode} has no fixed 8-bit meaning: convert it to 8 or 16 bits")
    if mode in ("La", "RGBa"):
        upright = upright.convert(mode.upper())  # undo premultiplied alpha before dropping it
    return np.ascontiguousarray(np.asarray(upright.convert("RGB"))[..., ::-1])


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
