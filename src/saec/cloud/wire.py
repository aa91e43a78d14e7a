"""The wire format between edge and cloud: one question in, one opinion out. Version 1.

A question is one body: ``SAEC``, a version byte, the header's length (unsigned 32 bit, big-endian), the header as JSON,
then the binary parts that the header lists, in order: the image (any format that :mod:`saec.data.decode` reads; JPEG
from our client) or, in its place, a frame of visual tokens (:mod:`saec.vlm.tokens.codec`), and, if there is one, the
anomaly map (quantised to 8 bits between its own minimum and maximum, then zstd). Nothing is base64, so nothing grows by
a third.
Reference images are named by the SHA-256 of their JPEG and travel once, by ``PUT /v1/references/{sha256}``.
The deadline travels as a header in milliseconds *left*, so that no clocks need to agree.

An opinion is JSON. Whatever breaks a rule here is refused with a reason; nothing is clipped into range.
"""

from __future__ import annotations

import json
import operator
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saec.cloud.images import encode_jpeg, shrink
from saec.data.decode import UnreadableImage, decode_image
from saec.errors import first_problem
from saec.fleet.frame import BadFrame
from saec.types import Box, Evidence, Heatmap, Image, Opinion, Query
from saec.vlm.tokens.codec import pack_tokens, unpack_tokens
from saec.vlm.view import pixels_of

CONTENT_TYPE = "application/x-saec-question"
DEADLINE_HEADER = "X-Saec-Deadline-Ms"
VERSION = 1

_PREFIX = struct.Struct(">4sBI")
_MAGIC = b"SAEC"
_MAX_HEADER_BYTES = 65_536
_MAX_MAP_CELLS = 1 << 22
_MAX_SIDE = 1 << 20

Probability = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Pixel = Annotated[int, Field(ge=0, le=_MAX_SIDE)]
Length = Annotated[int, Field(ge=1, le=1 << 31)]


class WireError(ValueError):
    """A question that cannot be read; the message says what is wrong with it."""


class BadAnswer(ValueError):
    """An opinion that breaks the contract: not a probability, a box outside the image, a missing field."""


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class _Blob(_Message):
    """Where a binary part is: its length in bytes and its CRC-32, so that a cut or mixed-up body is noticed."""

    length: Length
    crc32: Annotated[int, Field(ge=0, lt=1 << 32)]

    @classmethod
    def of(cls, data: bytes) -> Self:
        return cls(length=len(data), crc32=zlib.crc32(data))


class _MapPart(_Message):
    blob: _Blob
    rows: Annotated[int, Field(ge=1, le=_MAX_SIDE)]
    columns: Annotated[int, Field(ge=1, le=_MAX_SIDE)]
    low: float
    high: float


class _Question(_Message):
    part_id: Annotated[str, Field(min_length=1, max_length=4096)]
    product: Annotated[str, Field(min_length=1, max_length=256)]
    width: Annotated[int, Field(ge=1, le=_MAX_SIDE)]
    height: Annotated[int, Field(ge=1, le=_MAX_SIDE)]
    region: Annotated[list[Pixel], Field(min_length=4, max_length=4)] | None = None
    edge_p_defect: Probability | None = None
    references: Annotated[list[Sha256], Field(max_length=8)] = []
    evidence: bool = True
    image: _Blob | None = None
    tokens: _Blob | None = None
    anomaly_map: _MapPart | None = None


class _BoxBody(_Message):
    x1: Pixel
    y1: Pixel
    x2: Pixel
    y2: Pixel
    score: float | None = None


class _EvidenceBody(_Message):
    boxes: Annotated[list[_BoxBody], Field(max_length=256)] = []
    kind: Annotated[str, Field(max_length=256)] | None = None
    text: Annotated[str, Field(max_length=8192)] | None = None
    source: Annotated[str, Field(max_length=256)] = ""


class _OpinionBody(_Message):
    version: Literal[1] = 1
    p_defect: Probability
    model_id: Annotated[str, Field(min_length=1, max_length=256)]
    evidence: _EvidenceBody
    timing_ms: dict[str, Annotated[float, Field(ge=0)]] = {}
    diagnostics: dict[str, float] = {}


class Health(_Message):
    """What ``/healthz`` and ``/v1/model`` say. Fields that a newer service adds are ignored."""

    model_config = ConfigDict(extra="ignore")

    status: str
    model_id: str
    version: str
    wire: int
    queue_depth: int


class _Adapter(_Message):
    adapter: Annotated[str, Field(min_length=1, max_length=4096)] | None


def decode_adapter(body: bytes | bytearray) -> Path | None:
    """Return the folder in ``{"adapter": "DIR"}``, or ``None`` for ``{"adapter": null}``.

    Raises:
        WireError: anything else.
    """
    try:
        folder = _Adapter.model_validate_json(bytes(body)).adapter
    except ValidationError as error:
        raise WireError(first_problem(error)) from None
    return None if folder is None else Path(folder)


