"""A station that takes up its next version while it runs, between two parts, and goes back the same way.

Whether there is one is asked at most once a second, at the price of a ``stat``; it is loaded beside the work, so that
no part waits for it. A version that cannot be loaded is reported, and the one at work goes on.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from saec.calibrate.calibration import Calibration
from saec.calibrate.fusion import Fusion
from saec.calibrate.policy import Policy
from saec.config import RouteSettings, Settings
from saec.edge.station import Station, StationManifest, names_of, read_manifest
from saec.errors import BadInput
from saec.fleet.slots import VERSION_ROLE, Slots, Version
from saec.types import EdgeResult, Image

logger = logging.getLogger(__name__)

EVERY_S = 1.0
"""Shortest time between two looks at the pointer, in seconds."""


@dataclass(frozen=True, slots=True, eq=False)
class _Serving:
    """The version that judges now, replaced as a whole."""

    version: Version
    station: Station


def judge_of(models: Mapping[str, str]) -> tuple[str, str]:
    """Return which part of a verdict's ``models`` says what version of which station judged."""
    return models.get("edge", ""), models.get(VERSION_ROLE, "")


def judges_of(root: Path) -> dict[tuple[str, str], Version]:
    """Return the versions of a station that are here, by :func:`judge_of` of the verdicts that they have made.

    One that was followed (``saec inspect``) goes by what was fitted and its version; one that was loaded for itself
    (``saec evaluate``) by its own hash: another version is another evaluation, and no run goes on with it.

    Raises:
        BadInput: the station or its slots are damaged, or there is none.
    """
    slots, fitted = Slots(root), read_manifest(root)
    found: dict[tuple[str, str], Version] = {}
    for version in slots.kept():
        own = read_manifest(slots.folder_of(version))
        found.setdefault(judge_of(names_of(own.detector, own.sha256, Version())), version)
        found[judge_of(names_of(own.detector, fitted.sha256, version))] = version
    return found


class HotStation:
    """The versions of one station behind the pipeline's ``Edge`` protocol. ``predict`` is called from one thread; what
    the other methods say right after it is of the version that judged."""

    def __init__(
        self, root: Path, settings: Settings, *, clock: Callable[[], float] = time.monotonic, every_s: float = EVERY_S
    ) -> None:
        """Load the version that counts.

        Raises:
            BadInput: none there, damaged, or of another format.
        """
        self._settings, self._clock, self._every_s = settings, clock, every_s
        self._slots = Slots(root)
        self._identity = read_manifest(root).sha256
        self._mark, self._looked = self._slots.mark(), clock()
        self._serving = self._load()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="saec-version")
        self._loading: Future[_Serving] | None = None

    @property
    def models(self) -> Mapping[str, str]:
        """What judges now, see :func:`names_of`."""
        return names_of(self._serving.station.manifest.detector, self._identity, self._serving.version)

    @property
    def products(self) -> tuple[str, ...]:
        """Names of the products it can judge."""
        return self._serving.station.products

    @property
    def manifest(self) -> StationManifest:
        """What the version says about itself."""
        return self._serving.station.manifest

    def predict(self, image: Image, product: str) -> EdgeResult:
        """Judge one image with the newest version that is loaded; see :meth:`Station.predict`."""
        self._follow()
        return self._serving.station.predict(image, product)

    def policy(self, product: str) -> Policy:
        """Return how this product is routed."""
        return self._serving.station.policy(product)

    def fusion(self, product: str) -> Fusion | None:
        """Return how the cloud's opinion is fused with the edge's."""
        return self._serving.station.fusion(product)

    def references(self, product: str) -> Sequence[Image]:
        """Return images of good parts to show the cloud."""
        return self._serving.station.references(product)

    def calibration(self, product: str) -> Calibration:
        """Return the operating point of a product."""
        return self._serving.station.calibration(product)

    def with_route(self, route: RouteSettings) -> Self:
        """Return the same station under other routing settings."""
        other = copy.copy(self)
        other._settings = self._settings.model_copy(update={"route": route})
        other._serving = replace(self._serving, station=self._serving.station.with_route(route))
        return other

    def _follow(self) -> None:
        if self._loading is not None:
            if self._loading.done():
                self._take(self._loading)
            return
        now = self._clock()
        if now - self._looked < self._every_s:
            return
        self._looked = now
        mark = self._slots.mark()
        if mark != self._mark:
            self._mark = mark
            self._loading = self._loader.submit(self._load)

    def _take(self, loading: Future[_Serving]) -> None:
        self._loading = None
        try:
            self._serving = loading.result()
        except BadInput as error:
            logger.warning("the new version cannot be loaded, the one at work goes on: %s", error)

    def _load(self) -> _Serving:
        version = self._slots.pointer.current
        return _Serving(version, Station.load(self._slots.root, settings=self._settings, version=version))
