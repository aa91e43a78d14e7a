"""Thresholds, temperature, conformal p-values, escape and overkill guarantees."""
