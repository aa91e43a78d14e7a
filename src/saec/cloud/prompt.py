"""What an OpenAI-compatible model is asked about a part, and which pixels it sees. SAEC §3 in the product's own words.

Order matters: engines cache the longest common prefix of prompts. The instructions never change, the reference image of
a product changes only with the product, and what is new with each part comes last. The question about evidence repeats
the whole prompt of the verdict and differs only in its final text.

Sizes: every picture is shrunk to the longest side ``max_side``, then both sides are rounded to a multiple of
``side_multiple`` (28 suits the Qwen-VL family: 14-pixel patches merged 2 × 2), so that the engine sees exactly the
pixels that were sent and boxes need one mapping only. The close-up has half that longest side.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from saec.cloud.geometry import shown_region
from saec.cloud.images import encode_jpeg
from saec.config import OpenAISettings
from saec.types import Heatmap, Image, Query

VERSION = "p1"
"""Part of the model id: a changed prompt is another model to whoever calibrated on it."""

KINDS = ("surface", "contamination", "print", "texture", "assembly", "joint", "other")

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

_ASK_LABEL = "Does this part have a defect? Answer with one digit and nothing else: 1 for a defect, 0 for a good part."
_ASK_EVIDENCE = (
    "This part was judged defective. Answer with JSON: kind (the sign of a defect that fits best), bboxes (one "
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

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of one part up to the question, and (width, height) of the part's image as the model sees it."""

    prefix: Messages
    seen: tuple[int, int]

    def label_question(self) -> Messages:
        """Return the messages whose first answer token is ``0`` or ``1``."""
        return self._asking(_ASK_LABEL)

    def evidence_question(self) -> Messages:
        """Return the messages whose answer is JSON of :data:`EVIDENCE_SCHEMA`."""
        return self._asking(_ASK_EVIDENCE.format(width=self.seen[0], height=self.seen[1]))

    def _asking(self, question: str) -> Messages:
        *before, user = self.prefix
        return [*before, {**user, "content": [*user["content"], _text(question)]}]


def build_prompt(query: Query, settings: OpenAISettings) -> Prompt:
    """Return the prompt of one part: instructions, product and reference images, close-up, the part itself."""
    content = [_text(f"Product: {query.product}.")]
    for reference in query.references[: settings.references]:
        content += [_text("A good part of this product, for reference:"), _picture(reference, settings)]
    close_up = anomaly_crop(query)
    if close_up is not None:
        # Before the part: it then stands next to the question, and its pixel grid is the one that boxes refer to.
        content += [
            _text("A close-up of where the part to judge departs most from good parts; that alone is no defect:"),
            _picture(close_up, settings, max_side=settings.max_side // 2),
        ]
    part = resize_for_model(query.image, max_side=settings.max_side, multiple=settings.side_multiple)
    content += [_text("The part to judge:"), _data_url(part, settings.jpeg_quality)]
    prefix: Messages = [{"role": "system", "content": _INSTRUCTIONS}, {"role": "user", "content": content}]
    return Prompt(prefix, (part.shape[1], part.shape[0]))


def resize_for_model(image: Image, *, max_side: int, multiple: int) -> Image:
    """Return the image at the size the model sees: longest side at most ``max_side``, sides multiples of ``multiple``.

    Sides are rounded to the nearest multiple (at least one, at most the largest that fits into ``max_side``), which
    changes the aspect ratio by half a multiple at most.
    """
    height, width = image.shape[:2]
    scale = min(1.0, max_side / max(height, width))
    most = max(1, max_side // multiple)
    across, down = (min(most, max(1, round(side * scale / multiple))) * multiple for side in (width, height))
    if (across, down) == (width, height):
        return image
    shrinks = across * down < width * height
    way = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (across, down), interpolation=way), dtype=np.uint8)


def anomaly_crop(query: Query) -> Image | None:
    """Return the part of ``query.image``, half as wide and high, around the peak of the anomaly map, if there is one.

    The map covers the whole original; a peak outside the shown region gives no crop, and neither does a flat map.
    """
    peak = None if query.anomaly_map is None else _peak(query.anomaly_map, query.original_size)
    if peak is None:
        return None
    region = shown_region(query)
    if not (region.x1 <= peak[0] < region.x2 and region.y1 <= peak[1] < region.y2):
        return None
    height, width = query.image.shape[:2]
    centre_x = (peak[0] - region.x1) / (region.x2 - region.x1) * width
    centre_y = (peak[1] - region.y1) / (region.y2 - region.y1) * height
    left = _start(centre_x, width)
    top = _start(centre_y, height)
    return query.image[top : top + max(1, height // 2), left : left + max(1, width // 2)]


def _peak(heatmap: Heatmap, size: tuple[int, int]) -> tuple[float, float] | None:
    if float(heatmap.max()) == float(heatmap.min()):
        return None
    rows, columns = heatmap.shape
    row, column = divmod(int(heatmap.argmax()), columns)
    return (column + 0.5) * size[0] / columns, (row + 0.5) * size[1] / rows


def _start(centre: float, length: int) -> int:
    half = max(1, length // 2)
    return min(max(0, round(centre - half / 2)), length - half)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _picture(image: Image, settings: OpenAISettings, max_side: int | None = None) -> dict[str, Any]:
    side = settings.max_side if max_side is None else max_side
    return _data_url(resize_for_model(image, max_side=side, multiple=settings.side_multiple), settings.jpeg_quality)


def _data_url(image: Image, quality: int) -> dict[str, Any]:
    coded = base64.b64encode(encode_jpeg(image, quality)).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{coded}"}}
