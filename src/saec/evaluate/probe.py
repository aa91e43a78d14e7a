"""Probe sets: how right a version of a station or an adapter is on labelled parts, before it may count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from saec.cloud.backend import SwapsAdapter
from saec.config import Settings
from saec.data.decode import read_image
from saec.data.readers import read_dataset
from saec.edge.detector import MemoryDetector
from saec.edge.replay import Replay
from saec.edge.station import ProductModel, Station, bank_tensors
from saec.errors import BadInput
from saec.fleet.slots import current_folder
from saec.learn.state import State, digest, write_adapter
from saec.types import Backend, Heatmap, Label, Part, Query

Probe = Callable[[Path], float]
"""Returns the accuracy [0, 1] of what is in a folder."""


class Swaps(Backend, SwapsAdapter, Protocol):
    """A backend that answers with one adapter after the other."""


TAU = 0.5
"""P(defect) from which on a multimodal LLM is taken to call a part a defect."""


def labelled(data: Path, settings: Settings) -> list[Part]:
    """Return the labelled parts of a data set, of its test split where it has splits.

    Raises:
        BadInput: there are none.
    """
    dataset = read_dataset(data, max_pixels=settings.data.max_pixels)
    parts = [part for part in dataset.select(split="test" if dataset.splits else None) if part.label is not None]
    if not parts:
        raise BadInput("no labelled parts", where=data, fix="sort the images into good/ and defect/, or pass a CSV")
    return parts


def station_probe(data: Path, product: str, settings: Settings) -> Probe:
    """Return what measures a product of a station on labelled parts; those of a folder without products are its own.

    Raises:
        BadInput: no such parts.
    """
    every = labelled(data, settings)
    named = {part.product for part in every}
    parts = [part for part in every if part.product == product or len(named) == 1]
    if not parts:
        raise BadInput("no parts of this product", where=data, fix=f"it has {', '.join(sorted(named))}, not {product}")

    def accuracy(folder: Path) -> float:
        station = Station.load(folder, settings=settings)
        tau = station.calibration(product).thresholds.tau_edge
        p = [station.predict(_image(part, settings), product).p_defect for part in parts]
        return _share_right(p, parts, tau)

    return accuracy


def replay_probe(root: Path, product: str, settings: Settings) -> ReplayProbe | None:
    """Return what measures a product on the parts that calibrated its version at work: has it forgotten anything?
    ``None`` for a station that remembers none.

    Raises:
        BadInput: the station is damaged, or does not know the product.
    """
    model = Station.load(current_folder(root), settings=settings).model(product)
    if model.replay is None or not len(model.replay):
        return None
    return ReplayProbe(model, model.replay, product, settings)


class ReplayProbe:
    """A :data:`Probe` from the figures that the version at work remembers: heads and thresholds are asked about its
    pooled features and held-out bank scores, against its labels. Nothing that a new version says of itself counts.

    A bank cannot be asked without images: ``bank_changed`` says whether the last folder had another one. The head at
    work was fitted on these very parts, one more or less of which is chance: ``chance`` is that part's share.
    """

    def __init__(self, model: ProductModel, known: Replay, product: str, settings: Settings) -> None:
        """``model`` is at work and remembers ``known``, at least one part."""
        self._known, self._product, self._settings = known, product, settings
        self._banks = _banks(model)
        self.bank_changed = False
        self.chance = 1 / len(known)

    def __call__(self, folder: Path) -> float:
        """Return the accuracy of the head and the thresholds in a folder."""
        model = Station.load(folder, settings=self._settings).model(self._product)
        self.bank_changed = _banks(model) != self._banks
        with np.errstate(invalid="ignore", over="ignore"):  # what is not a number is counted as wrong
            p_defect = model.calibration.score.p_defect(self._scores(model, folder))
        return _accuracy(p_defect, self._known.is_defect, model.calibration.thresholds.tau_edge)

    def _scores(self, model: ProductModel, folder: Path) -> NDArray[np.float64]:
        rows, head = self._known, model.head
        if head is None:
            return rows.bank
        pooled = rows.pooled.astype(np.float64)
        if pooled.shape[1:] != head.weights.shape:
            raise BadInput("the head does not fit the features", where=folder, fix="ask for another update")
        return np.array([head.score(bank, x) for bank, x in zip(rows.bank, pooled, strict=True)])


def _banks(model: ProductModel) -> str:
    """Return what changes with the banks; a classifier has none."""
    if not isinstance(model.detector, MemoryDetector):
        return ""
    return digest(bank_tensors(model.detector), {}).hex()


class AdapterAnswers:
    """A multimodal LLM's answers to the same questions, with one adapter after the other."""

    def __init__(self, backend: Swaps, questions: Sequence[Callable[[], Query]]) -> None:
        """``questions`` are made when they are asked: their images need not all be in memory."""
        self._backend, self._questions = backend, questions
        self._answered: dict[str, NDArray[np.float64]] = {}

    def p_defect(self, folder: Path) -> NDArray[np.float64]:
        """Return P(defect) of each part with the adapter in ``folder``.

        Raises:
            BadInput: the adapter does not fit the model, or a part cannot be judged.
        """
        self._backend.swap_adapter(folder)
        found = []
        for question in self._questions:
            query = question()
            (answer,) = self._backend.judge([query])
            if isinstance(answer, Exception):
                raise BadInput(f"a part cannot be judged ({answer})", where=query.part_id)
            found.append(answer.p_defect)
        return np.array(found)

    def p_of(self, state: State) -> NDArray[np.float64]:
        """Return the same with an adapter that lies in memory; the same one is not asked twice, which takes minutes."""
        if state.sha256 not in self._answered:
            with TemporaryDirectory(prefix="saec-probe-") as scratch:
                write_adapter(state, Path(scratch) / "adapter")
                self._answered[state.sha256] = self.p_defect(Path(scratch) / "adapter")
        return self._answered[state.sha256]


