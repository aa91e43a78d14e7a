"""The operating point: the edge's threshold and the SAEC thresholds and the band that escalate a part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BeforeValidator, ConfigDict, PlainSerializer

from saec.calibrate.score import confidences
from saec.errors import BadInput

# JSON has no Infinity: a disabled scene threshold is written as null.
_InfIsNull = Annotated[
    float,
    BeforeValidator(lambda value: math.inf if value is None else value),
    PlainSerializer(lambda value: None if math.isinf(value) else value, return_type=float | None),
]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """All thresholds on P(defect), its confidences and the scene score. The defaults escalate nothing.

    * Edge label: defect iff ``p_defect >= tau_edge``. Cloud alone: defect iff ``p_cloud >= tau_cloud``.
    * Escalate iff ``S >= tau_scene`` or ``s_max < tau_smax`` or ``margin < tau_margin`` or ``entropy > tau_entropy`` or
      ``band_low <= p_defect <= band_high``.
    * Disabled: ``tau_scene = inf``, ``tau_smax = tau_margin = 0``, ``tau_entropy = 1``, ``band_low > band_high``.

    The three confidences are symmetric around P = 0.5, the band lies around ``tau_edge``. Both leave an interval at
    either end, so both labels can be kept at the edge.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    tau_edge: float = 0.5
    tau_cloud: float = 0.5
    tau_scene: _InfIsNull = math.inf
    tau_smax: float = 0.0
    tau_margin: float = 0.0
    tau_entropy: float = 1.0
    band_low: float = 1.0
    band_high: float = 0.0

    def __post_init__(self) -> None:
        for name in ("tau_edge", "tau_cloud", "tau_smax", "tau_margin", "tau_entropy", "band_low", "band_high"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"outside [0, 1]: {getattr(self, name)}", where=f"thresholds.{name}")
        if math.isnan(self.tau_scene) or self.tau_scene == -math.inf:
            raise BadInput("not a scene threshold", where=f"thresholds.tau_scene={self.tau_scene}")

    @property
    def has_band(self) -> bool:
        """Whether the escalation band contains anything."""
        return self.band_low <= self.band_high


def escalation_mask(thresholds: Thresholds, scene: ArrayLike, p_defect: ArrayLike) -> NDArray[np.bool_]:
    """Return, for ``[n]`` scene scores and ``[n]`` P(defect), which parts the rule sends to the cloud."""
    p = np.asarray(p_defect, dtype=np.float64)
    s_max, margin, entropy = confidences(p)
    return np.asarray(
        (np.asarray(scene, dtype=np.float64) >= thresholds.tau_scene)
        | (s_max < thresholds.tau_smax)
        | (margin < thresholds.tau_margin)
        | (entropy > thresholds.tau_entropy)
        | ((p >= thresholds.band_low) & (p <= thresholds.band_high)),
        dtype=np.bool_,
    )
