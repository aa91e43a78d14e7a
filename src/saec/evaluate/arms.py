"""Baselines and ablations on the same parts: edge only, cloud only, random routing at the same ratio, the cascade.

Also the record of both arms on every part, from which any threshold can be tried afterwards (SAEC, §5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from saec.calibrate import Arms, Calibration, Fusion, SweepPoint, threshold_sweep
from saec.calibrate.policy import Mode, Policy
from saec.calibrate.sweep import SCENE_QUANTILES
from saec.config import RouteSettings, Settings
from saec.errors import BadInput
from saec.evaluate.run_record import ASK_ALWAYS, StationRecord
from saec.evaluate.runner import Station
from saec.evaluate.table import Cell, Table
from saec.types import EdgeResult, Image, Label, Verdict

ARMS: Mapping[str, Mode] = {
    "edge-only": "edge_only",
    "cloud-only": "cloud_only",
    "cascade": "cascade",
    "random": "random",
}
"""Name of a run's folder and its routing mode. Random comes last: its ratio is the cascade's."""


def arm_settings(settings: Settings, mode: Mode, *, ratio: float | None = None) -> Settings:
    """Return the settings with another routing mode; ``ratio`` is the escalated share of random routing."""
    changes: dict[str, Any] = {"mode": mode} if ratio is None else {"mode": mode, "random_ratio": ratio}
    return settings.model_copy(update={"route": settings.route.model_copy(update=changes)})


def escalated_share(summary: Mapping[str, Any]) -> float | None:
    """Return the share of the parts that the cloud was asked about, ``None`` for no parts."""
    routing, n = summary["routing"], summary["n"]
    return (routing["cloud"] + routing["fallback"]) / n if n else None


def comparison(summaries: Mapping[str, Mapping[str, Any]], *, title: str = "Comparison") -> Table:
    """Return one column for each named run and one row for each figure, so that it fits a narrow terminal."""
    found = [(name, {run: value(s) for run, s in summaries.items()}) for name, value in COMPARED]
    # What no run has measured, such as energy where there is no counter, is no figure to compare.
    rows: list[Mapping[str, Cell]] = [{"": name, **row} for name, row in found if set(row.values()) != {None}]
    fallbacks = sum(s["routing"]["fallback"] for s in summaries.values())
    notes = ["local verdict: from taking a part up until its own verdict is recorded, whatever the cloud does"]
    if fallbacks:
        notes.append(f"{fallbacks} questions came to nothing; the edge's verdict stood (reasons in summary.json)")
    return Table(title, ("", *summaries), rows, notes)


def _percent(rate: float | None) -> str | None:
    return None if rate is None else f"{rate:.1%}"


def _uplink_mb(s: Mapping[str, Any]) -> float:
    return round(float(s["uplink_bytes"]) / 1e6, 2)


COMPARED: Sequence[tuple[str, Callable[[Mapping[str, Any]], Cell]]] = (
    ("accuracy", lambda s: _percent(s["accuracy"])),
    ("balanced accuracy", lambda s: _percent(s["balanced_accuracy"])),
    ("AUROC", lambda s: None if s["auroc"] is None else f"{s['auroc']:.4f}"),
    ("escape (defects passed)", lambda s: _percent(s["escape_rate"])),
    ("overkill (good rejected)", lambda s: _percent(s["overkill_rate"])),
    ("put to the cloud", lambda s: _percent(escalated_share(s))),
    ("wall time, s", lambda s: s["time"]["wall_s"]),
    ("local verdict p50, ms", lambda s: s["latency_ms"]["p50"]),
    ("local verdict p99, ms", lambda s: s["latency_ms"]["p99"]),
    ("uplink, MB", _uplink_mb),
    ("energy, mWh a correct part", lambda s: s["energy"]["mwh_per_correct"]),
)
"""Figures of a comparison and where they are in ``summary.json``."""


class Varied:
    """A station with one thing changed, for a baseline or an ablation; all else is the station's own."""

    def __init__(
        self,
        station: Station,
        marks: Mapping[str, str],
        change: Callable[[Policy], Policy] = lambda policy: policy,
        *,
        fuses: bool = True,
    ) -> None:
        """``marks`` go into every verdict's models: a run folder never mixes these verdicts with the station's own.

        ``change`` is made to every product's policy; without ``fuses`` the cloud's opinion replaces the edge's.
        """
        self._station, self._marks, self._change, self._fuses = station, dict(marks), change, fuses

    @property
    def models(self) -> Mapping[str, str]:
        """The station's, marked."""
        return {**self._station.models, **self._marks}

    @property
    def products(self) -> Sequence[str]:
        """The station's."""
        return self._station.products

    @property
    def manifest(self) -> StationRecord:
        """The station's."""
        return self._station.manifest

    def predict(self, image: Image, product: str) -> EdgeResult:
        """Judge one image as the station does."""
        return self._station.predict(image, product)

    def policy(self, product: str) -> Policy:
        """Return the station's policy with the change made."""
        return self._change(self._station.policy(product))

    def fusion(self, product: str) -> Fusion | None:
        """The station's, or none."""
        return self._station.fusion(product) if self._fuses else None

    def references(self, product: str) -> Sequence[Image]:
        """The station's."""
        return self._station.references(product)

    def calibration(self, product: str) -> Calibration:
        """The station's."""
        return self._station.calibration(product)

    def with_route(self, route: RouteSettings) -> Self:
        """Return the same with the station under other routing settings."""
        twin = copy(self)
        twin._station = self._station.with_route(route)
        return twin


