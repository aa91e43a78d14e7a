"""What vision transformers are made of (Dosovitskiy et al., ICLR 2021), as nodes of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from saec.errors import BadInput
from saec.vlm.contract.bundle import Precision, Vision
from saec.vlm.contract.signature import FloatType, TensorSpec
from saec.vlm.export.graph import Graph
from saec.vlm.export.linear import Array, Linear, dense, emit, joined

Weights = Mapping[str, Array]
"""Weights by name, in float32, as PyTorch has them."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block's layers: normalise, attend, add; normalise, MLP, add. ``norms`` are (scale, shift) [hidden] each."""

    norms: tuple[tuple[Array, Array], tuple[Array, Array]]
    queries: Linear
    keys: Linear
    values: Linear
    gathered: Linear
    wide: Linear
    narrow: Linear


class Tower:
    """A vision transformer under construction, from ``pixel_values`` [1, 3, side, side] float32."""

    def __init__(self, precision: Precision, *, heads: int, eps: float, activation: str) -> None:
        self.graph = Graph("vision")
        self.precision = precision
        self.dtype: FloatType = "float16" if precision == "float16" else "float32"
        self._heads, self._eps, self._activation = heads, eps, activation

    def input(self, spec: TensorSpec) -> str:
        """Declare an input and return it in the tower's number format."""
        return self._cast(self.graph.input(spec), self.dtype)

    def finish(self, embeds: str, vision: Vision, hidden: int) -> tuple[Graph, Vision]:
        """Let ``embeds`` be the output and return the graph with its description."""
        spec = TensorSpec(name="image_embeds", shape=(1, vision.tokens, hidden), dtype="float32")
        self.graph.output(spec, self._cast(embeds, "float32"))
        return self.graph, vision

    def patches(self, pixels: str, kernel: Array, side: int) -> str:
        """Return [1, patches, hidden]: a convolution whose stride is its width is one matrix product."""
        graph, (out, channels, size, _) = self.graph, kernel.shape
        rows = side // size
        x = graph.op("Reshape", pixels, graph.ints(1, channels, rows, size, rows, size))
        x = graph.op("Transpose", x, perm=[0, 2, 4, 1, 3, 5])
        x = graph.op("Reshape", x, graph.ints(1, rows * rows, -1))
        # Pixels have outliers of their own and cost little here.
        return emit(graph, x, Linear("patches", kernel.reshape(out, -1)), self.dtype)

    def add(self, x: str, name: str, values: Array) -> str:
        """Add an array."""
        return self.graph.op("Add", x, self.graph.weight(name, values.astype(self.dtype)))

    def block(self, x: str, layers: Block, masks: tuple[str, str] | None = None) -> str:
        """Return [1, T, hidden] after one more block; ``masks`` [1, T, hidden] are what its two branches are multiplied
        with, as dropout does."""
        graph, name = self.graph, layers.gathered.name
        attended = self._attended(self.norm(x, f"{name}.norm1", *layers.norms[0]), layers)
        x = graph.op("Add", x, attended if masks is None else graph.op("Mul", attended, masks[0]))
        inner = self.linear(self.norm(x, f"{name}.norm2", *layers.norms[1]), layers.wide)
        narrow = self.linear(self.active(inner, self._activation), layers.narrow)
        return graph.op("Add", x, narrow if masks is None else graph.op("Mul", narrow, masks[1]))

    def norm(self, x: str, name: str, scale: Array, shift: Array, *, eps: float | None = None) -> str:
        """Layer normalisation over the last axis."""
        graph = self.graph
        parts = {f"{name}.scale": scale, f"{name}.shift": shift}
        both = [graph.weight(part, values.astype(self.dtype)) for part, values in parts.items()]
        return graph.op("LayerNormalization", x, *both, axis=-1, epsilon=eps or self._eps)

    def linear(self, x: str, layer: Linear) -> str:
        """Return the layer's output in the tower's precision."""
        return emit(self.graph, x, layer, self.precision)

    def active(self, x: str, kind: str) -> str:
        """Apply an activation by the name that Transformers gives it.

        Raises:
            BadInput: another one than those of CLIP, SigLIP and DINOv2.
        """
        graph = self.graph
        if kind == "quick_gelu":
            return graph.op("Mul", x, graph.op("Sigmoid", graph.op("Mul", x, graph.constant(1.702, self.dtype))))
        if kind not in ("gelu", "gelu_pytorch_tanh"):
            raise BadInput(f"the vision tower has the activation {kind}, which cannot be exported")
        return graph.op("Gelu", x, approximate="none" if kind == "gelu" else "tanh")

    def merged(self, x: str, side: int, merge: int, *, channels: int) -> str:
        """Return [1, (side / merge)^2, merge^2 C] of [1, side^2, C] row by row: squares of patches are one token."""
        graph, rows = self.graph, side // merge
        grid = graph.op("Reshape", x, graph.ints(1, rows, merge, rows, merge, channels))
        grid = graph.op("Transpose", grid, perm=[0, 1, 3, 2, 4, 5])
        return graph.op("Reshape", grid, graph.ints(1, rows * rows, merge * merge * channels))

    def without_class(self, x: str) -> str:
        """Drop the first token."""
        graph = self.graph
        return graph.op("Slice", x, graph.ints(1), graph.ints(np.iinfo(np.int64).max), graph.ints(1))

    def _attended(self, x: str, layers: Block) -> str:
        graph, hidden = self.graph, layers.queries.sizes[0]
        width = hidden // self._heads
        queries = scaled(layers.queries, np.float32(width**-0.5))
        qkv = joined(f"{layers.gathered.name}.qkv", [queries, layers.keys, layers.values])
        by_head = graph.op("Reshape", self.linear(x, qkv), graph.ints(1, -1, 3 * self._heads, width))
        parts = graph.ops("Split", graph.op("Transpose", by_head, perm=[0, 2, 1, 3]), outputs=3, axis=1, num_outputs=3)
        scores = graph.op("MatMul", parts[0], graph.op("Transpose", parts[1], perm=[0, 1, 3, 2]))
        seen = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), parts[2])
        seen = graph.op("Reshape", graph.op("Transpose", seen, perm=[0, 2, 1, 3]), graph.ints(1, -1, hidden))
        return self.linear(seen, layers.gathered)

    def _cast(self, x: str, dtype: str) -> str:
        if self.dtype == "float32":
            return x
        return self.graph.op("Cast", x, to=10 if dtype == "float16" else 1)