def encode_question(query: Query, references: Sequence[str], *, max_side: int, jpeg_quality: int) -> bytes:
    """Return the body of one question; ``references`` are the SHA-256 names under which the service has the images.

    Raises:
        WireError: a query outside the format's limits, such as a map that is not finite.
    """
    tokens = None if query.tokens is None else pack_tokens(query.tokens)
    try:
        shown = tokens or encode_jpeg(shrink(pixels_of(query), max_side), jpeg_quality)
    except ValueError as error:
        raise WireError(str(error)) from None
    map_part, map_bytes = _pack_map(query.anomaly_map) if query.anomaly_map is not None else (None, b"")
    region = query.region
    try:
        question = _Question(
            part_id=query.part_id,
            product=query.product,
            width=query.original_size[0],
            height=query.original_size[1],
            region=None if region is None else [region.x1, region.y1, region.x2, region.y2],
            edge_p_defect=None if query.edge_p_defect is None else float(query.edge_p_defect),
            references=list(references),
            evidence=query.evidence,
            image=None if tokens else _Blob.of(shown),
            tokens=_Blob.of(tokens) if tokens else None,
            anomaly_map=map_part,
        )
    except ValidationError as error:
        raise WireError(first_problem(error)) from None
    header = question.model_dump_json(exclude_defaults=True).encode()
    return b"".join((_PREFIX.pack(_MAGIC, VERSION, len(header)), header, shown, map_bytes))


@dataclass(frozen=True, slots=True)
class Question:
    """A question as it arrived: checked header, parts not yet decoded."""

    header: _Question
    shown: memoryview
    anomaly_map: memoryview | None

    @property
    def references(self) -> Sequence[str]:
        """SHA-256 names of the reference images that the question wants to show."""
        return self.header.references

    def decode(self, references: Mapping[str, Image], *, max_pixels: int) -> Query:
        """Decode the parts into a :class:`Query`; ``references`` holds the images by SHA-256 name.

        Raises:
            WireError: an image or a map that cannot be used.
        """
        head = self.header
        image = tokens = None
        try:
            if head.tokens is None:
                image = decode_image(bytes(self.shown), name=head.part_id, max_pixels=max_pixels)
            else:
                tokens = unpack_tokens(bytes(self.shown))
        except UnreadableImage as error:
            raise WireError(f"the image {error.why}") from None
        except BadFrame as error:
            raise WireError(f"the tokens: {error}") from None
        return Query(
            part_id=head.part_id,
            product=head.product,
            image=image,
            original_size=(head.width, head.height),
            region=None if head.region is None else Box(*head.region),
            references=tuple(references[name] for name in head.references),
            anomaly_map=_unpack_map(head.anomaly_map, self.anomaly_map),
            edge_p_defect=head.edge_p_defect,
            evidence=head.evidence,
            tokens=tokens,
        )


def parse_question(body: bytes | bytearray) -> Question:
    """Check the frame and the header of a body, and find its parts.

    Raises:
        WireError: not this format, another version, a length or a checksum that does not fit, a field out of range.
    """
    if len(body) < _PREFIX.size:
        raise WireError("the body is shorter than its prefix")
    magic, version, header_length = _PREFIX.unpack_from(body)
    if magic != _MAGIC:
        raise WireError("the body does not start with SAEC")
    if version != VERSION:
        raise WireError(f"wire version {version}, this service speaks {VERSION}")
    start = _PREFIX.size + header_length
    if header_length > _MAX_HEADER_BYTES or start > len(body):
        raise WireError(f"a header of {header_length} bytes")
    view = memoryview(body)
    try:
        head = _Question.model_validate_json(bytes(view[_PREFIX.size : start]))
    except ValidationError as error:
        raise WireError(f"the header: {first_problem(error)}") from None
    if head.region is not None:
        _check_box(Box(*head.region), (head.width, head.height), WireError, "the region")
    blob = head.image or head.tokens
    if blob is None or (head.image and head.tokens):
        raise WireError("a question has an image or tokens, one of them")
    shown, start = _cut(view, start, blob, "tokens" if head.image is None else "image")
    anomaly_map = None
    if head.anomaly_map is not None:
        anomaly_map, start = _cut(view, start, head.anomaly_map.blob, "anomaly map")
    if start != len(body):
        raise WireError(f"{len(body) - start} bytes after the last part")
    return Question(header=head, shown=shown, anomaly_map=anomaly_map)


def encode_opinion(opinion: Opinion, original_size: tuple[int, int]) -> bytes:
    """Return the JSON of an opinion about an image of ``original_size`` = (width, height).

    Raises:
        BadAnswer: the opinion breaks the contract.
    """
    return _body(opinion, original_size).model_dump_json(exclude_defaults=True).encode()


def decode_opinion(body: bytes, original_size: tuple[int, int]) -> Opinion:
    """Return the opinion in a service's answer; ``uplink_bytes`` is left at 0 for the client to fill in.

    Raises:
        BadAnswer: not JSON, a missing or unknown field, a number that is not finite or out of range, a box outside.
    """
    try:
        answer = _OpinionBody.model_validate_json(body)
    except ValidationError as error:
        raise BadAnswer(first_problem(error)) from None
    return _opinion(answer, original_size)


