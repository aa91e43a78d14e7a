"""From opinions to an update: lessons, the taught detector, and its change, compressed and checked.

The same on either side: in the cloud, where images go up, and on the line, where only tokens or crops do. So an update
always comes as a frame, is proven on the probe set, and can be taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saec.config import LearnSettings, Settings
from saec.edge.fitters import Progress
from saec.edge.replay import Replay
from saec.edge.station import ProductModel, Station, folder_name, station_files
from saec.learn.delta import Delta, compress
from saec.learn.detector import teach_product
from saec.learn.growth import Lesson
from saec.learn.rulings import Ruling
from saec.learn.samples import for_probe
from saec.learn.state import State, state_of_files, station_state
from saec.learn.update import Update, encode_update, product_target
from saec.types import Image

Without = Literal["head", "compression"]
"""What an ablation switches off: the head beside the bank, or the update's compression."""


def lessons_of(
    rulings: Iterable[Ruling], images: Callable[[Ruling], Image | None], settings: LearnSettings
) -> list[Lesson]:
    """Return what is taught: people's labels, and the model's where it is sure enough; never a part of the probe set.

    ``images`` returns the part of a ruling, ``None`` where it is gone.
    """
    lessons = []
    for ruling in rulings:
        if for_probe(ruling.sha256) or not counts(ruling, settings):
            continue
        image = images(ruling)
        if image is not None:
            lessons.append(Lesson(ruling.sha256, image, ruling.label, ruling.sure, ruling.p_cloud))
    return lessons


def counts(ruling: Ruling, settings: LearnSettings) -> bool:
    """Return whether an opinion is sure enough to learn from; a person's always is."""
    return ruling.sure > 0.5 and ruling.sure >= settings.min_teacher


def teach(
    folder: Path,
    product: str,
    lessons: Sequence[Lesson],
    settings: Settings,
    *,
    version: int,
    previous: int,
    key: bytes | None,
    provenance: Mapping[str, Any],
    without: Collection[Without] = (),
    progress: Progress | None = None,
) -> tuple[bytes, State] | None:
    """Teach the product of a station and return the encoded update, and the state that it decodes to; ``None`` where
    the station has learnt all of it before.

    Args:
        folder: of the station's version that counts.
        product: of it.
        lessons: what is taught.
        settings: ``learn``, ``calibration`` and ``edge`` matter.
        version: of the update.
        previous: version that it is made for.
        key: the service's token, for the update's authentication.
        provenance: goes into the update.
        without: what is switched off, for an ablation.
        progress: of the teaching.

    Raises:
        BadInput: the station is damaged, or cannot be taught.
    """
    before = Station.load(folder, settings=settings).model(product)
    if not _brings_news(before.replay, lessons):
        return None
    base = station_state(folder, product)
    taught = teach_product(before, lessons, settings, progress)
    model = _headless(taught.model, settings) if "head" in without else taught.model
    delta = (dense if "compression" in without else compress)(base, state_of_model(product, model))
    new = delta.apply(base)
    update = Update(
        target=product_target(product),
        base_sha256=base.sha256,
        new_sha256=new.sha256,
        version=version,
        previous=previous,
        delta=delta,
        figures=taught.figures,
        provenance=provenance,
    )
    return encode_update(update, key), new


def _brings_news(old: Replay | None, lessons: Sequence[Lesson]) -> bool:
    """Return whether a part is new, or its label another that is at least as sure: see
    :func:`saec.learn.detector.teach_product`, which also says what is wrong where there is no replay."""
    if old is None:
        return True
    known = dict(zip(old.hashes, old.p_defect.tolist(), strict=True))
    return any(
        lesson.sha256 not in known
        or (lesson.p_defect != (p := known[lesson.sha256]) and lesson.weight >= max(p, 1 - p))
        for lesson in lessons
    )


def state_of_model(product: str, model: ProductModel) -> State:
    """Return the state of a product in memory, as :func:`saec.learn.state.station_state` reads it from its folder."""
    inside = f"{folder_name(product)}/"
    return state_of_files({name.removeprefix(inside): data for name, data in station_files({product: model}).items()})


def dense(base: State, new: State) -> Delta:
    """Return the change as it would go without compression: every tensor whole. The ablation."""
    gone = dict.fromkeys(base.tensors.keys() - new.tensors.keys(), "gone")
    ways = {**gone, **dict.fromkeys(new.tensors, "dense")}
    document = {"set": dict(new.document), "gone": sorted(base.document.keys() - new.document.keys())}
    arrays = {name: np.asarray(value) for name, value in new.tensors.items()}
    return Delta({"ways": ways, "document": document, "sparse": None, "error": 0.0}, arrays)


def _headless(model: ProductModel, settings: Settings) -> ProductModel:
    """Return the model with the bank's score alone, calibrated anew on it. The ablation."""
    if model.replay is None:
        return model
    replay = replace(model.replay, score=model.replay.bank)
    calibration = replay.calibrated(settings.calibration, cross_fitted=True)
    return replace(model, head=None, replay=replay, calibration=replace(calibration, fusion=model.calibration.fusion))
