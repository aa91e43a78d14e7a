"""What is compiled: the decoder of a bundle, or any ONNX file, and the fixed graph that devices want of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from saec.data.hashing import sha256_file
from saec.errors import BadInput
from saec.vlm.contract.bundle import DECODER, BundleFile, read_bundle
from saec.vlm.contract.signature import Signature, TensorSpec
from saec.vlm.export.decoder import METADATA, build_decoder
from saec.vlm.export.reread import GraphWeights
from saec.vlm.export.rewrite import spec_of
from saec.vlm.export.validate import external_file, read_graph, stored_signature


@dataclass(frozen=True, slots=True)
class Source:
    """A graph to compile: the one in ``file``, or (``rebuilt``) another of the same model, built from its weights.

    ``quantised``: its weights and activations have ranges of their own (QDQ), which would be lost.
    """

    file: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    signature: Signature | None = None
    quantised: bool = False
    rebuilt: bool = False

    def files(self) -> Mapping[str, BundleFile]:
        """Return size and hash of the file and of the weights beside it."""
        names = [self.file, *sorted(_weights(read_graph(self.file), self.file))]
        return {path.name: BundleFile(size=path.stat().st_size, sha256=sha256_file(path)) for path in names}

    def fixed(self, new_tokens: int) -> Source:
        """Return a source of fixed dimensions; a decoder's for ``new_tokens`` at a time, in float16.

        Raises:
            BadInput: a free dimension in a graph that is no decoder, or no room for that many tokens.
        """
        if self.signature is None:
            free = [
                f"{spec.name} {list(spec.shape)}" for spec in self.inputs if any(isinstance(d, str) for d in spec.shape)
            ]
            if free:
                raise BadInput(
                    f"devices want fixed dimensions, not {free[0]}", where=self.file, fix="export them fixed"
                )
            return self
        if self.signature.n is not None and (self.quantised or self.signature.dtype == "float16"):
            return self
        room = self.signature.context - new_tokens
        if room <= 0:
            raise BadInput(f"no room for {new_tokens} new tokens", where=f"a context of {self.signature.context}")
        wanted = self.signature.model_copy(update={"n": new_tokens, "cache": room, "dtype": "float16"})
        return replace(self, signature=wanted, inputs=wanted.inputs, outputs=wanted.outputs, rebuilt=True)

    def graph(self, folder: Path) -> Path:
        """Return the ONNX file to compile, built in ``folder`` if it has to be.

        Raises:
            BadInput: the weights in the file are not floats.
        """
        if not self.rebuilt or self.signature is None:
            return self.file
        made = build_decoder(self.signature, GraphWeights(self.file, self.signature.shape), "float16")
        made.save(folder / DECODER, metadata={METADATA: self.signature.model_dump_json()})
        return folder / DECODER


def open_source(target: Path) -> Source:
    """Return the decoder of a bundle, or the graph in an ONNX file.

    Raises:
        BadInput: neither is there, or the file is damaged.
    """
    bundle = read_bundle(target) if target.is_dir() else None
    file = target / DECODER if bundle else target
    model = read_graph(file)
    for path in _weights(model, file):
        if not path.is_file():
            raise BadInput("the graph's weights are missing", where=path, fix="keep them beside the graph")
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(spec_of(each) for each in model.graph.input if each.name not in weights)
    outputs = tuple(spec_of(each) for each in model.graph.output)
    quantised = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    signature = bundle.signature if bundle else stored_signature(file)
    return Source(file, inputs, outputs, signature, quantised)


def _weights(model: onnx.ModelProto, file: Path) -> set[Path]:
    outside = (each for each in model.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL)
    return {external_file(file, weight) for weight in outside}