def scaled(layer: Linear, by: Array | np.float32) -> Linear:
    """Return a layer whose outputs are multiplied by ``by``, one number or one for each of them."""
    weight = (dense(layer.weight).T * by).T
    return Linear(layer.name, weight, None if layer.bias is None else layer.bias * by)


def linear_of(weights: Weights, name: str) -> Linear:
    """Return the layer of ``<name>.weight`` and, if there is one, ``<name>.bias``."""
    return Linear(name, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def norm_of(weights: Weights, name: str) -> tuple[Array, Array]:
    """Return scale and shift of a layer normalisation."""
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def resized_positions(grid: Array, side: int) -> Array:
    """Return position embeddings [side^2, C] of a square grid [n^2, C], by cubic convolution as PyTorch does it.

    That is with a = -0.75, edges repeated, pixel centres at halves, and no smoothing when shrinking.
    """
    rows = round(len(grid) ** 0.5)
    if rows == side:
        return grid
    to = _cubic(rows, side)
    square = grid.reshape(rows, rows, -1).astype(np.float64)
    made = np.einsum("yi,xj,ijc->yxc", to, to, square, optimize=True)
    return np.asarray(made.reshape(side * side, -1), np.float32)


def _cubic(rows: int, side: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """[side, rows]: what each old row gives to each new one (Keys 1981)."""
    a, to = -0.75, np.zeros((side, rows))
    for new in range(side):
        centre = (new + 0.5) * rows / side - 0.5
        first = int(np.floor(centre))
        for old in range(first - 1, first + 3):
            t = abs(centre - old)
            near = ((a + 2) * t - (a + 3)) * t * t + 1
            far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
            to[new, min(max(old, 0), rows - 1)] += near if t <= 1 else far
    return to
