"""Thresholds, temperature, conformal p-values, escape and overkill guarantees."""

from saec.calibrate.calibration import Calibration, CalibrationData, calibrate, content_digest
from saec.calibrate.conformal import overkill_threshold, p_value
from saec.calibrate.escape import best_escape, clopper_pearson_upper, escape_threshold
from saec.calibrate.fusion import FINAL_TAU, Fusion, fit_fusion, fit_tau_cloud
from saec.calibrate.guarantee import Guarantee, NotEnoughData
from saec.calibrate.score import ScoreCalibration, class_confidences, confidences, fit_temperature
from saec.calibrate.sweep import Arms, SweepPoint, threshold_sweep
from saec.calibrate.thresholds import Thresholds, escalation_mask

__all__ = [
    "FINAL_TAU",
    "Arms",
    "Calibration",
    "CalibrationData",
    "Fusion",
    "Guarantee",
    "NotEnoughData",
    "ScoreCalibration",
    "SweepPoint",
    "Thresholds",
    "best_escape",
    "calibrate",
    "class_confidences",
    "clopper_pearson_upper",
    "confidences",
    "content_digest",
    "escalation_mask",
    "escape_threshold",
    "fit_fusion",
    "fit_tau_cloud",
    "fit_temperature",
    "overkill_threshold",
    "p_value",
    "threshold_sweep",
]
