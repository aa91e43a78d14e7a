"""The decoder graph with a fixed KV cache, of the Llama and Qwen2 families, built node by node from its weights.

New tokens attend to the cache and to each other; the graph returns their keys and values, and whoever runs it writes
them into the cache (``edge_vlm.md``). Scores of cache and new tokens are computed apart, so that the cache, which is
the largest input, is never copied.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from saec.errors import BadInput
from saec.vlm.contract.bundle import Precision
from saec.vlm.contract.signature import Signature
from saec.vlm.export.graph import Graph
from saec.vlm.export.linear import Array, Blocks4, Linear, SidePath, emit, joined

METADATA = "saec.signature"
"""Key in the ONNX file's metadata that holds the signature as JSON."""

_MASKED, _MASKED_HALF = 1e9, 3e4
"""What is taken off a masked score. In float16 there must be room below it: -65504 and a little more is -inf."""


class DecoderWeights(Protocol):
    """A decoder's weights under the names of ``LlamaForCausalLM``: ``model.layers.0.self_attn.q_proj.weight``."""

    def array(self, name: str) -> Array:
        """Return a weight in float32, as PyTorch has it (matrices [out, in])."""
        ...

    def blocks(self, name: str) -> Blocks4 | None:
        """Return a matrix as the 4-bit blocks it is stored in, if it is."""
        ...

    def side(self, name: str) -> SidePath | None:
        """Return the LoRA that stays beside a matrix, if there is one."""
        ...


def build_decoder(signature: Signature, weights: DecoderWeights, precision: Precision, *, half: bool = False) -> Graph:
    """Return the graph of a decoder with the inputs and outputs of ``signature``.

    ``half`` keeps all values of a float32 graph within float16's range, for devices that compute it in float16.

    Raises:
        BadInput: a precision that does not fit the signature's number format, or weights that are not those of the
            shape; the message names the first.
    """
    if (precision == "float16") != (signature.dtype == "float16"):
        raise BadInput(f"a graph of {signature.dtype} cannot have weights of {precision}")
    return _Decoder(signature, weights, precision, half or precision == "float16").build()


