"""The teacher: what the cloud does with a line's samples. It forms opinions, and teaches its copy of the station.

People's labels win over the cloud's model, wherever they come from: beside the sample, or from a list on the cloud's
side. What the model says counts when it is sure enough (``learn.min_teacher``).

How the model is asked matters. An anomaly map is relative to what good parts of the calibration looked like; after a
change of product or light all maps are hot, and a model that has learnt what hot means calls every part defect (ELPV,
mono to poly: AUROC 0.47). Relative to the samples' own background they mean what they always meant (0.92).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saec.cloud.desk import Judge, Name
from saec.config import LearnSettings, Settings
from saec.edge.station import read_manifest
from saec.errors import BadInput, first_problem
from saec.fleet.frame import Frame
from saec.fleet.slots import current_folder
from saec.learn.rulings import OPINIONS, Ruling, append_rulings, open_rulings, read_labels
from saec.learn.samples import Sample, background, decode_sample
from saec.learn.state import State, station_state, write_station
from saec.learn.teaching import Without, lessons_of, teach
from saec.types import Image, Label, Opinion, Query

Progress = Callable[[int, int], None]
"""``(done, total)``."""

Level = Annotated[float, Field(gt=0, allow_inf_nan=False)]

HOME, STATIONS, LABELS = "teacher", "stations", "labels.csv"
"""The teacher's folder in the desk's, and what lies there."""

_AT_ONCE = 8
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

    def __init__(
        self,
        home: Path,
        settings: Settings,
        *,
        station: Path | None = None,
    ) -> None:
        """Keep opinions and copies of the line's station in ``home``.

        Args:
            home: a folder of its own. People may put a :data:`LABELS` there, and change it at any time.
            settings: the service's.
            station: a copy of the line's station; without one the line gets opinions and teaches itself.

        Raises:
            BadInput: the opinions kept so far, or the station, cannot be read.
        """
        self._home, self._settings, self._station = home, settings, station
        home.mkdir(parents=True, exist_ok=True)
        self._known = {_key(each): each for each in open_rulings(home / OPINIONS)}
        if station is not None:
            read_manifest(station)

    def __call__(
        self, tree: Mapping[str, Any], frame_of: Callable[[str], Frame], judge: Judge, progress: Progress
    ) -> Mapping[str, Any]:
        """Do one job: a :class:`saec.learn.desk.JobRunner`. Returns opinions, and an update where there is something
        to teach and the station is here.

        Raises:
            BadInput: the request breaks the contract, or the station is damaged.
            BadFrame: a sample breaks the contract.
        """
        try:
            request = Request.model_validate(tree)
        except ValidationError as error:
            raise BadInput("not a request to learn", where=first_problem(error)) from None
        most = self._settings.serve.max_pixels
        samples = {name: decode_sample(frame_of(name), max_pixels=most) for name in request.frames}
        rulings = self._ruled(samples, judge, request.background, progress)
        result: dict[str, Any] = {"opinions": [asdict(each) for each in rulings]}
        folder = self._copy_of(request)
        if folder is None:
            return result

        def image_of(ruling: Ruling) -> Image | None:
            return samples[ruling.frame].query.image

        lessons = lessons_of(rulings, image_of, request.learn)
        if lessons:
            # As the line's own settings say, but for what this service allows itself.
            settings = self._settings.model_copy(update={"learn": request.learn})
            token = self._settings.serve.token
            update, state = teach(
                folder,
                request.product,
                lessons,
                settings,
                version=request.version,
                previous=request.previous,
                key=None if token is None else token.encode(),
                without=request.without,
                provenance={"teachers": sorted({each.model_id or each.who for each in rulings}), "taught": "cloud"},
                progress=lambda _, done, total: progress(done, total),
            )
            self._keep_copy(folder, request.product, state)
            result["update"] = update
        return result

    def _ruled(
        self, samples: Mapping[str, Sample], judge: Judge, usual: tuple[float, float] | None, progress: Progress
    ) -> list[Ruling]:
        """Return an opinion on each sample, in order, but for those that the model has none on."""
        scale = _scale(samples.values(), usual)
        file = self._home / LABELS
        labels = read_labels(file) if file.is_file() else {}
        found = {name: _human(name, sample, labels) or self._said(name, scale) for name, sample in samples.items()}
        silent = [name for name, ruling in found.items() if ruling is None]
        for start in range(0, len(silent), _AT_ONCE):
            names = silent[start : start + _AT_ONCE]
            answers = judge([shown(samples[name].query, scale) for name in names])
            for name, answer in zip(names, answers, strict=True):
                if isinstance(answer, Opinion):
                    found[name] = _ruling(name, samples[name], float(answer.p_defect), answer.model_id, scale)
            progress(start + len(names), len(silent))
        ruled = [each for each in found.values() if each is not None]
        fresh = [each for each in ruled if _key(each) not in self._known]
        append_rulings(self._home / OPINIONS, fresh)
        self._known |= {_key(each): each for each in fresh}
        return ruled

    def _said(self, name: str, scale: float) -> Ruling | None:
        return self._known.get((name, "model", round(scale, 6)))

    def _copy_of(self, request: Request) -> Path | None:
        """Return the folder of a station whose product has the state that the line has."""
        if request.state is None:
            return None
        taught = self._home / STATIONS / request.state
        if taught.is_dir():
            return taught
        given = None if self._station is None else current_folder(self._station)
        return given if given and station_state(given, request.product).sha256 == request.state else None

    def _keep_copy(self, base: Path, product: str, state: State) -> None:
        copies = self._home / STATIONS
        copies.mkdir(exist_ok=True)
        write_station(base, {product: state}, copies / state.sha256)
        for old in sorted(copies.glob("[!.]*"), key=lambda folder: folder.stat().st_mtime)[:-_COPIES]:
            shutil.rmtree(old)


def _key(ruling: Ruling) -> tuple[str, str, float]:
    return ruling.frame, ruling.who, round(ruling.scale, 6)


def _human(name: str, sample: Sample, labels: Mapping[str, Label]) -> Ruling | None:
    label = labels.get(sample.sha256) or labels.get(sample.query.part_id) or sample.human
    if label is None:
        return None
    p = float(label is Label.DEFECT)
    return Ruling(sample.sha256, sample.query.part_id, p, "human", "", _now(), name, p_cloud=sample.p_cloud)


def _scale(samples: Iterable[Sample], usual: tuple[float, float] | None) -> float:
    """Return by how much the samples' maps are hotter than good parts' were, each by its median cell.

    1 where they are no hotter than good parts can be: the least certain parts are a little hotter on any day, and to
    cool their maps then hides defects (ELPV, after the change was learnt: 20 of 21 errors were such).
    """
    levels = [background(sample.query.anomaly_map) for sample in samples if sample.query.anomaly_map is not None]
    level = float(np.median(levels)) if levels else 0.0
    return level / usual[0] if usual is not None and level > usual[1] else 1.0


def shown(query: Query, scale: float) -> Query:
    """Return the question in those units; what the edge made of the part is not said, it may be beside the point."""
    heatmap = query.anomaly_map
    shown = None if heatmap is None else np.asarray(heatmap / np.float32(scale), dtype=np.float32)
    return replace(query, anomaly_map=shown, edge_p_defect=None)


def _ruling(name: str, sample: Sample, p: float, model_id: str, scale: float) -> Ruling:
    return Ruling(sample.sha256, sample.query.part_id, p, "model", model_id, _now(), name, scale)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
