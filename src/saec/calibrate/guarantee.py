"""What a threshold is proven to do, in words that a quality engineer can check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

from saec.errors import BadInput


@dataclass(frozen=True, slots=True)
class Guarantee:
    """A bound on one error rate of the rule *defect iff score >= threshold*.

    Attributes:
        kind: ``overkill`` (share of good parts called defect) or ``escape`` (share of defects called good).
        threshold: on the raw anomaly score.
        requested: the rate asked for.
        bound: the rate that is proven; at most ``requested`` when ``achieved``.
        confidence: probability, over the draw of the calibration parts, that the bound holds for the parts to come;
            ``None`` for conformal bounds, which hold on average over calibration and test part.
        n: calibration parts of the class the rate is about.
        wrong: how many of them are on the wrong side of the threshold.
        method: ``conformal`` (held-out parts), ``cross-conformal`` (each part scored by a detector fitted without it),
            ``order-statistic`` or ``clopper-pearson``.
        scope: ``edge`` verdicts only, or the final verdicts of the whole ``cascade``, whatever the route.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["overkill", "escape"]
    threshold: float
    requested: float
    bound: float
    confidence: float | None
    n: int
    wrong: int
    method: Literal["conformal", "cross-conformal", "order-statistic", "clopper-pearson"]
    scope: Literal["edge", "cascade"] = "edge"

    @property
    def achieved(self) -> bool:
        """Whether the proven bound is as good as the requested one."""
        return self.bound <= self.requested * (1 + 1e-9)

    @property
    def statement(self) -> str:
        """One sentence for the report."""
        parts = "good parts" if self.kind == "overkill" else "defects"
        if self.method.endswith("conformal") and not self.achieved:
            return f"{self.n} {parts} can prove at best {self.bound:.2%} {self.kind}, {self.requested:.2%} was asked"
        sure = "on average" if self.confidence is None else f"with {self.confidence:.0%} confidence"
        asked = "" if self.achieved else f", above the {self.requested:.2%} asked: the threshold follows the defects"
        return (
            f"at most {self.bound:.2%} {self.kind} of the {self.scope} {sure} ({self.method}, {self.n} {parts}){asked}"
        )


class NotEnoughData(BadInput):
    """The requested bound cannot be proven with this many parts, wherever the threshold is put.

    ``n`` is the number of parts there are, ``best`` the smallest rate that they can prove.
    """

    def __init__(self, n: int, best: float, *, requested: float, confidence: float) -> None:
        self.n = n
        self.best = best
        super().__init__(
            f"not enough data: {n} defects can prove at best {best:.2%} escape",
            where=f"calibration.escape={requested:g} at {confidence:.0%} confidence",
            fix="label more defects or ask for a larger escape rate",
        )