class _Decoder:
    def __init__(self, signature: Signature, weights: DecoderWeights, precision: Precision, half: bool) -> None:
        self.signature, self.weights, self.precision, self.half = signature, weights, precision, half
        self.shape = signature.shape
        self.graph = Graph("decoder")
        self.queries_a_head = self.shape.heads // self.shape.kv_heads

    def build(self) -> Graph:
        graph, signature = self.graph, self.signature
        named = {spec.name: graph.input(spec) for spec in signature.inputs}
        x = named["inputs_embeds"] if signature.embeddings == "outside" else self._embedded(named["input_ids"])
        self.cos, self.sin = self._rotations(named)
        self.bias = self._bias(named["attention_mask"])
        self.cached = self._cached(signature.past[1].name)
        present = []
        for layer, (key, value) in enumerate(zip(signature.past[::2], signature.past[1::2], strict=True)):
            x, new_key, new_value = self._block(layer, x, key.name, value.name)
            present += [new_key, new_value]
        x = self._norm(x, "model.norm.weight")
        if signature.logits == "last":
            x = graph.op("Slice", x, graph.ints(-1), graph.ints(np.iinfo(np.int64).max), graph.ints(1))
        logits = self._logits(x)
        for spec, made in zip(signature.outputs, [logits, *present], strict=True):
            graph.output(spec, made)
        return graph

    def _logits(self, x: str) -> str:
        shape = self.shape
        stored = "model.embed_tokens" if shape.tied else "lm_head"
        head = Linear("lm_head", *self._matrix(stored, shape.vocab_size, shape.hidden_size), logits=True)
        return emit(self.graph, x, head, self.precision)

    def _block(self, layer: int, x: str, past_key: str, past_value: str) -> tuple[str, str, str]:
        graph, shape, at = self.graph, self.shape, f"model.layers.{layer}"
        attended, key, value = self._attention(at, self._norm(x, f"{at}.input_layernorm.weight"), past_key, past_value)
        x = graph.op("Add", x, attended)
        inner = self._norm(x, f"{at}.post_attention_layernorm.weight")
        wide, hidden = shape.intermediate_size, shape.hidden_size
        both = joined(
            f"{at}.mlp.gate_up", [self._linear(f"{at}.mlp.{part}_proj", wide, hidden) for part in ("gate", "up")]
        )
        gate, up = graph.ops("Split", emit(graph, inner, both, self.precision), outputs=2, axis=-1, num_outputs=2)
        gated = graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)
        down = emit(graph, gated, self._linear(f"{at}.mlp.down_proj", hidden, wide), self.precision)
        return graph.op("Add", x, down), key, value

    def _attention(self, at: str, x: str, past_key: str, past_value: str) -> tuple[str, str, str]:
        """Return what the heads gathered [1, n, hidden], and the new keys and values."""
        graph, shape = self.graph, self.shape
        heads, kv, width = shape.heads, shape.kv_heads, shape.head_dim
        parts = (("q", heads), ("k", kv), ("v", kv))
        projections = [
            self._linear(f"{at}.self_attn.{part}_proj", count * width, shape.hidden_size, bias=shape.qkv_bias)
            for part, count in parts
        ]
        qkv = emit(graph, x, joined(f"{at}.self_attn.qkv", projections), self.precision)
        by_head = graph.op(
            "Transpose", graph.op("Reshape", qkv, graph.ints(1, -1, heads + 2 * kv, width)), perm=[0, 2, 1, 3]
        )
        turned, value = graph.ops("Split", by_head, graph.ints(heads + kv, kv), outputs=2, axis=1)
        query, key = graph.ops("Split", self._turn(turned), graph.ints(heads, kv), outputs=2, axis=1)
        query = graph.op("Mul", query, graph.constant(width**-0.5, self.signature.dtype))
        query = graph.op("Reshape", query, graph.ints(1, kv, -1, width))  # [1, KV, G n, D]
        key = graph.op("Transpose", key, perm=[0, 1, 3, 2])
        seen = self._attend(query, (past_key, past_value), (key, value))
        by_token = graph.op("Transpose", graph.op("Reshape", seen, graph.ints(1, heads, -1, width)), perm=[0, 2, 1, 3])
        out = self._linear(f"{at}.self_attn.o_proj", shape.hidden_size, heads * width, bias=shape.o_bias)
        gathered = graph.op("Reshape", by_token, graph.ints(1, -1, heads * width))
        return emit(graph, gathered, out, self.precision), key, value

    def _attend(self, query: str, past: tuple[str, str], new: tuple[str, str]) -> str:
        """Return softmax(Q K^T + bias) V over cache and new tokens: [1, KV, G n, D]."""
        graph = self.graph
        scores = graph.op("Concat", graph.op("MatMul", query, past[0]), graph.op("MatMul", query, new[0]), axis=-1)
        weights = graph.op("Softmax", graph.op("Add", scores, self.bias), axis=-1)
        end = graph.ints(np.iinfo(np.int64).max)
        of_past = graph.op("Slice", weights, graph.ints(0), self.cached, graph.ints(-1))
        of_new = graph.op("Slice", weights, self.cached, end, graph.ints(-1))
        return graph.op("Add", graph.op("MatMul", of_past, past[1]), graph.op("MatMul", of_new, new[1]))

    def _cached(self, past_value: str) -> str:
        """Return the length of the cache as a tensor [1]."""
        if self.signature.n is not None:
            return self.graph.ints(self.signature.cache)
        return self.graph.op("Shape", past_value, start=2, end=3)

    def _turn(self, x: str) -> str:
        """Rotate each head's two halves against each other by the token's position (RoFormer, eq. 34)."""
        graph = self.graph
        first, second = graph.ops("Split", x, outputs=2, axis=-1, num_outputs=2)
        swapped = graph.op("Concat", second, first, axis=-1)
        return graph.op("Add", graph.op("Mul", x, self.cos), graph.op("Mul", swapped, self.sin))

    def _rotations(self, named: dict[str, str]) -> tuple[str, str]:
        """Return cos and signed sin [1, 1, n, D] of the new tokens' positions."""
        graph, signature = self.graph, self.signature
        if signature.rope == "inputs":
            cos, sin = named["position_ids_cos"], named["position_ids_sin"]
        else:
            tables = rotary_tables(signature)
            cos, sin = (
                graph.op("Gather", graph.weight(f"rotary.{part}", table.astype(signature.dtype)), named["position_ids"])
                for part, table in zip(("cos", "sin"), tables, strict=True)
            )
        axis = graph.ints(1)
        whole = graph.op("Concat", cos, cos, axis=-1), graph.op("Concat", graph.op("Neg", sin), sin, axis=-1)
        return graph.op("Unsqueeze", whole[0], axis), graph.op("Unsqueeze", whole[1], axis)

    def _bias(self, mask: str) -> str:
        """Turn the strict 0/1 mask into what is added to the scores, once for each query of a group."""
        graph, dtype = self.graph, self.signature.dtype
        hidden = graph.op("Sub", mask, graph.constant(1, dtype))
        bias = graph.op("Mul", hidden, graph.constant(_MASKED_HALF if self.half else _MASKED, dtype))
        return graph.op("Concat", *[bias] * self.queries_a_head, axis=2) if self.queries_a_head > 1 else bias

    def _embedded(self, ids: str) -> str:
        shape = self.shape
        table = _checked(
            self.weights.array("model.embed_tokens.weight"), (shape.vocab_size, shape.hidden_size), "embeddings"
        )
        return self.graph.op("Gather", self.graph.weight("embed_tokens", table.astype(self.signature.dtype)), ids)

    def _norm(self, x: str, name: str) -> str:
        """RMSNorm (Zhang & Sennrich 2019)."""
        graph, dtype, eps = self.graph, self.signature.dtype, self.shape.rms_eps
        scale = graph.weight(name, _checked(self.weights.array(name), (self.shape.hidden_size,), name).astype(dtype))
        if not self.half:
            # This very chain of nodes is one that ONNX Runtime fuses.
            mean = graph.op("ReduceMean", graph.op("Pow", x, graph.constant(2, dtype)), graph.ints(-1), keepdims=1)
            root = graph.op("Sqrt", graph.op("Add", mean, graph.constant(eps, dtype)))
            return graph.op("Mul", graph.op("Div", x, root), scale)
        # Squares of large activations do not fit into float16, so the mean is taken of a row of magnitudes up to 1. It
        # is brought there in two steps: QNN's answers are those of a product with the reciprocal, and that of 24,000,
        # an outlier which decoders have in their first token, is subnormal, which is taken for 0.
        largest = graph.op("ReduceMax", graph.op("Abs", x), graph.ints(-1), keepdims=1)
        step = graph.op("Sqrt", graph.op("Max", largest, graph.constant(eps**0.5, dtype)))
        halfway = graph.op("Div", x, step)
        row = graph.op("Div", halfway, step)
        mean = graph.op("ReduceMean", graph.op("Mul", row, row), graph.ints(-1), keepdims=1)
        least = graph.op("Div", graph.op("Div", graph.constant(eps**0.5, dtype), step), step)
        root = graph.op("Sqrt", graph.op("Add", mean, graph.op("Mul", least, least)))
        return graph.op("Mul", graph.op("Div", halfway, graph.op("Mul", step, root)), scale)

    def _linear(self, name: str, out: int, across: int, *, bias: bool = False) -> Linear:
        weight, side = self._matrix(name, out, across), self.weights.side(f"{name}.weight")
        values = _checked(self.weights.array(f"{name}.bias"), (out,), f"{name}.bias") if bias else None
        return Linear(name, weight[0], values, side)

    def _matrix(self, name: str, out: int, across: int) -> tuple[Array | Blocks4]:
        blocks = self.weights.blocks(f"{name}.weight") if self.precision == "int4" else None
        if blocks is not None:
            return (blocks,)
        return (_checked(self.weights.array(f"{name}.weight"), (out, across), f"{name}.weight"),)


def rotary_tables(signature: Signature) -> tuple[Array, Array]:
    """Return cos and sin [context, D / 2] of all positions that a graph can be asked for."""
    width = signature.shape.head_dim
    rates = signature.shape.rope_theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    angles = np.arange(signature.context)[:, None] * rates
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _checked(values: Array, shape: tuple[int, ...], name: str) -> Array:
    if values.shape != shape:
        what = f"the weights {name} have shape {list(values.shape)}, the configuration says {list(shape)}"
        raise BadInput(what, fix="take weights and configuration from one checkpoint")
    return values