class AdapterProbe(AdapterAnswers):
    """The questions about labelled parts; called, it is a :data:`Probe`."""

    def __init__(self, backend: Swaps, parts: Sequence[Part], settings: Settings, maps: Station | None) -> None:
        """``maps`` makes the anomaly maps that the questions carry."""
        super().__init__(backend, [partial(self._query, part) for part in parts])
        self.parts, self._settings, self._maps = parts, settings, maps
        self._heat: dict[str, Heatmap | None] = {}

    def __call__(self, folder: Path) -> float:
        """Return the accuracy of an adapter."""
        return _share_right(self.p_defect(folder), self.parts, TAU)

    def loss(self, state: State) -> float:
        """Return the share of wrong answers with an adapter that lies in memory."""
        return 1 - _share_right(self.p_of(state), self.parts, TAU)

    def _query(self, part: Part) -> Query:
        image = _image(part, self._settings)
        if self._maps is not None and part.part_id not in self._heat:
            self._heat[part.part_id] = self._maps.predict(image, part.product).heatmap
        return Query(
            part_id=part.part_id,
            product=part.product,
            image=image,
            original_size=(image.shape[1], image.shape[0]),
            anomaly_map=self._heat.get(part.part_id),
            evidence=False,
        )


def _share_right(p_defect: Sequence[float] | NDArray[np.float64], parts: Sequence[Part], tau: float) -> float:
    return _accuracy(np.asarray(p_defect), np.array([part.label is Label.DEFECT for part in parts]), tau)


def _accuracy(p_defect: NDArray[np.float64], truth: NDArray[np.bool_], tau: float) -> float:
    """Return the share of right labels; no probability at all is never right."""
    return float(np.mean(np.isfinite(p_defect) & ((p_defect >= tau) == truth)))


def _image(part: Part, settings: Settings) -> NDArray[np.uint8]:
    return read_image(part.path, max_pixels=settings.data.max_pixels)
