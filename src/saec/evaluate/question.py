"""What is asked about a part outside a run: its image, and the question that an escalation would ask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from saec.data.decode import UnreadableImage, read_image
from saec.errors import BadInput
from saec.route.query import build_query
from saec.types import EdgeResult, Image, Query


def image_of(path: Path, *, max_pixels: int) -> Image:
    """Return an image [H, W, 3] uint8 BGR that must be readable.

    Raises:
        BadInput: it is not.
    """
    try:
        return read_image(path, max_pixels=max_pixels)
    except UnreadableImage as error:
        raise BadInput(f"unreadable image ({error.why})", where=error.path, fix="leave it out") from None


def question_about(
    part_id: str, product: str, image: Image, seen: EdgeResult, *, uplink: Literal["image", "crop", "tokens"]
) -> Query:
    """Return the question about a part of which the edge has ``seen`` this; a label is asked for, and no evidence."""
    query = build_query(
        part_id,
        product,
        image,
        heatmap=seen.heatmap,
        evidence=seen.evidence,
        p_defect=seen.p_defect,
        uplink=uplink,
    )
    return replace(query, evidence=False)
