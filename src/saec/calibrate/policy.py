"""How one product is routed: calibrated thresholds and the mode that the user chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from saec.calibrate.thresholds import Thresholds
from saec.config import RouteSettings

Mode = Literal["cascade", "edge_only", "cloud_only", "random"]


@dataclass(frozen=True, slots=True)
class Policy:
    """How one product is routed.

    ``random_ratio`` in [0, 1] and ``seed`` serve the random mode only: SAEC's ablation at the same escalated share.
    """

    mode: Mode
    thresholds: Thresholds
    random_ratio: float = 0.3
    seed: int = 2025

    @classmethod
    def of(cls, settings: RouteSettings, thresholds: Thresholds) -> Self:
        """Return the policy that the settings ask for, with a product's calibrated thresholds."""
        return cls(settings.mode, thresholds, settings.random_ratio, settings.seed)
