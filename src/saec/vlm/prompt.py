"""What a multimodal LLM is asked about a part, and which pixels it sees. SAEC §3 in the product's own words.

Every backend asks the same :class:`Question`: Hugging Face classes, our small model, and OpenAI-compatible engines.
Order matters, because what prompts have in common at their beginning is computed once: the instructions never change,
the reference images of a product change only with the product, and what is new with each part comes last. The question
about evidence repeats the verdict's and differs only in its final text.

Sizes: every picture is shrunk to the longest side ``max_side``, then both sides are rounded to a multiple of
``side_multiple`` (28 suits the Qwen2.5-VL family: 14-pixel patches merged 2 × 2), so that the model sees exactly these
pixels and boxes need one mapping only. The close-up has half that longest side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saec.config import PromptSettings
from saec.types import Heatmap, Image, Query
from saec.vlm.view import anomaly_crop, model_size, pixels_of, resize_for_model, shown_map

VERSION = "p2"
"""Part of the model id: a changed prompt is another model to whoever calibrated on it."""

KINDS = ("surface", "contamination", "print", "texture", "assembly", "joint", "other")

LABELS = ("0", "1")
"""The answers to :attr:`Ask.LABEL`: good, defect."""

PREFILL = "Label: "
"""How the model's answer to :attr:`Ask.LABEL` begins; the label is the next token (SAEC §3)."""

_INSTRUCTIONS = """\
You are a visual quality inspector on a production line. You look at one photographed part at a time and decide \
whether it is good or has a defect.
Judge the part only. Ignore the background, fixtures and holders, lighting, reflections, shadows, and how the part \
is turned or shifted; variation that the good reference shows as well is normal.
Signs of a defect:
- surface: scratch, crack, dent, hole, chipped or missing material
- contamination: stain, foreign object, residue, leakage
- print: missing, smeared or misaligned print or marking
- texture: colour or texture that departs from the good part
- assembly: wrong, missing, shifted or deformed component
- joint: faulty weld, solder joint or seam
Answer exactly in the form the question asks for."""

_NO_MARKUP = str.maketrans("<>[]{}|\r\n", "()()()/  ")
"""A product's name comes from outside; chat templates and tokenizers read ``<|im_end|>`` and the like as control."""

_ASK_LABEL = (
    "\nDoes this part have a defect? Answer with one digit and nothing else: 1 for a defect, 0 for a good part."
)
_ASK_EVIDENCE = (
    "\nThis part was judged defective. Answer with JSON: kind (the sign of a defect that fits best), bboxes (one "
    "[x1, y1, x2, y2] for each defect, in pixels of the {width} x {height} image of the part, origin at the top left), "
    "desc (one short sentence saying what is wrong and where)."
)

EVIDENCE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": list(KINDS)},
        "bboxes": {
            "type": "array",
            "maxItems": 16,
            "items": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
        },
        "desc": {"type": "string"},
    },
    "required": ["kind", "bboxes", "desc"],
    "additionalProperties": False,
}


class Ask(StrEnum):
    """What is asked: the verdict, or what a defect is and where."""

    LABEL = "label"
    EVIDENCE = "evidence"


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """One question as any model gets it.

    ``content`` is the user's turn: texts and BGR images in order, at the size the model shall see; the part's image is
    the last one. ``prefill`` begins the model's answer. ``part`` is that last image, ``seen`` its (width, height), and
    ``anomaly_map`` the map cut to what it shows, in the units of the query. The first ``shared`` items of ``content``
    are the same for all parts of the product that are shown with the same references. ``tokens`` [L, W] float32,
    standardised, stand for pixels that have not come: ``part`` is then black.
    """

    ask: Ask
    system: str
    content: tuple[str | Image, ...]
    prefill: str
    product: str
    part: Image
    seen: tuple[int, int]
    anomaly_map: Heatmap | None = None
    shared: int = 0
    tokens: NDArray[np.float32] | None = None


def build_question(
    query: Query, ask: Ask, settings: PromptSettings, *, tokens: NDArray[np.float32] | None = None
) -> Question:
    """Return the question about one part: instructions, product and references, close-up, the part, what is asked.

    ``tokens`` [L, W] are what a part without pixels is shown by, to a model that takes them.

    Raises:
        BadInput: neither pixels nor tokens.
    """
    content: list[str | Image] = [f"Product: {query.product.translate(_NO_MARKUP)}."]
    for reference in query.references[: settings.references]:
        content += ["\nA good part of this product, for reference:\n", _view(reference, settings)]
    shared = len(content)
    close_up = anomaly_crop(query) if tokens is None else None
    if close_up is not None:
        # Before the part: it then stands next to the question, and its pixel grid is the one that boxes refer to.
        content += [
            "\nA close-up of where the part to judge departs most from good parts; that alone is no defect:\n",
            _view(close_up, settings, settings.max_side // 2),
        ]
    part = _view(pixels_of(query), settings) if tokens is None else _unseen(query, settings)
    content += ["\nThe part to judge:\n", part, _ASK_LABEL]
    seen = (part.shape[1], part.shape[0])
    label = Question(
        Ask.LABEL, _INSTRUCTIONS, tuple(content), PREFILL, query.product, part, seen, shown_map(query), shared, tokens
    )
    return label if ask is Ask.LABEL else ask_evidence(label)


def ask_evidence(question: Question) -> Question:
    """Return the question whose answer is JSON of :data:`EVIDENCE_SCHEMA`, about the same pixels."""
    width, height = question.seen
    text = _ASK_EVIDENCE.format(width=width, height=height)
    return replace(question, ask=Ask.EVIDENCE, content=(*question.content[:-1], text), prefill="")


def _unseen(query: Query, settings: PromptSettings) -> Image:
    """Return black pixels in place of a part whose tokens came: its shape says where in them it lies."""
    across, down = model_size(*query.original_size, max_side=settings.max_side, multiple=settings.side_multiple)
    return np.zeros((down, across, 3), np.uint8)


def _view(image: Image, settings: PromptSettings, max_side: int | None = None) -> Image:
    return resize_for_model(image, max_side=max_side or settings.max_side, multiple=settings.side_multiple)
