"""The teacher: what the cloud does with a line's samples. It forms opinions, and teaches its copy of the station.

People's labels win over the cloud's model, wherever they come from: beside the sample, or from a list on the cloud's
side. What the model says counts when it is sure enough (``learn.min_teacher``); how it is asked, see
:mod:`saec.learn.judged`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saec.cloud.desk import Judge, Name
from saec.config import LearnSettings, Settings
from saec.edge.station import read_manifest
from saec.errors import BadInput, first_problem
from saec.fleet.frame import Frame
from saec.fleet.slots import current_folder
from saec.learn.growth import Lesson
from saec.learn.judged import Judged, Opinions, Progress, Read
from saec.learn.rulings import Ruling
from saec.learn.samples import Sample, decode_sample
from saec.learn.state import State, station_state, write_station
from saec.learn.teaching import Without, lessons_of, teach
from saec.types import Image

logger = logging.getLogger(__name__)

Level = Annotated[float, Field(gt=0, allow_inf_nan=False)]

HOME, STATIONS = "teacher", "stations"
"""The teacher's folder in the desk's, and what lies there beside opinions and people's labels."""

NOTHING_NEW = "the station had learnt all of it before"

LESSONS = 4
"""Images of the service's largest size (``serve.max_pixels``) that lessons of one job may fill memory with: by default
200 MB, which 60 samples of 1024 x 1024 pixels take. Parts beyond that are not taught, and come again with the line's
next round."""

_COPIES = 16
"""States of stations that are kept; the oldest go."""


class Request(BaseModel):
    """What a line asks of the cloud. ``frames`` names its samples; ``state`` is the SHA-256 of the product's state that
    is to be taught, ``None`` where opinions are all that is wanted; the update makes ``version`` of ``previous``;
    ``background`` is that of good parts' maps, usually and at most."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    product: str = Field(min_length=1, max_length=256)
    frames: tuple[Name, ...] = Field(max_length=10_000)
    state: Name | None = None
    version: int = Field(1, ge=1)
    previous: int = Field(0, ge=0)
    background: tuple[Level, Level] | None = None
    learn: LearnSettings = LearnSettings()
    without: tuple[Without, ...] = ()


class Teacher:
    """Does the jobs of a :class:`saec.learn.desk.FolderDesk`. What it has said about a frame it says again."""

    def __init__(self, home: Path, settings: Settings, *, station: Path | None = None) -> None:
        """Keep opinions and copies of the line's station in ``home``.

        Args:
            home: a folder of its own. People may put their labels there (:data:`saec.learn.judged.LABELS`).
            settings: the service's.
            station: a copy of the line's station; without one the line gets opinions and teaches itself.

        Raises:
            BadInput: the opinions kept so far, or the station, cannot be read.
        """
        self._home, self._settings, self._station = home, settings, station
        home.mkdir(parents=True, exist_ok=True)
        self._opinions = Opinions(home)
        if station is not None:
            read_manifest(station)

    def __call__(
        self, tree: Mapping[str, Any], frame_of: Callable[[str], Frame], judge: Judge, progress: Progress
    ) -> Mapping[str, Any]:
        """Do one job: a :class:`saec.learn.desk.JobRunner`.

        Returns ``opinions``; where some samples have none because something failed, ``failed``, their number, and
        ``failure``, the first reason; an ``update`` where there is something to teach and the station is here, or
        ``nothing``: why there is none.

        Raises:
            BadInput: the request breaks the contract, no sample at all could be judged, or the station is damaged.
        """
        try:
            request = Request.model_validate(tree)
        except ValidationError as error:
            raise BadInput("not a request to learn", where=first_problem(error)) from None
        most = self._settings.serve.max_pixels

        def read(name: str) -> Sample:
            return decode_sample(frame_of(name), max_pixels=most)

        judged = self._opinions.on(
            request.frames, read, judge, usual=request.background, most_pixels=most, progress=progress
        )
        _check_judged(judged)
        result: dict[str, Any] = {"opinions": [asdict(each) for each in judged.rulings]}
        if judged.failures:
            result |= {"failed": judged.failures, "failure": judged.failure}
        folder = self._copy_of(request)
        if folder is None:
            return result
        lessons = lessons_of(judged.rulings, _images(read, LESSONS * most), request.learn)
        return result | (self._taught(folder, request, lessons, judged.rulings, progress) if lessons else {})

    def _taught(
        self,
        folder: Path,
        request: Request,
        lessons: Sequence[Lesson],
        rulings: Sequence[Ruling],
        progress: Progress,
    ) -> dict[str, Any]:
        """Teach the copy of the station; return the update, or why there is none."""
        token = self._settings.serve.token
        taught = teach(
            folder,
            request.product,
            lessons,
            self._settings.model_copy(update={"learn": _within(request.learn, self._settings.learn)}),
            version=request.version,
            previous=request.previous,
            key=None if token is None else token.encode(),
            without=request.without,
            provenance={"teachers": sorted({each.model_id or each.who for each in rulings}), "taught": "cloud"},
            progress=lambda _, done, total: progress(done, total),
        )
        if taught is None:
            return {"nothing": NOTHING_NEW}
        update, state = taught
        self._keep_copy(folder, request.product, state)
        return {"update": update}

    def _copy_of(self, request: Request) -> Path | None:
        """Return the folder of a station whose product has the state that the line has; ``None``: there is none here,
        and the line teaches itself."""
        if request.state is None:
            return None
        taught = self._home / STATIONS / request.state
        if taught.is_dir():
            return taught
        given = None if self._station is None else current_folder(self._station)
        if given is None or request.product not in read_manifest(given).products:
            return None
        return given if station_state(given, request.product).sha256 == request.state else None

    def _keep_copy(self, base: Path, product: str, state: State) -> None:
        copies = self._home / STATIONS
        copies.mkdir(exist_ok=True)
        write_station(base, {product: state}, copies / state.sha256)
        for old in sorted(copies.glob("[!.]*"), key=lambda folder: folder.stat().st_mtime)[:-_COPIES]:
            shutil.rmtree(old)


def _check_judged(judged: Judged) -> None:
    if judged.failures and not judged.rulings:
        what = f"none of the {judged.failures} samples could be judged; the first: {judged.failure}"
        raise BadInput(what, fix="see the service's log")


def _within(asked: LearnSettings, own: LearnSettings) -> LearnSettings:
    """Return the line's settings, within what this service's own allow: a request must not set its limits."""
    limits = ("bank_rows", "bank_most", "samples", "max_frame_bytes", "outbox_bytes", "desk_bytes")
    return asked.model_copy(update={name: min(getattr(asked, name), getattr(own, name)) for name in limits})


def _images(read: Read, most_pixels: int) -> Callable[[Ruling], Image | None]:
    """Return what reads the image of a ruling's sample, ``None`` once ``most_pixels`` were read."""
    left = most_pixels

    def image_of(ruling: Ruling) -> Image | None:
        nonlocal left
        image = read(ruling.frame).query.image if left > 0 else None
        if image is not None:
            left -= image.shape[0] * image.shape[1]
            if left <= 0:
                logger.warning("lessons fill %d pixels; further parts wait for the line's next round", most_pixels)
        return image

    return image_of
