"""Holding an ONNX file to the signature that it must have: inputs and outputs alike, and weights that are all there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper
from pydantic import ValidationError

from saec.errors import BadInput, first_problem
from saec.vlm.contract.bundle import DECODER, EMBEDDING, VISION, Bundle
from saec.vlm.contract.signature import Signature, TensorSpec
from saec.vlm.export.decoder import METADATA
from saec.vlm.export.embedding import embedding_specs

Kind = Literal["missing", "unexpected", "duplicate", "shape", "dtype", "weights", "value"]

_UNSEEN = ("heads", "intermediate_size", "rope_theta", "rms_eps")
"""Figures of a decoder that its inputs and outputs do not show."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: ``what`` is an input, an output, a weight or a stated figure of ``file``."""

    file: str
    what: Literal["input", "output", "weight", "figure"]
    name: str
    kind: Kind
    expected: str = ""
    found: str = ""


def validate_decoder(file: Path, signature: Signature) -> list[Problem]:
    """Return how a decoder differs from its signature; nothing when it is right.

    Raises:
        BadInput: not a readable ONNX file.
    """
    stored = stored_signature(file)
    unseen = [] if stored is None else _figures(file, signature, stored)
    return [*validate_graph(file, signature.inputs, signature.outputs), *unseen]


def validate_bundle(folder: Path, bundle: Bundle) -> list[Problem]:
    """Return how the graphs of a bundle differ from its record.

    Raises:
        BadInput: not a readable ONNX file.
    """
    signature, vision = bundle.signature, bundle.vision
    hidden = signature.shape.hidden_size
    problems = validate_decoder(folder / DECODER, signature)
    if EMBEDDING in bundle.files:
        ids, embeds = embedding_specs(hidden, signature.dtype)
        problems += validate_graph(folder / EMBEDDING, [ids], [embeds])
    if vision is not None:
        embeds = TensorSpec(name="image_embeds", shape=(1, vision.tokens, hidden), dtype="float32")
        problems += validate_graph(folder / VISION, vision.inputs, [embeds])
    return problems


def validate_graph(file: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[Problem]:
    """Return how a graph's inputs, outputs and external weights differ from what they must be; order is free.

    Raises:
        BadInput: not a readable ONNX file.
    """
    graph = read_graph(file).graph
    weights = {weight.name for weight in graph.initializer}
    problems = list(_compared(file, "input", inputs, [value for value in graph.input if value.name not in weights]))
    problems += _compared(file, "output", outputs, graph.output)
    return [*problems, *_external(file, graph.initializer)]


def read_graph(file: Path) -> onnx.ModelProto:
    """Return an ONNX model; weights that lie beside it are not read.

    Raises:
        BadInput: not a readable ONNX file.
    """
    try:
        model = onnx.load(file, load_external_data=False)
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})", where=file) from None
    except Exception as error:  # noqa: BLE001 - protobuf's errors have no common base
        raise BadInput(f"not a readable ONNX file ({error})", where=file) from None
    if not model.graph.output:
        raise BadInput("not an ONNX model: it has no outputs", where=file)
    return model


def stored_signature(file: Path) -> Signature | None:
    """Return the signature that a decoder carries in its metadata, if it does.

    Raises:
        BadInput: not a readable ONNX file, or a damaged signature.
    """
    stored = next((entry.value for entry in read_graph(file).metadata_props if entry.key == METADATA), None)
    try:
        return None if stored is None else Signature.model_validate_json(stored)
    except ValidationError as error:
        raise BadInput(f"the signature in its metadata is damaged ({first_problem(error)})", where=file) from None


def external_file(file: Path, weight: onnx.TensorProto) -> Path:
    """Return where a weight outside of ``file`` lies.

    Raises:
        BadInput: not in the same folder; a model's files must stay together.
    """
    location = next((entry.value for entry in weight.external_data if entry.key == "location"), "")
    if not location or Path(location).name != location:
        raise BadInput(f"the weight {weight.name} lies outside of the model's folder ({location})", where=file)
    return file.parent / location


def _figures(file: Path, wanted: Signature, stored: Signature) -> Iterator[Problem]:
    """Compare what the signature in a decoder's metadata says of it, and its inputs and outputs do not show."""
    figures = [(name, getattr(wanted.shape, name), getattr(stored.shape, name)) for name in _UNSEEN]
    if stored.n is None:
        figures.append(("cache", wanted.cache, stored.cache))
    for name, expected, found in figures:
        if expected != found:
            yield Problem(file.name, "figure", name, "value", f"{expected:g}", f"{found:g}")


def _compared(
    file: Path, what: Literal["input", "output"], wanted: Sequence[TensorSpec], found: Sequence[onnx.ValueInfoProto]
) -> Iterator[Problem]:
    specs = {spec.name: spec for spec in wanted}
    seen = set()
    for value in found:
        name, spec = value.name, specs.get(value.name)
        if name in seen:
            yield Problem(file.name, what, name, "duplicate")
        elif spec is None:
            yield Problem(file.name, what, name, "unexpected")
        else:
            shape, dtype = _declared(value)
            if shape != spec.shape:
                yield Problem(file.name, what, name, "shape", _listed(spec.shape), _listed(shape))
            if dtype != spec.dtype:
                yield Problem(file.name, what, name, "dtype", spec.dtype, dtype)
        seen.add(name)
    for spec in wanted:
        if spec.name not in seen:
            yield Problem(file.name, what, spec.name, "missing", f"{spec.dtype} {_listed(spec.shape)}")


def _declared(value: onnx.ValueInfoProto) -> tuple[tuple[int | str, ...], str]:
    tensor = value.type.tensor_type
    shape = tuple(
        dim.dim_value if dim.WhichOneof("value") == "dim_value" else dim.dim_param or "?" for dim in tensor.shape.dim
    )
    return shape, _dtype(tensor.elem_type) if tensor.elem_type else "none"


def _dtype(kind: int) -> str:
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(kind)).name
    except KeyError:
        return f"type {kind}"


def _listed(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _external(file: Path, weights: Sequence[onnx.TensorProto]) -> Iterator[Problem]:
    """Find weights beside the graph that are not there, cut off, or of another size than their shape says."""
    for weight in weights:
        if weight.data_location != TensorProto.EXTERNAL:
            continue
        at = external_file(file, weight)
        entries = {entry.key: entry.value for entry in weight.external_data}
        size = _size(weight)
        offset, length = entries.get("offset", "0"), entries.get("length", str(size))
        if length != str(size) or not offset.isdecimal():
            yield Problem(file.name, "weight", weight.name, "weights", f"{size} bytes", f"{length} bytes at {offset}")
            continue
        end = int(offset) + size
        if not at.is_file():
            yield Problem(file.name, "weight", weight.name, "missing", at.name)
        elif at.stat().st_size < end:
            there = f"{at.stat().st_size} bytes"
            yield Problem(file.name, "weight", weight.name, "weights", f"{at.name} of {end} bytes or more", there)


def _size(weight: onnx.TensorProto) -> int:
    """Return a weight's bytes; two values of 4 bit share one."""
    count: int = math.prod(weight.dims)
    if weight.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return (count + 1) // 2
    return count * int(helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize)
