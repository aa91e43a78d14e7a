"""A float32 graph with its constant matrix products emitted in another number format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from saec.vlm.contract.bundle import Precision
from saec.vlm.contract.signature import TensorSpec
from saec.vlm.export.graph import Graph
from saec.vlm.export.linear import Linear, emit

KEPT = ("patches.weight",)
"""Pixels have outliers of their own, and this product costs little: as in the exported towers."""


def rounded_products(file: Path, precision: Precision) -> Graph:
    """Return the graph with products of a value and a constant matrix [in, out] in ``precision``; the rest stays."""
    model = onnx.load(file).graph
    weights = {each.name: each for each in model.initializer}
    graph = Graph(model.name)
    values = {each.name: graph.input(spec_of(each)) for each in model.input}

    def value(name: str) -> str:
        if name in weights and name not in values:
            array = numpy_helper.to_array(weights[name])
            small = array.nbytes < 1024
            values[name] = graph.constant(array, str(array.dtype)) if small else graph.weight(name, array)
        return values[name] if name else ""

    for node in model.node:
        matrix = weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if matrix is not None and len(matrix.dims) == 2 and matrix.name not in KEPT:
            weight = np.ascontiguousarray(numpy_helper.to_array(matrix).T, np.float32)
            name = matrix.name.removesuffix(".weight")
            layer = Linear(name, weight, logits=name == "lm_head")
            values[node.output[0]] = emit(graph, value(node.input[0]), layer, precision)
            continue
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        inputs = [value(name) for name in node.input]
        made = graph.ops(node.op_type, *inputs, outputs=len(node.output), domain=node.domain, **attributes)
        values.update(zip(node.output, made, strict=True))
    for each in model.output:
        graph.output(spec_of(each), values[each.name])
    return graph


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    """Return an input or output as the contract describes it."""
    kind = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
    return TensorSpec(name=value.name, shape=shape, dtype=helper.tensor_dtype_to_np_dtype(kind.elem_type).name)
