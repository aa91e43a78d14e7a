"""Linear layers of an exported graph, in the number format asked for.

=========  ==========================================================================================================
float32    one matrix product
float16    the same, in half precision throughout
int8       weights in 7 bits, one scale an output; activations in 8 bits, one scale a row, found as it runs
int4       weights in blocks of 32 along the input, 4 bits each (``MatMulNBits``); activations in 8 bits a block
=========  ==========================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saec.vlm.contract.bundle import Precision
from saec.vlm.export.graph import MICROSOFT, Graph

Array = NDArray[np.float32]

BLOCK = 32
"""Weights that share a scale in 4 bit; also GGUF's block."""

_WEIGHT_STEPS, STEPS = 63, 127
"""Steps either side of zero, of weights and of activations. Processors without VNNI add pairs of products in 16 bits,
which 8 times 8 bits overflow and 7 times 8 do not: the same answers everywhere, and no measurable loss."""

_ZERO = 1e-8
"""A row's largest magnitude is taken for at least this: rows of zeros have no scale."""


@dataclass(frozen=True, slots=True, eq=False)
class Blocks4:
    """A matrix [out, in] in 4-bit blocks: ``scale`` * q + ``minimum``.

    ``quants`` [out, in / 32, 16] uint8, element 2 i of a block in the low half of byte i, 2 i + 1 in the high;
    ``scale`` and ``minimum`` [out, in / 32] float32.
    """

    quants: NDArray[np.uint8]
    scale: Array
    minimum: Array


