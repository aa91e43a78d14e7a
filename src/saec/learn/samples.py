"""Samples: which parts of a round go to the teacher, and how each travels. Pure functions and a codec.

Uncertainty-guided sampling as in CD-CCA, with calibrated probabilities in place of answer confidences: the candidates
are the parts that the router wanted the cloud for. Audits are among them, which matters: under drift the edge is sure
and wrong, and only a random look finds that out.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saec.cloud.images import encode_jpeg, shrink
from saec.config import CloudSettings
from saec.data.decode import UnreadableImage, decode_image
from saec.errors import first_problem
from saec.fleet.frame import BadFrame, Frame
from saec.types import Box, Heatmap, Label, Query, Verdict
from saec.vlm.tokens.codec import pack_tokens, unpack_tokens

SAMPLE = "sample"

PROBE_EACH = 5

_OCTAVE_STEPS = 20
"""Levels of a stored map for each doubling: a cell is at most 1.8 % off."""

_LOWEST = 2.0**-6
_MOST_CELLS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One part for the teacher. ``query`` is the question that an escalation would ask, without references or
    evidence; ``score`` is the edge's raw one, ``label`` what the edge called it, ``human`` what a person did;
    ``p_cloud`` is the cloud's P(defect) where the part was escalated."""

    query: Query
    sha256: str
    score: float
    scene: float | None
    label: Label
    human: Label | None = None
    p_cloud: float | None = None


def choose(
    verdicts: Sequence[Verdict],
    *,
    most: int,
    known: Collection[str],
    labelled: Collection[str] = (),
    uncertain: bool = True,
    seed: int = 0,
) -> list[Verdict]:
    """Return at most ``most`` verdicts whose parts go to the teacher, each content once.

    First come those that people have labelled, then the least certain by |P(defect) - 0.5| of the final probability, in
    hundredths: below that, and among parts that the edge is wholly sure of, the lot decides.

    Args:
        verdicts: of one round.
        most: how many at most.
        known: content hashes that were samples before.
        labelled: content hashes with a human label.
        uncertain: without it (the ablation) all parts are candidates and the lot decides alone, at the same count.
        seed: of the lot.
    """
    fresh = {v.sha256: v for v in verdicts if v.p_defect is not None and v.sha256 not in known}
    wanted = [v for v in fresh.values() if v.escalated_for is not None or v.sha256 in labelled]
    drawn = sorted(wanted if uncertain else fresh.values(), key=lambda v: v.sha256)
    random.Random(seed).shuffle(drawn)

    def rank(verdict: Verdict) -> tuple[bool, float]:
        certain = abs((verdict.p_defect or 0.0) - 0.5)
        return verdict.sha256 not in labelled, round(certain, 2) if uncertain else 0.0

    return sorted(drawn, key=rank)[: min(most, len(wanted))]


def for_probe(sha256: str) -> bool:
    """Return whether a part is held out to prove updates on: one in :data:`PROBE_EACH`, the same ones on either side.

    Nothing is ever taught with it.
    """
    return int(sha256[:8], 16) % PROBE_EACH == 0


class _Header(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    part_id: str = Field(min_length=1, max_length=4096)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    product: str = Field(min_length=1, max_length=256)
    size: tuple[int, int] = Field(strict=False)
    region: tuple[int, int, int, int] | None = Field(None, strict=False)
    score: float
    p_edge: float | None = Field(None, ge=0, le=1)
    scene: float | None = None
    label: Label = Field(strict=False)
    human: Label | None = Field(None, strict=False)
    p_cloud: float | None = Field(None, ge=0, le=1)


def encode_sample(sample: Sample, settings: CloudSettings) -> Frame:
    """Return the frame of a sample: its JPEG (of the part or the crop) or its tokens, and its anomaly map.

    Raises:
        ValueError: an image that cannot be JPEG.
    """
    query, region = sample.query, sample.query.region
    header = _Header(
        part_id=query.part_id,
        sha256=sample.sha256,
        product=query.product,
        size=query.original_size,
        region=None if region is None else (region.x1, region.y1, region.x2, region.y2),
        score=sample.score,
        p_edge=query.edge_p_defect,
        scene=sample.scene,
        label=sample.label,
        human=sample.human,
        p_cloud=sample.p_cloud,
    )
    arrays: dict[str, NDArray[Any]] = {}
    if query.tokens is not None:
        arrays["tokens"] = np.frombuffer(pack_tokens(query.tokens), dtype=np.uint8)
    elif query.image is not None:
        jpeg = encode_jpeg(shrink(query.image, settings.max_side), settings.jpeg_quality)
        arrays["image"] = np.frombuffer(jpeg, dtype=np.uint8)
    if query.anomaly_map is not None:
        arrays["map"] = pack_map(query.anomaly_map)
    return Frame(SAMPLE, header.model_dump(mode="json"), arrays)


def decode_sample(frame: Frame, *, max_pixels: int) -> Sample:
    """Return the sample in a frame.

    Raises:
        BadFrame: a header or an array that breaks the contract, or an image that cannot be used.
    """
    try:
        head = _Header.model_validate(frame.header)
        tokens = unpack_tokens(_bytes(frame, "tokens")) if "tokens" in frame.arrays else None
        image = None
        if tokens is None:
            image = decode_image(_bytes(frame, "image"), name=head.part_id, max_pixels=max_pixels)
        cells = frame.arrays.get("map")
        query = Query(
            part_id=head.part_id,
            product=head.product,
            image=image,
            original_size=head.size,
            region=None if head.region is None else Box(*head.region),
            anomaly_map=None if cells is None else unpack_map(cells),
            edge_p_defect=head.p_edge,
            evidence=False,
            tokens=tokens,
        )
    except ValidationError as error:
        raise BadFrame(f"not a sample: {first_problem(error)}") from None
    except (BadFrame, KeyError, ValueError, UnreadableImage) as error:
        raise BadFrame(f"not a sample: {error}") from None
    return Sample(query, head.sha256, head.score, head.scene, head.label, head.human, head.p_cloud)


def pack_map(heatmap: Heatmap) -> NDArray[np.uint8]:
    """Return a relative map [h, w] in 255 logarithmic levels from 2**-6 to 2**6.7; 0 stands for all below."""
    levels = np.rint(np.log2(np.maximum(heatmap, 1e-30) / _LOWEST) * _OCTAVE_STEPS) + 1
    return np.asarray(np.clip(levels, 0, 255), dtype=np.uint8)


def unpack_map(levels: NDArray[Any]) -> Heatmap:
    """Return what :func:`pack_map` was given, each cell at most 1.8 % off.

    Raises:
        ValueError: not such a map.
    """
    if levels.dtype != np.uint8 or levels.ndim != 2 or not 0 < levels.size <= _MOST_CELLS:
        raise ValueError("its map is none")
    values = _LOWEST * np.exp2((levels.astype(np.float32) - 1) / _OCTAVE_STEPS)
    return np.asarray(np.where(levels == 0, 0, values), dtype=np.float32)


def background(heatmap: Heatmap) -> float:
    """Return the level of a map where nothing is wrong: the median of its cells."""
    return float(np.median(heatmap))


def _bytes(frame: Frame, name: str) -> bytes:
    data = frame.arrays[name]
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ValueError(f"its {name} is no bytes")
    return data.tobytes()
