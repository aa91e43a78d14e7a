"""A decoder's weights out of its own exported graph, so that a bundle can become another graph of the same model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from saec.errors import BadInput
from saec.vlm.contract.shape import DecoderShape
from saec.vlm.contract.signature import Signature
from saec.vlm.export.linear import Array, Blocks4, SidePath

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


class GraphWeights:
    """:class:`~saec.vlm.export.decoder.DecoderWeights` of a float decoder graph that ``build_decoder`` wrote.

    Raises:
        BadInput: the weights in the graph are not floats any more: they were rounded when it was exported.
    """

    def __init__(self, file: Path, shape: DecoderShape) -> None:
        self._folder = file.parent
        self._shape = shape
        graph = onnx.load(file, load_external_data=False).graph
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        head = self._stored.get("lm_head.weight")
        if head is None or head.data_type not in _FLOATS:
            fix = "export the model with --precision float32 and pass that bundle"
            raise BadInput("the graph holds rounded weights, which cannot be rounded again", where=file, fix=fix)

    def array(self, name: str) -> Array:
        """Return a weight in float32, as PyTorch has it (matrices [out, in]); a LoRA beside it is merged."""
        shape = self._shape
        if name == "model.embed_tokens.weight":
            return self._matrix("lm_head") if shape.tied else self._read("embed_tokens")
        layer, kind = name.rsplit(".", 1)
        at, _, part = layer.rpartition(".")
        if part.endswith("norm"):
            return self._read(name)
        queries, pairs, wide = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.intermediate_size
        inside = {
            "q_proj": (f"{at}.qkv", 0, queries),
            "k_proj": (f"{at}.qkv", queries, pairs),
            "v_proj": (f"{at}.qkv", queries + pairs, pairs),
            "gate_proj": (f"{at}.gate_up", 0, wide),
            "up_proj": (f"{at}.gate_up", wide, wide),
        }
        stored, begin, rows = inside.get(part, (layer, 0, None))
        whole = self._matrix(stored) if kind == "weight" else self._read(f"{stored}.bias")
        return whole if rows is None else whole[begin : begin + rows]

    def blocks(self, name: str) -> Blocks4 | None:
        """Return nothing: the graph holds floats."""
        return None

    def side(self, name: str) -> SidePath | None:
        """Return nothing: see :meth:`array`."""
        return None

    def _matrix(self, layer: str) -> Array:
        matrix = self._read(f"{layer}.weight").T
        if f"{layer}.lora_A" in self._stored:
            matrix = matrix + (self._read(f"{layer}.lora_A") @ self._read(f"{layer}.lora_B")).T
        return np.ascontiguousarray(matrix)

    def _read(self, name: str) -> Array:
        return np.asarray(numpy_helper.to_array(self._stored[name], str(self._folder)), np.float32)


def tied_table(file: Path, signature: Signature | None) -> Array | None:
    """Return the embedding table [V, H] that a decoder's graph holds as its last product, if it does, in floats."""
    if signature is None or not signature.shape.tied:
        return None
    for tensor in onnx.load(file, load_external_data=False).graph.initializer:
        if tensor.name == "lm_head.weight" and tensor.data_type in _FLOATS:
            return np.asarray(numpy_helper.to_array(tensor, str(file.parent)), np.float32).T
    return None
