"""Metrics, meter, baselines, benchmarks and the report."""
