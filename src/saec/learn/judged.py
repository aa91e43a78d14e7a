"""What is said about a job's samples: people's word, else the model's, asked once; and how the model is asked.

An anomaly map is relative to what good parts of the calibration looked like; after a change of product or light all
maps are hot, and a model that has learnt what hot means calls every part defect (ELPV, mono to poly: AUROC 0.47).
Relative to the samples' own background they mean what they always meant (0.92).

Samples are decoded when they are needed and let go of: a job names up to ten thousand, and a JPEG of a few kilobytes
can hold an image of tens of megabytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from saec.cloud.desk import Judge
from saec.fleet.frame import BadFrame
from saec.learn.rulings import OPINIONS, Ruling, append_rulings, open_rulings, read_labels
from saec.learn.samples import Sample, background
from saec.types import Label, Opinion, Query

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""``(done, total)``."""

Read = Callable[[str], Sample]
"""Decodes the sample in a frame, given by name."""

LABELS = "labels.csv"
"""People's labels, beside the opinions; may be changed at any time."""

_AT_ONCE = 8


@dataclass(slots=True)
class Judged:
    """Opinions in the samples' order, how many samples have none because something failed, and what failed first."""

    rulings: list[Ruling] = field(default_factory=list)
    failures: int = 0
    failure: str | None = None

    def fail(self, name: str, error: Exception) -> None:
        """Count a sample without an opinion."""
        what = str(error) or type(error).__name__
        logger.warning("no opinion on sample %s: %s", name[:12], what)
        self.failures += 1
        self.failure = self.failure or what


@dataclass(frozen=True, slots=True)
class _About:
    """What is kept of a sample while its image is not at hand; ``level`` is its map's background."""

    sha256: str
    part_id: str
    human: Label | None
    p_cloud: float | None
    level: float | None
    pixels: int


class Opinions:
    """The opinions kept in a folder. What was said about a frame is said again, without asking."""

    def __init__(self, home: Path) -> None:
        """Read what was said so far.

        Raises:
            BadInput: the file cannot be read.
        """
        self._home = home
        self._known = {_key(each): each for each in open_rulings(home / OPINIONS)}

    def on(
        self,
        names: Sequence[str],
        read: Read,
        judge: Judge,
        *,
        usual: tuple[float, float] | None,
        most_pixels: int,
        progress: Progress,
    ) -> Judged:
        """Return what is said about samples, and keep it.

        Args:
            names: of their frames.
            read: decodes one.
            judge: the service's model.
            usual: background of good parts' maps, usually and at most.
            most_pixels: of images that are decoded at once, but for a single larger one.
            progress: of the questions.

        Raises:
            BadInput: the list of people's labels cannot be read.
            OSError: the disk refuses.
        """
        judged = Judged()
        samples = dict(self._looked_at(names, read, judged, progress))
        scale = _scale((about.level for about in samples.values()), usual)
        file = self._home / LABELS
        labels = read_labels(file) if file.is_file() else {}
        found = {name: _human(name, about, labels) or self._said(name, scale) for name, about in samples.items()}
        silent = [name for name, ruling in found.items() if ruling is None]
        done = 0
        for some in _batches(silent, samples, most_pixels):
            answers = judge([shown(read(name).query, scale) for name in some])
            for name, answer in zip(some, answers, strict=True):
                if isinstance(answer, Opinion):
                    found[name] = _ruling(name, samples[name], answer, scale)
                else:
                    judged.fail(name, answer)
            done += len(some)
            progress(done, len(silent))
        judged.rulings = [each for each in found.values() if each is not None]
        self._keep(judged.rulings)
        return judged

    def _looked_at(
        self, names: Sequence[str], read: Read, judged: Judged, progress: Progress
    ) -> Iterator[tuple[str, _About]]:
        for name in names:
            progress(0, len(names))
            try:
                sample = read(name)
            except BadFrame as error:  # one that cannot be used must not keep the others from being judged
                judged.fail(name, error)
                continue
            heatmap, image = sample.query.anomaly_map, sample.query.image
            level = None if heatmap is None else background(heatmap)
            pixels = 0 if image is None else image.shape[0] * image.shape[1]
            yield name, _About(sample.sha256, sample.query.part_id, sample.human, sample.p_cloud, level, pixels)

    def _said(self, name: str, scale: float) -> Ruling | None:
        return self._known.get((name, "model", round(scale, 6)))

    def _keep(self, rulings: Sequence[Ruling]) -> None:
        before = {key: each.p_defect for key, each in self._known.items()}
        fresh = [each for each in rulings if before.get(_key(each)) != each.p_defect]  # people may change their word
        append_rulings(self._home / OPINIONS, fresh)
        self._known |= {_key(each): each for each in fresh}


def shown(query: Query, scale: float) -> Query:
    """Return the question with its map in those units; what the edge made of the part is not said, it may be beside the
    point."""
    heatmap = query.anomaly_map
    cooled = None if heatmap is None else np.asarray(heatmap / np.float32(scale), dtype=np.float32)
    return replace(query, anomaly_map=cooled, edge_p_defect=None)


def _batches(names: Sequence[str], samples: Mapping[str, _About], most_pixels: int) -> Iterator[list[str]]:
    """Yield the names in order, as many at a time as the model is asked about at once and as fit into memory."""
    some: list[str] = []
    pixels = 0
    for name in names:
        more = samples[name].pixels
        if some and (len(some) == _AT_ONCE or pixels + more > most_pixels):
            yield some
            some, pixels = [], 0
        some.append(name)
        pixels += more
    if some:
        yield some


def _scale(levels: Iterable[float | None], usual: tuple[float, float] | None) -> float:
    """Return by how much the samples' maps are hotter than good parts' were, each by its median cell.

    1 where they are no hotter than good parts can be: the least certain parts are a little hotter on any day, and to
    cool their maps then hides defects (ELPV, after the change was learnt: 20 of 21 errors were such).
    """
    known = [level for level in levels if level is not None]
    level = float(np.median(known)) if known else 0.0
    return level / usual[0] if usual is not None and level > usual[1] else 1.0


def _key(ruling: Ruling) -> tuple[str, str, float]:
    return ruling.frame, ruling.who, round(ruling.scale, 6)


def _human(name: str, about: _About, labels: Mapping[str, Label]) -> Ruling | None:
    label = labels.get(about.sha256) or labels.get(about.part_id) or about.human
    if label is None:
        return None
    p = float(label is Label.DEFECT)
    return Ruling(about.sha256, about.part_id, p, "human", "", _now(), name, p_cloud=about.p_cloud)


def _ruling(name: str, about: _About, said: Opinion, scale: float) -> Ruling:
    p = float(said.p_defect)
    return Ruling(about.sha256, about.part_id, p, "model", said.model_id, _now(), name, scale)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
