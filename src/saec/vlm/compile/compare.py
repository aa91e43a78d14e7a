"""Inputs as they come in practice, and how far a compiled graph's outputs are from ONNX Runtime's on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saec.errors import GateFailed
from saec.vlm.compile.record import Difference
from saec.vlm.contract.signature import Signature, TensorSpec
from saec.vlm.edge.kv import Cache
from saec.vlm.export.feeds import Feeds, step_feeds
from saec.vlm.export.linear import Array

Run = Callable[[Feeds], Sequence[NDArray[Any]]]

HISTORY = 16
"""Tokens that lie in the cache when outputs are compared."""

FREE = 32
"""Cache length taken where a graph leaves it free."""


def examples(inputs: Sequence[TensorSpec], signature: Signature | None, table: Array | None, run: Run) -> list[Feeds]:
    """Return inputs to compare on: standard normal, and for decoders the first step of a conversation and a later one.

    The first counts: decoders gather outliers in their first token, which are what goes wrong in half precision. Tokens
    are drawn from the embedding ``table`` [V, H], noise without it; ``run`` fills the cache before the later step.
    """
    rng = np.random.default_rng(0)
    if signature is None:
        return [{spec.name: _noise(spec, rng) for spec in inputs}]
    if signature.n is None:
        signature = signature.model_copy(update={"n": 1, "cache": min(FREE, signature.cache)})
    cache, size = Cache(signature), signature.n or 1
    feeds = first = step_feeds(signature, cache, _tokens(signature, table, rng))
    while cache.length < min(HISTORY, signature.cache - size):
        _, *made = run(feeds)
        cache.append(np.stack(made[::2]), np.stack(made[1::2]))
        feeds = step_feeds(signature, cache, _tokens(signature, table, rng))
    return [first, feeds]


def differences(
    names: Sequence[str], expected: Sequence[Sequence[NDArray[Any]]], found: Sequence[Sequence[NDArray[Any]]]
) -> Mapping[str, Difference]:
    """Return how far each output is from what is expected, at most, over the examples.

    Raises:
        GateFailed: an output is not finite.
    """
    compared = {}
    for number, name in enumerate(names):
        pairs = [(right[number], one[number]) for right, one in zip(expected, found, strict=True)]
        gaps = [np.abs(one.astype(np.float64) - right.astype(np.float64)).max() for right, one in pairs]
        if not np.isfinite(gaps).all():
            raise GateFailed(f"the compiled graph's output {name} is not finite")
        largest = max(float(np.abs(right).max()) for right, _ in pairs)
        compared[name] = Difference(max_abs=float(max(gaps)), largest=largest)
    return compared


def _tokens(signature: Signature, table: Array | None, rng: np.random.Generator) -> NDArray[Any]:
    """Return ids [n], or embeddings [n, H]."""
    new, shape = signature.n or 1, signature.shape
    ids = rng.integers(shape.vocab_size, size=new)
    if signature.embeddings == "inside":
        return ids
    return rng.standard_normal((new, shape.hidden_size)) if table is None else table[ids]


def _noise(spec: TensorSpec, rng: np.random.Generator) -> NDArray[Any]:
    shape = tuple(dim if isinstance(dim, int) else 1 for dim in spec.shape)
    if np.issubdtype(np.dtype(spec.dtype), np.floating):
        return rng.standard_normal(shape).astype(spec.dtype)
    return np.zeros(shape, spec.dtype)
