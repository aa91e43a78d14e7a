"""What is said about samples: people's labels, and rulings with their provenance, kept as lines of JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from saec.cloud.desk import Name
from saec.errors import BadInput, first_problem
from saec.learn.journal import append_lines, open_lines
from saec.types import Label

OPINIONS = "opinions.jsonl"
"""Name of the file in which either side keeps its rulings."""

_FIX = "restore or remove the file"

_P = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, slots=True)
class Ruling:
    """One opinion on one part. A person's P(defect) is 0 or 1. What is read from elsewhere is held to the ranges."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    sha256: Name
    part_id: str
    p_defect: _P
    who: Literal["human", "model"]
    model_id: str
    asked: str
    """UTC, ISO 8601."""
    frame: Name
    """Name of the frame in which the sample came."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """What the anomaly map was divided by before the model saw it."""
    p_cloud: _P | None = None
    """Beside a person's label: what the cloud had said on the line, by which it is told how far to trust the cloud."""

    @property
    def label(self) -> Label:
        """What the part is called by this opinion."""
        return Label.DEFECT if self.p_defect >= 0.5 else Label.GOOD

    @property
    def sure(self) -> float:
        """max(P, 1 - P)."""
        return max(self.p_defect, 1 - self.p_defect)


_RULINGS = TypeAdapter(list[Ruling])


def parse_rulings(tree: object, *, where: object, fix: str = _FIX) -> list[Ruling]:
    """Return the rulings in plain JSON types; ``where`` they come from, and what to do, are for the error.

    Raises:
        BadInput: they break the contract.
    """
    try:
        return _RULINGS.validate_python(tree)
    except ValidationError as error:
        raise BadInput(f"not opinions ({first_problem(error)})", where=where, fix=fix) from None


def open_rulings(file: Path) -> list[Ruling]:
    """Return the rulings of a file to be appended to; a line that a killed process left unfinished goes.

    Raises:
        BadInput: the file cannot be read.
    """
    try:
        tree = [json.loads(line) for line in open_lines(file)]
    except ValueError as error:
        raise BadInput(f"not opinions ({error})", where=file, fix=_FIX) from None
    return parse_rulings(tree, where=file)


def append_rulings(file: Path, rulings: Sequence[Ruling]) -> None:
    """Append rulings; they are on the disk when this returns.

    Raises:
        OSError: the disk refuses.
    """
    append_lines(file, (json.dumps(asdict(each)) for each in rulings))


def read_labels(file: Path) -> dict[str, Label]:
    """Return people's labels from a CSV file with the columns ``part`` and ``label`` (good or defect); a part is named
    by its id, the path of its image, or the SHA-256 of that.

    Raises:
        BadInput: the file cannot be read, lacks a column, or holds another label.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise BadInput(f"cannot read the labels ({error.strerror})", where=file, fix="check the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        fix = "save it as CSV in UTF-8, with the columns part and label"
        raise BadInput(f"cannot read the labels ({error})", where=file, fix=fix) from None
    labels: dict[str, Label] = {}
    for number, row in enumerate(rows, start=2):
        part, label = row.get("part"), str(row.get("label")).strip().lower()
        if not part or label not in (Label.GOOD, Label.DEFECT):
            what = f"not a part and good or defect: {part!r:.60}, {label!r:.20}"
            raise BadInput(what, where=f"{file}, line {number}", fix="write the columns part and label")
        labels[part.strip()] = Label(label)
    return labels
