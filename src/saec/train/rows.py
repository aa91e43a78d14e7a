"""Fine-tuning rows, and what becomes of them in an epoch: the questions, their answers, their order.

The whole plan of an epoch follows from (seed, epoch): a resumed run sees the same questions as an undisturbed one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from saec.config import PromptSettings, Section
from saec.data.decode import UnreadableImage, read_image
from saec.errors import BadInput, first_problem
from saec.train.config import TrainSettings
from saec.types import Heatmap, Query
from saec.vlm.prompt import KINDS, Ask, Question, build_question
from saec.vlm.view import pixels_of

Pixel = TypeVar("Pixel", np.uint8, np.float32)

_SIDES = re.compile(r"\b(left|right|upper|lower|top|bottom|above|below)\b", re.IGNORECASE)
"""Words that a flip would turn into a lie."""


class RowEvidence(Section):
    """What is wrong with a part and where, as :data:`saec.vlm.prompt.EVIDENCE_SCHEMA` has it, but for the pixels: boxes
    are (x1, y1, x2, y2) in those of the image file, whatever size the model will be shown."""

    kind: Annotated[str, Field(pattern=f"^({'|'.join(KINDS)})$")]
    bboxes: Annotated[list[tuple[float, float, float, float]], Field(max_length=16)]
    desc: str


class _Line(Section):
    """One line of ``train.jsonl`` or ``val.jsonl`` as :func:`saec.data.sft.write_sft` writes it, and optional keys."""

    image: str
    part_id: str
    product: str
    label: Literal[0, 1]
    answer: Literal["0", "1"]
    kind: str | None
    split: Literal["train", "val"]
    source_split: str | None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    group: str
    p_defect: Annotated[float, Field(ge=0, le=1)] | None = None
    anomaly_map: str | None = None
    evidence: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> _Line:
        if self.answer != str(self.label):
            raise ValueError(f"label {self.label} but answer {self.answer!r}")
        return self


@dataclass(frozen=True, slots=True)
class Row:
    """One image to learn from. ``p_defect``: the answer is drawn from it anew each epoch; 0.0 or 1.0 where it is sure.

    ``evidence`` has its boxes in pixels of the image file. ``anomaly_map`` is a ``.npy`` file of float32 [h, w] over
    the whole image.
    """

    part_id: str
    product: str
    image: Path
    label: int
    p_defect: float
    sha256: str
    group: str
    anomaly_map: Path | None = None
    evidence: RowEvidence | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its answer. ``label`` is what is answered to :attr:`Ask.LABEL`."""

    row: Row
    ask: Ask
    label: int
    hflip: bool = False
    vflip: bool = False


