"""How many steps a run has, and the learning rate at each of them: pure functions, so nothing of it needs saving."""

from __future__ import annotations

import math

from saec.train.config import TrainSettings


def steps_of(examples: int, settings: TrainSettings) -> int:
    """Return the optimizer steps of an epoch with this many examples; the last one may be smaller."""
    return math.ceil(math.ceil(examples / settings.batch_size) / settings.accumulation)


def rate(step: int, total: int, settings: TrainSettings) -> float:
    """Return the factor in (0, 1] on all learning rates at ``step`` = 0 .. total - 1.

    Linear over the first ``warmup`` share, then constant or half a cosine down to almost 0 (Loshchilov & Hutter 2017).
    """
    rising = round(settings.warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