def check_opinion(opinion: Opinion, original_size: tuple[int, int]) -> Opinion:
    """Return the opinion in plain Python numbers, held to the same rules as one that came over the wire.

    Raises:
        BadAnswer: the opinion breaks the contract.
    """
    return _opinion(_body(opinion, original_size), original_size)


def encode_problem(error: str, fix: str, **more: object) -> bytes:
    """Return the JSON of a refusal: what is wrong and what to do about it."""
    return json.dumps({"error": error, "fix": fix, **more}).encode()


def _body(opinion: Opinion, original_size: tuple[int, int]) -> _OpinionBody:
    try:
        evidence = opinion.evidence
        body = _OpinionBody(
            p_defect=float(opinion.p_defect),
            model_id=opinion.model_id,
            evidence=_EvidenceBody(
                boxes=[_box_body(box) for box in evidence.boxes],
                kind=evidence.kind,
                text=evidence.text,
                source=evidence.source,
            ),
            timing_ms={name: float(value) for name, value in opinion.timing_ms.items()},
            diagnostics={name: float(value) for name, value in opinion.diagnostics.items()},
        )
    except ValidationError as error:
        raise BadAnswer(first_problem(error)) from None
    except (AttributeError, TypeError, ValueError) as error:  # not an Opinion, or fields of other types
        raise BadAnswer(f"not an opinion ({error})") from None
    _opinion(body, original_size)
    return body


def _box_body(box: Box) -> _BoxBody:
    # operator.index takes any integer and refuses 10.7, which int() would silently cut to 10.
    x1, y1, x2, y2 = (operator.index(value) for value in (box.x1, box.y1, box.x2, box.y2))
    return _BoxBody(x1=x1, y1=y1, x2=x2, y2=y2, score=None if box.score is None else float(box.score))


def _opinion(body: _OpinionBody, original_size: tuple[int, int]) -> Opinion:
    boxes = tuple(Box(box.x1, box.y1, box.x2, box.y2, box.score) for box in body.evidence.boxes)
    for box in boxes:
        _check_box(box, original_size, BadAnswer, "a box")
    evidence = Evidence(boxes=boxes, kind=body.evidence.kind, text=body.evidence.text, source=body.evidence.source)
    return Opinion(
        p_defect=body.p_defect,
        evidence=evidence,
        model_id=body.model_id,
        timing_ms=body.timing_ms,
        diagnostics=body.diagnostics,
    )


def _check_box(box: Box, size: tuple[int, int], error: type[ValueError], what: str) -> None:
    width, height = size
    if not (0 <= box.x1 < box.x2 <= width and 0 <= box.y1 < box.y2 <= height):
        corners = (box.x1, box.y1, box.x2, box.y2)
        raise error(f"{what} {corners} is not inside an image of {width} x {height} pixels")


def _cut(view: memoryview, start: int, blob: _Blob, what: str) -> tuple[memoryview, int]:
    end = start + blob.length
    part = view[start:end]
    if len(part) != blob.length:
        raise WireError(f"the body ends inside the {what}")
    if zlib.crc32(part) != blob.crc32:
        raise WireError(f"the {what} does not match its checksum")
    return part, end


def _pack_map(heatmap: Heatmap) -> tuple[_MapPart, bytes]:
    if heatmap.ndim != 2 or not 0 < heatmap.size <= _MAX_MAP_CELLS or not np.isfinite(heatmap).all():
        raise WireError(f"an anomaly map must be a finite [rows, columns] array, not one of shape {heatmap.shape}")
    low, high = float(heatmap.min()), float(heatmap.max())
    levels = np.rint((heatmap.astype(np.float64) - low) * (255.0 / (high - low) if high > low else 0.0))
    data = zstandard.ZstdCompressor(level=3).compress(levels.astype(np.uint8).tobytes())
    rows, columns = heatmap.shape
    return _MapPart(blob=_Blob.of(data), rows=rows, columns=columns, low=low, high=high), data


def _unpack_map(part: _MapPart | None, data: memoryview | None) -> Heatmap | None:
    if part is None or data is None:
        return None
    cells = part.rows * part.columns
    try:
        # The declared size is checked first: the library would otherwise allocate whatever the frame claims.
        if cells > _MAX_MAP_CELLS or zstandard.frame_content_size(data) != cells:
            raise WireError(f"the anomaly map does not hold {part.rows} x {part.columns} cells")
        levels = np.frombuffer(zstandard.ZstdDecompressor().decompress(data), dtype=np.uint8)
    except zstandard.ZstdError as error:
        raise WireError(f"the anomaly map is damaged ({error})") from None
    scaled = part.low + levels.reshape(part.rows, part.columns) * ((part.high - part.low) / 255.0)
    return scaled.astype(np.float32)
