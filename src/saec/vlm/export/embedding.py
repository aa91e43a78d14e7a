"""The graph that turns token ids into embeddings: ``input_ids`` [1, n] int32 -> ``inputs_embeds`` [1, n, H]."""

from __future__ import annotations

from onnx import TensorProto

from saec.vlm.contract.bundle import Precision
from saec.vlm.contract.signature import FloatType, TensorSpec
from saec.vlm.export.graph import Graph
from saec.vlm.export.linear import STEPS, Array, quantise_rows


def embedding_specs(hidden: int, dtype: FloatType) -> tuple[TensorSpec, TensorSpec]:
    """Return the graph's only input and its only output."""
    ids = TensorSpec(name="input_ids", shape=(1, "n"), dtype="int32")
    return ids, TensorSpec(name="inputs_embeds", shape=(1, "n", hidden), dtype=dtype)


def build_embedding(table: Array, precision: Precision) -> Graph:
    """Return the graph of an embedding table [V, H].

    The table is kept in half precision for a float16 bundle, whose embeddings are float16 too; in 8 bits with one scale
    a token for int8 and int4, which costs 0.4 % of a row's largest value at most.
    """
    graph = Graph("embedding")
    source, target = embedding_specs(table.shape[1], "float16" if precision == "float16" else "float32")
    ids = graph.input(source)
    if precision in ("int8", "int4"):
        quants, scale = quantise_rows(table, STEPS)
        rows = graph.op("Cast", graph.op("Gather", graph.weight("table", quants), ids), to=TensorProto.FLOAT)
        found = graph.op("Mul", rows, graph.op("Gather", graph.weight("scale", scale[:, None]), ids))
    else:
        found = graph.op("Gather", graph.weight("table", table.astype(target.dtype)), ids)
    graph.output(target, found)
    return graph
