"""Writing an ONNX graph node by node: weights are kept once, and constants with equal values share a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from saec.errors import BadInput
from saec.vlm.contract.signature import TensorSpec

OPSET = 21
IR_VERSION = 10
MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators: block-wise and integer matrix products."""

EMBEDDED_LIMIT = 2**31 - 2**20
"""Protobuf refuses larger files; weights must then lie beside the graph."""


class Graph:
    """A graph under construction. Methods return names of values, which later calls take as inputs."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, NDArray[Any]] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._domains: set[str] = set()
        self._renamed: dict[str, str] = {}

    def input(self, spec: TensorSpec) -> str:
        """Declare an input."""
        self._inputs.append(_declared(spec))
        return spec.name

    def output(self, spec: TensorSpec, value: str) -> None:
        """Declare an output and let it be ``value``, which a node made."""
        self._renamed[value] = spec.name  # a node that only copied it would cost its share of every step
        self._outputs.append(_declared(spec))

    def weight(self, name: str, values: NDArray[Any]) -> str:
        """Keep an array under its name; the same name twice means the same array."""
        if name not in self._weights:
            self._weights[name] = np.ascontiguousarray(values)
        return name

    def constant(self, values: object, dtype: str) -> str:
        """Keep a small array: shapes, axes, scalars."""
        array = np.asarray(values, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.weight(f"const/{len(self._constants)}", array)
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """Keep a one-dimensional int64 array."""
        return self.constant(values, "int64")

    def op(self, kind: str, *inputs: str, domain: str = "", name: str = "", **attributes: Any) -> str:
        """Add a node with one output and return that output's name."""
        return self.ops(kind, *inputs, outputs=1, domain=domain, name=name, **attributes)[0]

    def ops(
        self, kind: str, *inputs: str, outputs: int, domain: str = "", name: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """Add a node with several outputs."""
        title = name or f"{kind}_{len(self._nodes)}"
        made = tuple(f"{title}:{number}" for number in range(outputs))
        self._nodes.append(helper.make_node(kind, list(inputs), list(made), name=title, domain=domain, **attributes))
        self._domains.add(domain)
        return made

    def model(self, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
        """Return the finished model, weights inside."""
        weights = [numpy_helper.from_array(array, name) for name, array in self._weights.items()]
        return self._model(weights, metadata)

    def save(self, file: Path, *, external: bool = True, metadata: Mapping[str, str] | None = None) -> list[Path]:
        """Write the model, its weights beside it in ``<stem>.bin`` or inside; return the files written.

        Raises:
            BadInput: weights of 2 GB or more inside one file.
        """
        if not external:
            if sum(array.nbytes for array in self._weights.values()) >= EMBEDDED_LIMIT:
                raise BadInput("more than 2 GB of weights do not fit into one file", where=file, fix="keep them beside")
            file.write_bytes(self.model(metadata).SerializeToString())
            return [file]
        data = file.with_suffix(".bin")
        weights = []
        with data.open("wb") as out:
            for name, array in self._weights.items():
                if array.nbytes < 1024:  # shapes and scalars are read while the graph is loaded
                    weights.append(numpy_helper.from_array(array, name))
                    continue
                out.write(b"\0" * (-out.tell() % 64))
                weights.append(_external(name, array, data.name, out.tell()))
                out.write(array.data)
        file.write_bytes(self._model(weights, metadata).SerializeToString())
        return [file, data]

    def _model(self, weights: Iterable[onnx.TensorProto], metadata: Mapping[str, str] | None) -> onnx.ModelProto:
        for node in self._nodes:
            node.input[:] = [self._renamed.get(name, name) for name in node.input]
            node.output[:] = [self._renamed.get(name, name) for name in node.output]
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, list(weights))
        opsets = [helper.make_opsetid("", OPSET)]
        opsets += [helper.make_opsetid(domain, 1) for domain in sorted(self._domains - {""})]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="saec")
        model.ir_version = IR_VERSION
        helper.set_model_props(model, dict(metadata or {}))
        return model


def _external(name: str, array: NDArray[Any], location: str, offset: int) -> onnx.TensorProto:
    tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _declared(spec: TensorSpec) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    shape: Sequence[int | str] = spec.shape
    return helper.make_tensor_value_info(spec.name, kind, shape)
