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

Run = Callable[[Feeds], Sequence[NDArray[Any]]]

HISTORY = 16
"""Tokens that lie in the cache when outputs are compared."""

FREE = 32
"""Cache length taken where a graph leaves it free."""


def example(inputs: Sequence[TensorSpec], signature: Signature | None, run: Run, spread: float) -> Feeds:
    """Return inputs to compare on: standard normal, and for decoders those of a step in the middle of a conversation.

    A decoder's cache is filled by ``run`` itself, from embeddings of standard deviation ``spread``: keys and values
    have the magnitudes that the model gives them.
    """
    rng = np.random.default_rng(0)
    if signature is None:
        return {spec.name: _noise(spec, rng) for spec in inputs}
    if signature.n is None:
        signature = signature.model_copy(update={"n": 1, "cache": min(FREE, signature.cache)})
    cache, size = Cache(signature), signature.n or 1
    while cache.length < min(HISTORY, signature.cache - size):
        _, *made = run(step_feeds(signature, cache, _tokens(signature, rng, spread)))
        cache.append(np.stack(made[::2]), np.stack(made[1::2]))
    return step_feeds(signature, cache, _tokens(signature, rng, spread))


def differences(expected: Mapping[str, NDArray[Any]], found: Sequence[NDArray[Any]]) -> Mapping[str, Difference]:
    """Return how far outputs are from what is expected, by name; ``found`` is in the same order.

    Raises:
        GateFailed: an output is not finite.
    """
    compared = {}
    for (name, right), one in zip(expected.items(), found, strict=True):
        gap = np.abs(one.astype(np.float64) - right.astype(np.float64))
        if not np.isfinite(gap).all():
            raise GateFailed(f"the compiled graph's output {name} is not finite")
        compared[name] = Difference(max_abs=float(gap.max()), largest=float(np.abs(right).max()))
    return compared


def _tokens(signature: Signature, rng: np.random.Generator, spread: float) -> NDArray[Any]:
    """Return ids [n], or embeddings [n, H] of noise."""
    new, shape = signature.n or 1, signature.shape
    if signature.embeddings == "inside":
        return rng.integers(shape.vocab_size, size=new)
    return rng.standard_normal((new, shape.hidden_size)) * spread


def _noise(spec: TensorSpec, rng: np.random.Generator) -> NDArray[Any]:
    shape = tuple(dim if isinstance(dim, int) else 1 for dim in spec.shape)
    if np.issubdtype(np.dtype(spec.dtype), np.floating):
        return rng.standard_normal(shape).astype(spec.dtype)
    return np.zeros(shape, spec.dtype)
