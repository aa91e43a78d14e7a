"""A vision tower by itself, in two graphs: what makes tokens on the edge."""

from __future__ import annotations

import shutil
from pathlib import Path

from saec.vlm.contract.bundle import (
    BASIS,
    LOWER,
    TOWER_RECORD,
    UPPER,
    Precision,
    Tower,
    write_bundle,
)
from saec.vlm.export.bundle import whole
from saec.vlm.export.checkpoint import open_tower
from saec.vlm.export.source import Source
from saec.vlm.export.vision_dinov2 import loupe_lower, loupe_upper
from saec.vlm.loupe import TOKEN_BASIS
from saec.vlm.loupe.inputs import LOUPE
from saec.vlm.loupe.tower import TOWER

SPLIT = 6
"""Blocks of the lower half, which sees an image once: dropout acts, and is repeated, in the others."""


def export_tower(source: Source, out: Path, *, precision: Precision = "int8", split: int = SPLIT) -> Tower:
    """Write a model's tower and its tokens' basis into ``out``, whole or not at all; return the record.

    Raises:
        BadInput: a model whose tower is not taken apart, or an ``out`` that is in use or cannot be written.
    """
    tower, model_id = open_tower(source)
    heads = TOWER["num_attention_heads"]
    lower, state = loupe_lower(tower, precision, heads=heads, split=split)
    upper, masks, tokens = loupe_upper(tower, precision, heads=heads, split=split)
    with whole(out) as folder:
        lower.save(folder / LOWER)
        upper.save(folder / UPPER)
        shutil.copyfile(TOKEN_BASIS, folder / BASIS)
        record = Tower(
            name=source.name,
            model_id=model_id,
            fingerprint=source.fingerprint(precision),
            state=state,
            masks=masks,
            tokens=tokens,
            preprocess=LOUPE.preprocess,
        )
        return write_bundle(folder, record, TOWER_RECORD)
