"""Exit codes beyond 0 (done) and 2 (bad input)."""

GATE_FAILED = 1
"""It ran, but a stated gate was not met."""

INTERRUPTED = 130
"""Ctrl-C, as shells have it (128 + SIGINT)."""
