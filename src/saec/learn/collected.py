"""What a desk has collected, as parts that an adapter can learn from: ``saec learn distill --desk``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from saec.config import Settings
from saec.errors import BadInput
from saec.fleet.frame import BadFrame, decode_frame, frame_id
from saec.learn.judged import LABELS, shown
from saec.learn.rulings import OPINIONS, Ruling, open_rulings, read_labels
from saec.learn.samples import SAMPLE, decode_sample, for_probe
from saec.learn.teacher import HOME
from saec.learn.teaching import counts
from saec.types import Label, Query


@dataclass(frozen=True, slots=True, eq=False)
class Collected:
    """One part. ``query`` is what the teacher was asked, its map in the teacher's units; ``p_defect`` is a person's
    label, 0 or 1, else the teacher's opinion."""

    query: Query
    sha256: str
    p_defect: float


def collected(desk: Path, settings: Settings) -> tuple[list[Collected], int]:
    """Return the parts whose images a desk holds with a label that counts, in the order of their hashes, and how many
    of them hold no image (tokens came up in its place).

    People's labels win: those of the rulings, and those of the list on the cloud's side, as it is now. A part of the
    probe set is not among them. The desk may be at work meanwhile.

    Raises:
        BadInput: no desk, or a damaged one.
    """
    file = desk / HOME / OPINIONS
    if not file.is_file():
        raise BadInput("no desk with opinions", where=desk, fix="pass the folder of saec cloud serve --learn")
    people = read_labels(desk / HOME / LABELS) if (desk / HOME / LABELS).is_file() else {}
    found, bare = [], 0
    for ruling in _surest(open_rulings(file), people, settings):
        query = _query(desk, ruling, settings)
        if query is None:
            continue
        if query.image is None:
            bare += 1
            continue
        found.append(Collected(query, ruling.sha256, ruling.p_defect))
    return found, bare


def _surest(rulings: list[Ruling], people: dict[str, Label], settings: Settings) -> Iterator[Ruling]:
    """Yield one ruling for each content: a person's if there is one, else the latest that is sure enough."""
    latest: dict[str, Ruling] = {}
    for ruling in rulings:
        label = people.get(ruling.sha256) or people.get(ruling.part_id)
        if label is not None:
            ruling = replace(ruling, who="human", p_defect=float(label is Label.DEFECT))
        before = latest.get(ruling.sha256)
        if before is None or ruling.who == "human" or before.who != "human":
            latest[ruling.sha256] = ruling
    for _, ruling in sorted(latest.items()):
        if not for_probe(ruling.sha256) and counts(ruling, settings.learn):
            yield ruling


def _query(desk: Path, ruling: Ruling, settings: Settings) -> Query | None:
    """Return what was asked about a part; ``None`` where the desk had no more room for its frame."""
    file = desk / "frames" / ruling.frame[:2] / ruling.frame
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    try:
        if frame_id(data) != ruling.frame:
            raise BadFrame("its bytes do not have the SHA-256 that it is named by")
        frame = decode_frame(data, kinds=(SAMPLE,), most=settings.learn.max_frame_bytes)
        sample = decode_sample(frame, max_pixels=settings.serve.max_pixels)
    except BadFrame as error:
        raise BadInput(f"a damaged frame ({error})", where=file, fix="delete it") from None
    return shown(sample.query, ruling.scale)