def read_rows(file: Path) -> list[Row]:
    """Read a fine-tuning file; relative paths start at its folder.

    Raises:
        BadInput: unreadable or empty file, or a line of another form, with its number.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the fine-tuning file ({error})", where=file) from None
    rows = [_row(line, file, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise BadInput("the fine-tuning file is empty", where=file, fix="write one with saec data sft")
    return rows


def _row(text: str, file: Path, number: int) -> Row:
    where = f"{file}:{number}"
    try:
        line = _Line.model_validate_json(text)
        evidence = None if line.evidence is None else RowEvidence.model_validate_json(line.evidence)
    except ValidationError as error:
        raise BadInput(f"not a fine-tuning row ({first_problem(error)})", where=where) from None
    row = Row(
        part_id=line.part_id,
        product=line.product,
        image=file.parent / line.image,
        label=line.label,
        p_defect=float(line.label) if line.p_defect is None else line.p_defect,
        sha256=line.sha256,
        group=line.group,
        anomaly_map=None if line.anomaly_map is None else file.parent / line.anomaly_map,
        evidence=evidence,
    )
    for path in (row.image, row.anomaly_map):
        if path is not None and not path.is_file():
            raise BadInput("no such file", where=f"{where}: {path}", fix="the row's paths start at the file's folder")
    return row


def epoch_plan(rows: Sequence[Row], settings: TrainSettings, epoch: int) -> list[Example]:
    """Return the questions of one epoch in the order they are trained.

    Every row gives its label question; one with evidence whose drawn answer is "1" also gives the evidence question,
    in a share ``evidence_share`` of the cases. Evidence is only ever asked about defects.
    """
    rng = np.random.default_rng([settings.seed, epoch])
    chance = rng.random((len(rows), 6))  # drawn for every row alike: one changed row leaves the others as they were
    examples: list[Example] = []
    for row, u in zip(rows, chance, strict=True):
        label = int(u[0] < row.p_defect)
        h, v = "hflip" in settings.augment, "vflip" in settings.augment
        examples.append(Example(row, Ask.LABEL, label, h and bool(u[1] < 0.5), v and bool(u[2] < 0.5)))
        if row.evidence is not None and label == 1 and u[3] < settings.evidence_share:
            fixed = _SIDES.search(row.evidence.desc) is not None
            flips = (h and not fixed and bool(u[4] < 0.5), v and not fixed and bool(u[5] < 0.5))
            examples.append(Example(row, Ask.EVIDENCE, 1, *flips))
    return [examples[at] for at in rng.permutation(len(examples))]


def query_of(row: Row) -> Query:
    """Return what a station would ask the cloud about the row's image.

    Raises:
        BadInput: the image or the anomaly map cannot be read.
    """
    try:
        image = read_image(row.image)
    except UnreadableImage as error:
        raise BadInput("unreadable image", where=row.image, fix=error.why) from None
    height, width = image.shape[:2]
    heatmap = None if row.anomaly_map is None else _read_map(row.anomaly_map)
    return Query(row.part_id, row.product, image, (width, height), anomaly_map=heatmap)


def pose(example: Example, settings: PromptSettings) -> tuple[Question, str]:
    """Return the question as the model is asked when it serves, and the answer it shall give.

    Raises:
        BadInput: the image or the anomaly map cannot be read.
    """
    query = flipped(query_of(example.row), across=example.hflip, down=example.vflip)
    question = build_question(query, example.ask, settings)
    if example.ask is Ask.LABEL:
        return question, str(example.label)
    return question, _evidence_answer(example, query.original_size, question.seen)


def _evidence_answer(example: Example, size: tuple[int, int], seen: tuple[int, int]) -> str:
    """Return the evidence as the model is to write it: whole pixels of the image as it sees it."""
    evidence = example.row.evidence
    if evidence is None:
        raise ValueError("an evidence question needs a row with evidence")
    boxes = [_seen_box(box, example, size, seen) for box in evidence.bboxes]
    return json.dumps({"kind": evidence.kind, "bboxes": boxes, "desc": evidence.desc}, ensure_ascii=False)


def _seen_box(
    box: tuple[float, float, float, float], example: Example, size: tuple[int, int], seen: tuple[int, int]
) -> list[int]:
    (x1, y1, x2, y2), (width, height) = box, size
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise BadInput(f"box {list(box)} is not inside the image", where=example.row.image, fix=f"{width} x {height}")
    if example.hflip:
        x1, x2 = width - x2, width - x1
    if example.vflip:
        y1, y2 = height - y2, height - y1
    across, down = seen[0] / width, seen[1] / height
    # Outwards, so that a box is never empty; the tolerance keeps 7.000000001 from becoming 8.
    low = math.floor(x1 * across + 1e-6), math.floor(y1 * down + 1e-6)
    return [*low, math.ceil(x2 * across - 1e-6), math.ceil(y2 * down - 1e-6)]


def _read_map(path: Path) -> Heatmap:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read the anomaly map ({error})", where=path) from None
    if (
        not isinstance(found, np.ndarray)
        or found.ndim != 2
        or found.dtype != np.float32
        or not np.isfinite(found).all()
    ):
        raise BadInput("not an anomaly map: finite float32 [h, w] expected", where=path)
    return found


def flipped(query: Query, *, across: bool, down: bool) -> Query:
    """Return the question about the mirrored part: image and anomaly map together."""
    heatmap = None if query.anomaly_map is None else _mirrored(query.anomaly_map, across, down)
    return replace(query, image=_mirrored(pixels_of(query), across, down), anomaly_map=heatmap)


def _mirrored(pixels: NDArray[Pixel], across: bool, down: bool) -> NDArray[Pixel]:
    return np.ascontiguousarray(pixels[:: -1 if down else 1, :: -1 if across else 1])
