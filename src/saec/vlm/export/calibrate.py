"""W8A16 for NPUs: 8-bit weights and 16-bit activations of the matrix products, ranges found on real prompts.

ONNX Runtime's static quantisation with its QNN configuration (``get_qnn_qdq_config``). Weights have one scale for each
output: with one for the whole matrix, Loupe's P(defect) moved by 0.08 on average, so by 0.003. Norms, softmax and
rotations stay floats, which HTPs compute in float16, and so does the down projection (:data:`KEPT`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType
from onnxruntime.quantization import quantize as quantize_graph
from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

from saec.vlm.contract.signature import Signature
from saec.vlm.edge.kv import Cache
from saec.vlm.edge.session import open_graph
from saec.vlm.export.decoder import METADATA, DecoderWeights, build_decoder
from saec.vlm.export.feeds import Feeds, step_feeds

KEPT = "mlp.down_proj"
"""Its input holds a decoder's outliers: with it in 16 bits, what QNN and the CPU make of the same graph of Loupe came
apart by up to 0.8 in the logits of real prompts, in half precision by 0.2."""

_FLOAT, _ROUNDED = "float.onnx", "rounded.onnx"


def write_w8a16(
    signature: Signature, weights: DecoderWeights, prompts: Sequence[NDArray[Any]], file: Path, scratch: Path
) -> None:
    """Write a decoder of fixed dimensions in W8A16; its weights lie in ``<stem>.bin``.

    ``prompts`` are the embeddings [tokens, H] of whole prompts; each is run step by step as on the device. ``scratch``
    gets files of 4 times the parameters' number of bytes.

    Raises:
        ValueError: no prompts: ranges are not guessed.
    """
    if not prompts:
        raise ValueError("calibration needs prompts")
    build_decoder(signature, weights, "float32", half=True).save(scratch / _FLOAT)
    nodes = onnx.load(scratch / _FLOAT, load_external_data=False).graph
    constant = {each.name for each in nodes.initializer}
    products = [node for node in nodes.node if node.op_type == "MatMul"]
    rounded = [node for node in products if node.input[1] in constant and KEPT not in node.name]
    weight = {"axis": 1, "quant_type": QuantType.QInt8, "symmetric": True}
    config = get_qnn_qdq_config(
        scratch / _FLOAT,
        _Steps(scratch / _FLOAT, signature, prompts),
        activation_type=QuantType.QUInt16,
        weight_type=QuantType.QInt8,
        init_overrides={node.input[1]: [weight] for node in rounded},
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=[node.name for node in products if node not in rounded],
    )
    config.use_external_data_format = True
    logging.getLogger().addFilter(_no_advice)
    try:
        quantize_graph(scratch / _FLOAT, scratch / _ROUNDED, config)
    finally:
        logging.getLogger().removeFilter(_no_advice)
    model = onnx.load(scratch / _ROUNDED)
    onnx.helper.set_model_props(model, {METADATA: signature.model_dump_json()})
    onnx.save(model, file, save_as_external_data=True, location=file.with_suffix(".bin").name, size_threshold=1024)
    file.with_suffix(".bin").chmod(0o644)  # onnx keeps it for its owner


class _Steps(CalibrationDataReader):
    """All steps of all prompts, the cache filled in by the float graph."""

    def __init__(self, graph: Path, signature: Signature, prompts: Sequence[NDArray[Any]]) -> None:
        self._graph = open_graph(graph, threads=2)
        self._signature = signature
        self._feeds = self._all(prompts)

    def get_next(self) -> Feeds | None:
        return next(self._feeds, None)

    def _all(self, prompts: Sequence[NDArray[Any]]) -> Iterator[Feeds]:
        size = self._signature.n or 1
        names = [spec.name for spec in self._signature.present]
        for prompt in prompts:
            cache = Cache(self._signature)
            for begin in range(0, len(prompt), size):
                new = prompt[begin : begin + size]
                feeds = step_feeds(self._signature, cache, new)
                yield feeds
                made = self._graph.run(names, feeds)
                keys, values = np.stack(made[::2]), np.stack(made[1::2])
                cache.append(keys[..., -len(new) :], values[..., -len(new) :, :])


def _no_advice(record: logging.LogRecord) -> bool:
    """Leave out ONNX Runtime's advice to pre-process a graph that was written for it."""
    return "pre-processing" not in record.getMessage()
