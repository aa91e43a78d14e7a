"""Decoders of random weights, small enough to build and compile in a test, or shaped like real ones."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saec.vlm.contract.bundle import Precision
from saec.vlm.contract.shape import DecoderShape
from saec.vlm.contract.signature import Signature
from saec.vlm.export.decoder import METADATA, DecoderWeights, build_decoder
from saec.vlm.export.linear import Array, Blocks4, SidePath

TINY = DecoderShape(
    family="qwen2",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    max_positions=128,
    rope_theta=1e4,
    rms_eps=1e-6,
    qkv_bias=True,
)

FASTVLM = DecoderShape(
    family="qwen2",
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    layers=24,
    heads=14,
    kv_heads=2,
    head_dim=64,
    max_positions=32768,
    rope_theta=1e6,
    rms_eps=1e-6,
    qkv_bias=True,
)
"""FastVLM-0.5B's decoder (``edge_vlm.md``)."""


class RandomWeights(DecoderWeights):
    """Weights of a shape, drawn anew from their names each time they are asked for."""

    def __init__(self, shape: DecoderShape, *, sides: Mapping[str, SidePath] | None = None) -> None:
        self._shape, self._sides = shape, sides or {}

    def array(self, name: str) -> Array:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if "norm" in name:
            return 1 + 0.1 * rng.standard_normal(self._shape.hidden_size, dtype=np.float32)
        return rng.standard_normal(self._size(name), dtype=np.float32) * np.float32(0.05)

    def blocks(self, name: str) -> Blocks4 | None:
        return None

    def side(self, name: str) -> SidePath | None:
        return self._sides.get(name)

    def _size(self, name: str) -> tuple[int, ...]:
        shape = self._shape
        rows, columns = {
            "q_proj": (shape.heads * shape.head_dim, shape.hidden_size),
            "k_proj": (shape.kv_heads * shape.head_dim, shape.hidden_size),
            "v_proj": (shape.kv_heads * shape.head_dim, shape.hidden_size),
            "o_proj": (shape.hidden_size, shape.heads * shape.head_dim),
            "gate_proj": (shape.intermediate_size, shape.hidden_size),
            "up_proj": (shape.intermediate_size, shape.hidden_size),
            "down_proj": (shape.hidden_size, shape.intermediate_size),
            "embed_tokens": (shape.vocab_size, shape.hidden_size),
            "lm_head": (shape.vocab_size, shape.hidden_size),
        }[name.split(".")[-2]]
        return (rows,) if name.endswith("bias") else (rows, columns)


class Outliers(RandomWeights):
    """Weights that put 20,000 into one place of the residual stream, which all norms but take out again: trained
    decoders do so with their first token. For shapes with ``o_bias``."""

    def array(self, name: str) -> Array:
        values = super().array(name)
        if "norm" in name:
            values[3] = 1e-3
        elif name == "model.layers.0.self_attn.o_proj.bias":
            values[3] = 20_000
        else:
            values = values * 10
        return values


def write_decoder(
    file: Path,
    precision: Precision = "float32",
    shape: DecoderShape = TINY,
    weights: DecoderWeights | None = None,
    **options: Any,
) -> Signature:
    """Write a decoder and return its signature; ``options`` are the signature's."""
    dtype = "float16" if precision == "float16" else "float32"
    signature = Signature(shape=shape, dtype=dtype, **{"cache": 31, "n": 1, **options})
    graph = build_decoder(signature, weights or RandomWeights(shape), precision)
    graph.save(file, metadata={METADATA: signature.model_dump_json()})
    return signature
