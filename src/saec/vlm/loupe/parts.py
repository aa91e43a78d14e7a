"""The torch model put together from Loupe's real parts: the tower, and the language model dequantised to float32."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from saec.errors import BadInput
from saec.vlm.gguf import LlamaGguf
from saec.vlm.loupe.model import Loupe, LoupeConfig, Projector
from saec.vlm.loupe.tower import TOWER, tower_weights


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
    config = LoupeConfig(text_config=text, vision_config=dict(TOWER), attn_implementation=attention)
    with torch.device("meta"):
        model = Loupe(config)
    state = {f"vision_tower.{name}": torch.from_numpy(array) for name, array in tower_weights(tower).items()}
    state["vision_tower.embeddings.mask_token"] = torch.zeros(1, TOWER["hidden_size"])  # of training; never used here
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
