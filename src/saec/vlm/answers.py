"""What a multimodal LLM answered: its decision, and evidence as JSON held to the schema, nothing repaired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from saec.errors import first_problem
from saec.types import Evidence, Query
from saec.vlm.geometry import to_original
from saec.vlm.prompt import KINDS

_LONGEST_TEXT = 2000


@dataclass(frozen=True, slots=True)
class Decision:
    """P(defect) among the two labels, and ``mass``: the probability of the two labels among all tokens."""

    p_defect: float
    mass: float


class UnusableAnswer(ValueError):
    """The model answered, but not with what was asked for."""


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
    return kind


class _Evidence(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    kind: Annotated[str, AfterValidator(_known)]
    bboxes: Annotated[list[tuple[float, float, float, float]], Field(max_length=16)]
    desc: Annotated[str, Field(max_length=_LONGEST_TEXT)]


def read_evidence(text: str, seen: tuple[int, int], query: Query, *, source: str) -> Evidence:
    """Return the evidence in an answer; boxes in pixels of the image ``seen`` are mapped to the original.

    Raises:
        UnusableAnswer: not JSON of the asked form, or a box that is not inside the image.
    """
    try:
        found = _Evidence.model_validate_json(text)
        boxes = tuple(to_original(corners, seen, query) for corners in found.bboxes)
    except ValidationError as error:
        raise UnusableAnswer(f"not the asked JSON ({first_problem(error)})") from None
    except ValueError as error:  # of to_original
        raise UnusableAnswer(str(error)) from None
    return Evidence(boxes=boxes, kind=found.kind, text=found.desc.strip() or None, source=source)


def no_evidence(why: object, *, source: str) -> Evidence:
    """Return the record of a defect whose evidence is missing: the verdict stands, and the text says why."""
    return Evidence(text=f"no evidence: {why}"[:_LONGEST_TEXT], source=source)
