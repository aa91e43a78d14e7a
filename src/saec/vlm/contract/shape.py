"""The figures of a decoder, read in one place from a checkpoint's configuration. Llama and Qwen2 families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from saec.errors import BadInput

DecoderFamily = Literal["llama", "qwen2"]

_FAMILIES: Mapping[str, DecoderFamily] = {"llama": "llama", "qwen2": "qwen2"}

_EVERY = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
}
_DEFAULTS: Mapping[DecoderFamily, Mapping[str, Any]] = {
    "llama": {**_EVERY, "vocab_size": 32_000, "intermediate_size": 11_008, "max_position_embeddings": 2048},
    "qwen2": {**_EVERY, "vocab_size": 151_936, "intermediate_size": 22_016, "max_position_embeddings": 32_768},
}
"""What ``LlamaConfig`` and ``Qwen2Config`` take for keys that are left out, as those of LLaVA-1.5 are."""


class DecoderShape(BaseModel):
    """A decoder of RMSNorm, grouped-query attention with rotary positions, and SwiGLU.

    ``qkv_bias`` and ``o_bias`` say which projections of the attention have a bias. ``tied``: the output projection is
    the embedding table. ``max_positions`` is what the model was trained for, in tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: DecoderFamily
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, multiple_of=2)
    max_positions: int = Field(gt=0)
    rope_theta: float = Field(gt=0)
    rms_eps: float = Field(gt=0)
    qkv_bias: bool = False
    o_bias: bool = False
    tied: bool = True


def read_shape(config: Mapping[str, Any], *, where: object) -> DecoderShape:
    """Return the shape in a Hugging Face ``config.json``: a decoder's own, or the text part of a VLM's.

    Raises:
        BadInput: another architecture, or a feature that the decoder graph does not have (scaled rotary positions,
            sliding windows, other activations); the message names it.
    """
    text = _part(config, "text_config", where) or _part(config, "llm_config", where) or config
    kind = str(text.get("model_type", "none"))
    family = _FAMILIES.get(kind)
    if family is None:
        known = ", ".join(sorted(_FAMILIES))
        raise BadInput(f"unknown architecture {kind}", where=where, fix=f"decoders of {known} can be exported")
    _refuse_unknown(text, where)
    text = {**_DEFAULTS[family], **text}
    rope = _part(text, "rope_parameters", where)
    bias = bool(text.get("attention_bias", False))
    try:
        heads = int(text["num_attention_heads"])
        hidden = int(text["hidden_size"])
        return DecoderShape(
            family=family,
            vocab_size=text["vocab_size"],
            hidden_size=hidden,
            intermediate_size=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or hidden // heads,
            max_positions=text["max_position_embeddings"],
            rope_theta=rope.get("rope_theta") or text.get("rope_theta") or 10_000.0,
            rms_eps=text["rms_norm_eps"],
            qkv_bias=family == "qwen2" or bias,
            o_bias=family == "llama" and bias,
            tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        problem = " ".join(str(error).split())[:200]
        raise BadInput(f"the configuration cannot be used ({problem})", where=where) from None


def _part(config: Mapping[str, Any], key: str, where: object) -> Mapping[str, Any]:
    """Return a part of the configuration, empty where there is none."""
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise BadInput(f"the configuration cannot be used ({key} is no object)", where=where)
    return found


def _refuse_unknown(text: Mapping[str, Any], where: object) -> None:
    scaling, parameters = _part(text, "rope_scaling", where), _part(text, "rope_parameters", where)
    kind = scaling.get("rope_type") or scaling.get("type") or parameters.get("rope_type") or "default"
    problems = {
        f"rotary positions of type {kind}": kind != "default",
        "a sliding window": bool(text.get("use_sliding_window")),
        f"the activation {text.get('hidden_act')}": text.get("hidden_act", "silu") != "silu",
        "a bias in its MLP": bool(text.get("mlp_bias")),
    }
    for what, there in problems.items():
        if there:
            raise BadInput(f"the decoder has {what}, which cannot be exported", where=where)
