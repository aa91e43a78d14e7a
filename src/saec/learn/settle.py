"""What becomes of a round: an update made here where the cloud made none, applied where the probe set agrees, or found
applied already by a call that was killed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from saec.data.manifest import write_atomic
from saec.fleet.slots import Slots
from saec.learn.apply import Applied, apply_update
from saec.learn.probe import allowed_loss, own_image, probe_of
from saec.learn.round import Line, Round
from saec.learn.rulings import Ruling
from saec.learn.teacher import NOTHING_NEW
from saec.learn.teaching import lessons_of, teach
from saec.learn.update import Refused, decode_update
from saec.types import Image

UPDATE = "update"

Step = Callable[[str, int, int], None]
"""``(step, done, total)``."""

Made = tuple[str | None, bytes | None, str | None]
"""Who taught, and the encoded update; or ``None`` twice, and why there is none, if that can be said."""


def taught_here(line: Line, round_: Round, rulings: Sequence[Ruling], step: Step) -> Made:
    """Teach the line's own station on its own images and return what came of it.

    Raises:
        BadInput: the station is damaged, or cannot be taught.
    """
    asked = round_.asked

    def image_of(ruling: Ruling) -> Image | None:
        path = Path(round_.samples[ruling.frame].as_verdict().path)
        return own_image(path, ruling.sha256, line.settings)

    lessons = lessons_of(rulings, image_of, line.settings.learn)
    if not lessons:
        return None, None, None
    made = teach(
        Slots(line.station).current(),
        line.product,
        lessons,
        line.settings,
        version=asked.version,
        previous=asked.previous,
        key=line.key,
        without=asked.without,
        provenance={"teachers": sorted({each.model_id or each.who for each in rulings}), "taught": "line"},
        progress=step,
    )
    if made is None:
        return None, None, NOTHING_NEW
    write_atomic(line.home / UPDATE, made[0])
    return "line", made[0], None


def applied_here(line: Line, data: bytes, probes: Sequence[Ruling]) -> Applied:
    """Apply an encoded update unless it is worse on the probe set.

    Raises:
        Refused, BadInput: see :func:`saec.learn.apply.apply_update`.
    """
    settings = line.settings
    return apply_update(
        line.station,
        data,
        key=line.key,
        most=settings.learn.max_frame_bytes,
        probe=probe_of(line.home, line.product, probes, settings) if probes else None,
        tolerance=allowed_loss(len(probes), settings.learn.probe_loss),
    )


def settled_update(line: Line, round_: Round) -> Applied | None:
    """Return what became of the round's update where a kill came after that and before the round was closed."""
    file, slots = line.home / UPDATE, Slots(line.station)
    if round_.result is None or not file.is_file():
        return None
    try:
        update = decode_update(file.read_bytes(), line.key, line.settings.learn.max_frame_bytes)
    except Refused:  # applying it will say why
        return None
    entries = [entry for entry in slots.pointer.history if entry["version"] == update.version]
    if not entries:
        return None
    note = entries[-1]
    if note["what"] not in ("applied", "refused") or note["sha256"] != update.new_sha256:
        return None
    kept = note["what"] == "applied"
    return Applied(update.version, slots.current(), note.get("before"), note.get("after"), kept=kept)
