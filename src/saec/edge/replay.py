"""What a station remembers of the labelled parts that calibrated it, so that it can learn more and forget nothing.

Kept are figures, never images: a later lesson refits the head and the thresholds on old and new parts together
(experience replay; Rolnick et al., NeurIPS 2019). A bank that grew since only lowers a part's score: of ELPV's mono
calibration cells 7-13 % moved by more than 0.1 of 15 after 600 poly patches; the rest did not move at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from saec.calibrate.calibration import MIN_LABELLED, Calibration, CalibrationData, calibrate, content_digest
from saec.config import CalibrationSettings
from saec.edge.head import Bools, Doubles
from saec.types import Observation

MOST = 1000
"""Parts that are remembered at most, 8 KB each; of more, those whose hashes are smallest, which is a fair draw. Of the
others the hash stays, 32 bytes: they have taught, and must not be taught again nor evaluated on unawares."""

_FORGOTTEN = "forgotten"


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """Figures of n held-out parts, one row each.

    Attributes:
        sha256: [n, 32] uint8, the content hashes.
        pooled: [n, D] float16, see :func:`saec.edge.head.pool_features`; D = 0 where nothing can be pooled.
        bank: [n] float64 bank scores by a bank without the part.
        score: [n] float64 raw scores, the head's included, by a head without the part.
        scene: [n] float64 scene scores.
        peak: [n] float64 worst cell of the map, in the bank's units; NaN without maps.
        background: [n] float64 median cell of the map, likewise.
        p_defect: [n] float64 label: 0 good, 1 defect, between where a teacher was not sure.
        p_cloud: [n] float64 the cloud's P(defect), NaN where it was not asked.
        group: [n] int64 numbers near-duplicates alike.
        lesson: [n] uint8, 1 for a part that came after the fit.
        forgotten: [m, 32] uint8, the content hashes of lessons that no row stands for any more, in the order in which
            they were dropped; absent on the disk while m = 0.
    """

    sha256: NDArray[np.uint8]
    pooled: NDArray[np.float16]
    bank: Doubles
    score: Doubles
    scene: Doubles
    peak: Doubles
    background: Doubles
    p_defect: Doubles
    p_cloud: Doubles
    group: NDArray[np.int64]
    lesson: NDArray[np.uint8]
    forgotten: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 32), np.uint8))

    def __len__(self) -> int:
        return len(self.bank)

    @property
    def is_defect(self) -> Bools:
        """[n] which parts count as defects."""
        return np.asarray(self.p_defect >= 0.5)

    @property
    def fit_knew_defects(self) -> bool:
        """Return whether enough labelled defects were there at the fit to tell the first kind's from its good parts."""
        return int((self.is_defect & (self.lesson == 0)).sum()) >= MIN_LABELLED

    @property
    def hashes(self) -> list[str]:
        """The content hashes as hex digits."""
        return _hex(self.sha256)

    @property
    def known(self) -> frozenset[str]:
        """The content hashes of all parts, the forgotten ones included."""
        return frozenset((*self.hashes, *_hex(self.forgotten)))

    @classmethod
    def of(
        cls,
        hashes: Sequence[str],
        pooled: Sequence[Doubles],
        seen: Sequence[Observation],
        scene: Sequence[float],
        p_defect: Sequence[float],
        p_cloud: Sequence[float],
        group: Sequence[int],
        *,
        lesson: bool = False,
    ) -> Self:
        """Make the rows of n parts; ``seen`` are a bank's observations."""
        bank = np.array([one.score for one in seen], dtype=np.float64)
        maps = [np.array([[np.nan]]) if one.heatmap is None else one.heatmap for one in seen]
        return cls(
            sha256=np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(len(hashes), 32).copy(),
            pooled=np.stack(pooled).astype(np.float16),
            bank=bank,
            score=bank,
            scene=np.array(scene, dtype=np.float64),
            peak=np.array([float(heat.max()) for heat in maps]),
            background=np.array([float(np.median(heat)) for heat in maps]),
            p_defect=np.array(p_defect, dtype=np.float64),
            p_cloud=np.array(p_cloud, dtype=np.float64),
            group=np.array(group, dtype=np.int64),
            lesson=np.full(len(hashes), lesson, dtype=np.uint8),
        )

    def rows(self, chosen: NDArray[Any]) -> Self:
        """Return some of the rows, by mask or by index."""
        return type(self)(**{name: value[chosen] for name, value in self._rows().items()}, forgotten=self.forgotten)

    def joined(self, other: Replay) -> Self:
        """Return the rows of both."""
        mine, theirs = self._rows(), other._rows()
        theirs["group"] = theirs["group"] + (int(self.group.max(initial=-1)) + 1)
        both = {name: np.concatenate([mine[name], theirs[name]]) for name in mine}
        return type(self)(**both, forgotten=np.concatenate([self.forgotten, other.forgotten]))

    def capped(self) -> Self:
        """Return at most :data:`MOST` of the rows, in order; lessons among the others are forgotten."""
        order = np.argsort(np.array(self.hashes), kind="stable")
        dropped = np.sort(order[MOST:])
        lessons = self.sha256[dropped[self.lesson[dropped] == 1]]
        kept = self.rows(np.sort(order[:MOST]))
        return replace(kept, forgotten=np.concatenate([self.forgotten, lessons]))

    def calibrated(self, settings: CalibrationSettings, *, cross_fitted: bool) -> Calibration:
        """Return the operating point that these parts give, see :func:`saec.calibrate.calibration.calibrate`.

        The cloud's opinions count where every part has one.
        """
        good, defect = self.rows(~self.is_defect), self.rows(self.is_defect)
        asked = not np.isnan(self.p_cloud).any()
        data = CalibrationData(
            good_scores=good.score,
            good_scene=good.scene,
            defect_scores=defect.score,
            defect_scene=defect.scene,
            cloud_p_good=good.p_cloud if asked else None,
            cloud_p_defect=defect.p_cloud if asked else None,
            data_sha256=content_digest(self.hashes),
            cross_fitted=cross_fitted,
        )
        return calibrate(data, settings)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, for saving."""
        return self._rows() | ({_FORGOTTEN: self.forgotten} if len(self.forgotten) else {})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild from :meth:`tensors`.

        Raises:
            ValueError: an array is missing, is as long as no other, or holds no hashes.
        """
        names = {each.name for each in fields(cls)} - {_FORGOTTEN}
        rows = {name: value for name, value in tensors.items() if name != _FORGOTTEN}
        if set(rows) != names or len({len(value) for value in rows.values()}) != 1:
            raise ValueError("the replay does not hold one row for each part")
        forgotten = tensors.get(_FORGOTTEN, np.empty((0, 32), np.uint8))
        if forgotten.dtype != np.uint8 or forgotten.shape[1:] != (32,):
            raise ValueError("the replay's forgotten parts are no hashes")
        return cls(**rows, forgotten=forgotten)

    def _rows(self) -> dict[str, NDArray[Any]]:
        """Return what has one row for each part."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != _FORGOTTEN}


def _hex(hashes: NDArray[np.uint8]) -> list[str]:
    return [row.tobytes().hex() for row in hashes]