@dataclass(frozen=True, slots=True, eq=False)
class SidePath:
    """A LoRA beside a layer: x A B is added. ``a`` [in, rank], ``b`` [rank, out], its scaling in ``b``."""

    a: Array
    b: Array


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """y = x W^T + bias: ``weight`` [out, in], ``bias`` [out]. ``logits``: the outputs are compared with each other."""

    name: str
    weight: Array | Blocks4
    bias: Array | None = None
    side: SidePath | None = None
    logits: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in)."""
        if isinstance(self.weight, Blocks4):
            return self.weight.quants.shape[0], self.weight.quants.shape[1] * BLOCK
        return self.weight.shape[0], self.weight.shape[1]


def joined(name: str, layers: Sequence[Linear]) -> Linear:
    """Return layers of one input as one layer with their outputs side by side."""
    weights = [layer.weight for layer in layers]
    weight: Array | Blocks4
    if all(isinstance(each, Blocks4) for each in weights):
        parts = ("quants", "scale", "minimum")
        weight = Blocks4(*(np.concatenate([getattr(each, part) for each in weights]) for part in parts))
    else:
        weight = np.concatenate([dense(each) for each in weights])
    biases = [np.zeros(layer.sizes[0], np.float32) if layer.bias is None else layer.bias for layer in layers]
    bias = None if all(layer.bias is None for layer in layers) else np.concatenate(biases)
    return Linear(name, weight, bias, _joined_sides(layers))


def dense(weight: Array | Blocks4) -> Array:
    """Return a matrix in float32 [out, in]."""
    if not isinstance(weight, Blocks4):
        return weight
    low, high = weight.quants & 15, weight.quants >> 4
    quants = np.stack([low, high], axis=-1).reshape(*weight.scale.shape, BLOCK)
    values = quants * weight.scale[..., None] + weight.minimum[..., None]
    return np.asarray(values.reshape(len(values), -1), np.float32)


def emit(graph: Graph, x: str, layer: Linear, precision: Precision) -> str:
    """Add a layer to a graph and return its output [..., out]."""
    # What decides between tokens gets the most bits: docs/design.md has what fewer cost.
    if precision == "int8" or (precision == "int4" and layer.logits):
        y = _int8(graph, x, layer)
    elif precision == "int4" and layer.sizes[1] % BLOCK == 0:
        y = _int4(graph, x, layer)
    else:
        kind = "float16" if precision == "float16" else "float32"
        y = _product(graph, x, f"{layer.name}.weight", dense(layer.weight).T, kind)
    kind = "float16" if precision == "float16" else "float32"
    if layer.side is not None:
        down = _product(graph, x, f"{layer.name}.lora_A", layer.side.a, kind)
        y = graph.op("Add", y, _product(graph, down, f"{layer.name}.lora_B", layer.side.b, kind))
    if layer.bias is not None:
        y = graph.op("Add", y, graph.weight(f"{layer.name}.bias", layer.bias.astype(kind)))
    return y


def quantise_rows(matrix: Array, steps: int = _WEIGHT_STEPS) -> tuple[NDArray[np.int8], Array]:
    """Return a matrix [out, in] as q of -``steps`` to ``steps``, and scales [out]: row i is q[i] * scale[i]."""
    scale = np.maximum(np.abs(matrix).max(axis=1), _ZERO) / steps
    return np.round(matrix / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def quantise_blocks(matrix: Array) -> Blocks4:
    """Return a matrix [out, in] in 4-bit blocks whose range contains 0, which then is one of the 16 values."""
    blocks = matrix.reshape(len(matrix), -1, BLOCK)
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    scale = np.maximum(high - low, _ZERO) / 15
    zero = np.round(-low / scale)
    quants = np.clip(np.round(blocks / scale[..., None]) + zero[..., None], 0, 15).astype(np.uint8)
    packed = quants[..., 0::2] | (quants[..., 1::2] << 4)
    return Blocks4(packed, scale.astype(np.float32), (-zero * scale).astype(np.float32))


def _product(graph: Graph, x: str, name: str, matrix: Array, dtype: str) -> str:
    return graph.op("MatMul", x, graph.weight(name, matrix.astype(dtype)), name=f"{name}/product")


def _int8(graph: Graph, x: str, layer: Linear) -> str:
    # One scale for each row: a token with outliers leaves its neighbours' precision alone, and what a token becomes
    # does not depend on which others are computed with it.
    quants, scale = quantise_rows(dense(layer.weight))
    weight = graph.weight(f"{layer.name}.weight", quants.T)
    scales = graph.weight(f"{layer.name}.scale", scale)
    step, middle = graph.constant(1 / STEPS, "float32"), graph.constant(128, "uint8")
    rows, largest = _rows(graph, x, step, middle)
    if layer.logits:
        # What the first 8 bits left over goes through the same product as further rows: the weights are read once.
        read = graph.op("Mul", graph.op("DequantizeLinear", rows, step, middle), largest)
        more, least = _rows(graph, graph.op("Sub", x, read), step, middle)
        rows, largest = graph.op("Concat", rows, more, axis=0), graph.op("Concat", largest, least, axis=0)
    y = graph.op("MatMulIntegerToFloat", rows, weight, step, scales, middle, domain=MICROSOFT)
    y = graph.op("Mul", y, largest)
    return graph.op("ReduceSum", y, graph.ints(0), keepdims=1) if layer.logits else y


def _rows(graph: Graph, x: str, step: str, middle: str) -> tuple[str, str]:
    """Return x [1, n, in] in 8 bits, and the largest magnitude of each row [1, n, 1]: the scale of ``step`` is of 1."""
    largest = graph.op("ReduceMax", graph.op("Abs", x), graph.ints(-1), keepdims=1)
    largest = graph.op("Max", largest, graph.constant(_ZERO, "float32"))
    return graph.op("QuantizeLinear", graph.op("Div", x, largest), step, middle), largest


def _int4(graph: Graph, x: str, layer: Linear) -> str:
    blocks = layer.weight if isinstance(layer.weight, Blocks4) else quantise_blocks(layer.weight)
    zero = np.clip(np.round(-blocks.minimum / blocks.scale), 0, 15)
    out, across = layer.sizes
    inputs = [
        x,
        graph.weight(f"{layer.name}.weight", blocks.quants),
        graph.weight(f"{layer.name}.scale", blocks.scale.reshape(-1)),
        graph.weight(f"{layer.name}.zero", _packed(zero.astype(np.uint8))),
    ]
    sizes: dict[str, Any] = {"K": across, "N": out, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
    y = graph.op("MatMulNBits", *inputs, domain=MICROSOFT, **sizes)
    rest = blocks.minimum + zero * blocks.scale
    if not np.any(np.abs(rest) > 1e-6 * np.abs(blocks.scale)):
        return y
    # GGUF's blocks begin anywhere, the fast kernel wants 0 to be one of the 16 values: what is left over is a constant
    # in each block, and so a small product with the sums of the input's blocks. Exact, at a 32nd of the cost.
    sums = graph.op("ReduceSum", graph.op("Reshape", x, graph.ints(0, 0, -1, BLOCK)), graph.ints(-1), keepdims=0)
    return graph.op("Add", y, _product(graph, sums, f"{layer.name}.rest", rest.astype(np.float32).T, "float32"))


def _packed(zero: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[out, blocks] of 0 to 15 -> two in a byte, rows filled up to whole bytes."""
    padded = np.pad(zero, ((0, 0), (0, zero.shape[1] % 2)))
    return np.asarray((padded[:, 0::2] | (padded[:, 1::2] << 4)).reshape(-1), np.uint8)


def _joined_sides(layers: Sequence[Linear]) -> SidePath | None:
    sides = [layer.side for layer in layers]
    if all(side is None for side in sides):
        return None
    a = np.concatenate([side.a for side in sides if side is not None], axis=1)
    b = np.zeros((a.shape[1], sum(layer.sizes[0] for layer in layers)), np.float32)
    rank = out = 0
    for layer, side in zip(layers, sides, strict=True):
        if side is not None:
            b[rank : rank + len(side.b), out : out + layer.sizes[0]] = side.b
            rank += len(side.b)
        out += layer.sizes[0]
    return SidePath(a, b)
