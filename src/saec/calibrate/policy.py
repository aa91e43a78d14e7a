"""How one product is routed: calibrated thresholds and the mode that the user chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from saec.calibrate.drift import Reference
from saec.calibrate.thresholds import Thresholds
from saec.config import RouteSettings

Mode = Literal["cascade", "edge_only", "cloud_only", "random"]


@dataclass(frozen=True, slots=True)
class Policy:
    """How one product is routed.

    ``random_ratio`` in [0, 1] serves the random mode only: SAEC's ablation at the same escalated share. ``audit_share``
    of the parts that a cascade would keep goes to the cloud all the same. ``seed`` draws the lots of both. ``drift`` is
    what the product is watched against, if anything.
    """

    mode: Mode
    thresholds: Thresholds
    random_ratio: float = 0.3
    seed: int = 2025
    audit_share: float = 0.0
    drift: Reference | None = None

    @classmethod
    def of(cls, settings: RouteSettings, thresholds: Thresholds, drift: Reference | None = None) -> Self:
        """Return the policy that the settings ask for, with a product's calibrated thresholds; nothing is audited."""
        return cls(settings.mode, thresholds, settings.random_ratio, settings.seed, drift=drift)
