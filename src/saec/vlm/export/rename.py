"""Renaming the cache tensors of a decoder between the styles ``dot`` and ``genie``; the graph stays what it is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import onnx
from onnx import AttributeProto, TensorProto, helper

from saec.data.manifest import write_atomic
from saec.errors import BadInput
from saec.vlm.contract.signature import Style, kv_name
from saec.vlm.export.decoder import METADATA
from saec.vlm.export.validate import external_file, read_graph, stored_signature

_NUMBER = r"(?P<layer>0|[1-9][0-9]*)"
_PATTERNS = {
    "dot": re.compile(rf"(?P<when>past_key_values|present)\.{_NUMBER}\.(?P<part>key|value)"),
    "genie": re.compile(rf"past_(?P<part>key|value)_{_NUMBER}_(?P<when>in|out)"),
}


def rename(source: Path, style: Style, out: Path) -> list[Path]:
    """Write ``source`` with its cache tensors called in ``style`` to ``out``; return the files written.

    Weights that lie beside the graph are copied beside ``out``. Nothing is computed anew, so logits stay bit-equal.

    Raises:
        BadInput: not a readable model, nothing to rename, a new name that is taken, another file in the way, or an
            ``out`` that cannot be written; then nothing stays of it.
    """
    if out.exists():
        raise BadInput("there is a file already", where=out, fix="pass another --out")
    model = read_graph(source)
    names = _renamed(model.graph, style, source)
    for graph in _graphs(model.graph):
        _apply(graph, names)
    if (signature := stored_signature(source)) is not None:
        called = signature.model_copy(update={"style": style})
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        helper.set_model_props(model, metadata | {METADATA: called.model_dump_json()})
    weights = _weights(source, model.graph, out.parent)
    written = []
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for file in weights:
            written.append(out.parent / file.name)
            shutil.copyfile(file, written[-1])
        write_atomic(out, model.SerializeToString())
    except BaseException as error:
        for copy in written:
            copy.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise BadInput(f"cannot be written ({error.strerror})", where=out) from None
    return [out, *written]


def _renamed(graph: onnx.GraphProto, style: Style, source: Path) -> dict[str, str]:
    """Return old -> new name of all cache tensors that are called in the other style: a bijection.

    Raises:
        BadInput: there are none, or a new name is taken.
    """
    ends = [value.name for value in (*graph.input, *graph.output)]
    other: Style = "genie" if style == "dot" else "dot"
    found = {name: match for name in ends if (match := _PATTERNS[other].fullmatch(name))}
    if not found:
        raise BadInput(f"no cache tensor is called in style {other}", where=source)
    names = {}
    taken = set(_values(graph))
    for name, match in found.items():
        when: Literal["past", "present"] = "past" if match["when"] in ("past_key_values", "in") else "present"
        new = kv_name(style, when, int(match["layer"]), match["part"])
        if new in taken:
            raise BadInput(f"{name} cannot be called {new}: that name is taken", where=source)
        names[name] = new
    return names


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and those inside its nodes, which may use its values."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
            for each in inner:
                yield from _graphs(each)


def _values(graph: onnx.GraphProto) -> Iterator[str]:
    for each in _graphs(graph):
        yield from (value.name for value in (*each.input, *each.output, *each.initializer, *each.value_info))
        for node in each.node:
            yield from (*node.input, *node.output)


def _apply(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _weights(source: Path, graph: onnx.GraphProto, folder: Path) -> list[Path]:
    """Return the weights beside ``source`` that have to be copied into ``folder``.

    Raises:
        BadInput: they are missing, or others are in their place.
    """
    outside: Iterable[onnx.TensorProto] = (w for w in graph.initializer if w.data_location == TensorProto.EXTERNAL)
    wanted = []
    for file in sorted({external_file(source, weight) for weight in outside}):
        target = folder / file.name
        if not file.is_file():
            raise BadInput("the weights are missing", where=file, fix="export the model again")
        if not target.exists():
            wanted.append(file)
        elif not target.samefile(file):
            raise BadInput("there is a file already", where=target, fix="pass --out in another folder")
    return wanted
