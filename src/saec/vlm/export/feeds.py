"""The inputs of one step of a decoder graph, whatever its layout; for the runtime of the line see ``vlm.edge``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saec.vlm.contract.signature import Signature
from saec.vlm.edge.kv import Cache
from saec.vlm.edge.session import place_tokens
from saec.vlm.export.decoder import rotary_tables

Feeds = dict[str, NDArray[Any]]


def step_feeds(signature: Signature, cache: Cache, new: NDArray[Any]) -> Feeds:
    """Return all inputs for new tokens on top of a cache, at the end of the graph's rows.

    ``new`` are embeddings [k, H], or token ids [k] where the graph holds the table; k is at most the signature's n.
    """
    rows, count = signature.n or len(new), len(new)
    mask = np.zeros((1, 1, rows, cache.room + rows), signature.dtype)
    positions = np.zeros((1, rows), np.int32)
    place_tokens(mask, positions, cache.length, count)
    tokens = np.zeros((1, rows, *new.shape[1:]), np.int32 if new.ndim == 1 else signature.dtype)
    tokens[0, rows - count :] = new
    if signature.rope == "inside":
        placed: Feeds = {"position_ids": positions}
    else:
        tables = zip(("cos", "sin"), rotary_tables(signature), strict=True)
        placed = {f"position_ids_{part}": table[positions].astype(signature.dtype) for part, table in tables}
    states = (array for pair in zip(cache.keys, cache.values, strict=True) for array in pair)
    return {
        "input_ids" if new.ndim == 1 else "inputs_embeds": tokens,
        "attention_mask": mask,
        **placed,
        **{spec.name: array for spec, array in zip(signature.past, states, strict=True)},
    }