class AskAlways(Varied):
    """A station under which the cascade asks the cloud about every part, for the scene score and both opinions."""

    def __init__(self, station: Station) -> None:
        """Put every P(defect) into the band, whatever the routing mode."""
        super().__init__(station, {"router": ASK_ALWAYS}, _everything_in_band)


def _everything_in_band(policy: Policy) -> Policy:
    return replace(policy, mode="cascade", thresholds=replace(policy.thresholds, band_low=0.0, band_high=1.0))


@dataclass(frozen=True, slots=True)
class Sweep:
    """Points over all products, and for each product alone. A pooled ``tau_scene`` is the mean of the products'."""

    points: tuple[SweepPoint, ...]
    per_product: Mapping[str, tuple[SweepPoint, ...]]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "points": [asdict(point) for point in self.points],
            "per_product": {name: [asdict(point) for point in found] for name, found in self.per_product.items()},
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any], *, where: object) -> Self:
        """Rebuild from :meth:`to_json`'s output.

        Raises:
            BadInput: not that.
        """
        try:
            return cls(
                tuple(SweepPoint(**point) for point in tree["points"]),
                {name: tuple(SweepPoint(**point) for point in found) for name, found in tree["per_product"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"not a sweep ({error})", where=where, fix="run saec sweep again") from None

    def table(self) -> Table:
        """Return one row for each setting of each knob."""
        rows: list[Mapping[str, Cell]] = []
        for i, point in enumerate(self.points):
            by_scene = point.knob == "tau_scene"
            rows.append(
                {
                    "setting": f"scene over q{SCENE_QUANTILES[i]:.0%}" if by_scene else f"at most {point.value:.0%}",
                    "to cloud": _percent(point.escalation),
                    "accuracy": _percent(point.accuracy),
                    "balanced": _percent(point.balanced_accuracy),
                    "escape": _percent(point.escape_rate),
                    "overkill": _percent(point.overkill_rate),
                    "cloud s": None if point.cloud_s is None else round(point.cloud_s, 1),
                }
            )
        notes = (
            "scene over q30%: beside the unsure parts, all but the 30% simplest scenes go to the cloud",
            "at most 30%: the parts closest to the decision threshold, up to this share, and nothing else",
            "computed from the recorded answers of both arms; cloud s: escalated parts x measured seconds of one",
            "chosen on these very parts: this describes them, it is no way to set a threshold",
        )
        return Table(f"Sweep over {self.points[0].n} parts", tuple(rows[0]), rows, notes)


def sweep(verdicts: Iterable[Verdict], station: Station, *, cloud_seconds: float | None) -> Sweep:
    """Return what other thresholds would have done, from a run with :class:`AskAlways`.

    Args:
        verdicts: of that run; those without truth, scene score or edge score are left out.
        station: whose thresholds and fusion are varied, product by product.
        cloud_seconds: measured cloud time of one part.

    Raises:
        BadInput: no verdict with a known truth.
    """
    groups: dict[str, list[Verdict]] = {}
    for v in verdicts:
        judged = v.scene_score is not None and v.edge_p_defect is not None
        if judged and v.truth in (Label.GOOD, Label.DEFECT):
            groups.setdefault(v.product, []).append(v)
    if not groups:
        raise BadInput("no part with a known label was judged", fix="pass a folder with good/ and defect/")
    per_product = {
        name: _sweep_product(groups[name], station, name, cloud_seconds) for name in station.products if name in groups
    }
    counts = [_counts(groups[name]) for name in per_product]
    points = tuple(_pool(each, counts) for each in zip(*per_product.values(), strict=True))
    return Sweep(points, per_product)


def _sweep_product(
    found: Sequence[Verdict], station: Station, product: str, cloud_seconds: float | None
) -> tuple[SweepPoint, ...]:
    arms = Arms(
        scene=_vector(v.scene_score for v in found),
        p_edge=_vector(v.edge_p_defect for v in found),
        p_cloud=_vector(v.cloud_p_defect for v in found),
        truth=[v.truth is Label.DEFECT for v in found],
        cloud_seconds=cloud_seconds,
    )
    thresholds = station.policy(product).thresholds
    # Without a fusion the cloud replaces the edge at its own threshold, as in the router.
    fusion = station.fusion(product) or Fusion.replace_at(thresholds.tau_cloud)
    return threshold_sweep(arms, thresholds, fusion)


def _vector(values: Iterable[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values])


def _counts(found: Sequence[Verdict]) -> tuple[int, int]:
    defects = sum(v.truth is Label.DEFECT for v in found)
    return len(found) - defects, defects


def _pool(points: Sequence[SweepPoint], counts: Sequence[tuple[int, int]]) -> SweepPoint:
    """Join one setting's points of several products, each with (good parts, defects) of ``counts``."""
    n = [point.n for point in points]
    escape = _mean([point.escape_rate for point in points], [defects for _, defects in counts])
    overkill = _mean([point.overkill_rate for point in points], [goods for goods, _ in counts])
    seconds = [point.cloud_s for point in points if point.cloud_s is not None]
    return SweepPoint(
        knob=points[0].knob,
        value=_mean([point.value for point in points], n) or 0.0,
        n=sum(n),
        accuracy=_mean([point.accuracy for point in points], n) or 0.0,
        balanced_accuracy=None if escape is None or overkill is None else 1 - (escape + overkill) / 2,
        escape_rate=escape,
        overkill_rate=overkill,
        escalation=_mean([point.escalation for point in points], n) or 0.0,
        cloud_s=sum(seconds) if len(seconds) == len(points) else None,
    )


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None
