"""Vision graphs of LLaVA (a CLIP or SigLIP tower and an MLP) and SmolVLM (SigLIP, pixel shuffle, one product).

LLaVA: Liu et al., CVPR 2024; SmolVLM: Marafioti et al., 2025. SmolVLM's image is one tile: a part is shown at most as
large as a tile, and tiles of tiles cost a prefill of thousands of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from saec.errors import BadInput
from saec.vlm.contract.bundle import Precision, Preprocess, Vision
from saec.vlm.contract.signature import TensorSpec
from saec.vlm.export.graph import Graph
from saec.vlm.export.linear import Array, Linear
from saec.vlm.export.vision_layers import Block, Tower, Weights, linear_of, norm_of

_SIGLIP = {"siglip_vision_model": 12, "smolvlm_vision": 16}
_CLIP = "clip_vision_model"

_DEFAULTS: dict[str, dict[str, Any]] = {
    _CLIP: {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    **{
        kind: {"num_attention_heads": heads, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
        for kind, heads in _SIGLIP.items()
    },
}
"""What Transformers takes where a checkpoint's configuration is silent."""


def llava_vision(
    config: Mapping[str, Any],
    tower: Weights,
    connector: Weights,
    precision: Precision,
    how: Callable[[int], Preprocess],
) -> tuple[Graph, Vision]:
    """Return LLaVA's graph from ``pixel_values`` [1, 3, S, S] to ``image_embeds`` [1, T, H].

    Args:
        config: the checkpoint's ``config.json``.
        tower: weights from ``embeddings.`` and ``encoder.`` on.
        connector: weights of ``multi_modal_projector``.
        precision: of the matrix products.
        how: gives the preprocessing to record for a square of so many pixels.

    Raises:
        BadInput: a tower that is neither CLIP nor SigLIP, or features of several layers.
        KeyError: a weight or a figure is missing; its name is the error's text.
    """
    figures = _figures(config, tower)
    chosen = config.get("vision_feature_layer", -2)
    if not isinstance(chosen, int) or not -figures.blocks - 1 <= chosen <= figures.blocks:
        raise BadInput(f"features of layer {chosen} of {figures.blocks} of a vision tower cannot be exported")
    made, pixels, inputs = _begun(figures, precision)
    x = _encoded(made, pixels, tower, figures, blocks=chosen % (figures.blocks + 1))
    tokens = figures.patches**2 + (figures.kind == _CLIP)
    if config.get("vision_feature_select_strategy", "default") == "default":
        x, tokens = made.without_class(x), tokens - 1
    inner = made.active(made.linear(x, linear_of(connector, "linear_1")), config.get("projector_hidden_act", "gelu"))
    out = linear_of(connector, "linear_2")
    embeds = made.linear(inner, out)
    return made.finish(embeds, Vision(inputs=inputs, tokens=tokens, preprocess=how(figures.side)), out.sizes[0])


def smolvlm_vision(
    config: Mapping[str, Any],
    tower: Weights,
    connector: Weights,
    precision: Precision,
    how: Callable[[int], Preprocess],
) -> tuple[Graph, Vision]:
    """Return SmolVLM's graph; ``connector`` has the weight ``modality_projection.proj``; see :func:`llava_vision`."""
    figures, factor = _figures(config, tower), int(config.get("scale_factor", 2))
    made, pixels, inputs = _begun(figures, precision)
    x = _encoded(made, pixels, tower, figures, blocks=figures.blocks)
    x = made.norm(x, "post_layernorm", *norm_of(tower, "post_layernorm"))
    out = linear_of(connector, "modality_projection.proj")
    embeds = made.linear(made.merged(x, figures.patches, factor, channels=figures.hidden), out)
    vision = Vision(inputs=inputs, tokens=(figures.patches // factor) ** 2, preprocess=how(figures.side))
    return made.finish(embeds, vision, out.sizes[0])


@dataclass(frozen=True, slots=True)
class _Figures:
    """A tower's sizes, which its weights tell, and what only the configuration says."""

    kind: str
    blocks: int
    hidden: int
    side: int
    patches: int
    stated: Mapping[str, Any]


def _figures(config: Mapping[str, Any], tower: Weights) -> _Figures:
    stated = config["vision_config"]
    kind = str(stated.get("model_type"))
    if kind not in _DEFAULTS:
        raise BadInput(f"unknown vision tower {kind}", fix=f"towers of {', '.join(_DEFAULTS)} can be exported")
    hidden, _, patch, _ = tower["embeddings.patch_embedding.weight"].shape
    patches = math.isqrt(len(tower["embeddings.position_embedding.weight"]))  # CLIP's class token makes no difference
    blocks = len({name.split(".")[2] for name in tower if name.startswith("encoder.layers.")})
    blocks = int(stated.get("num_hidden_layers", blocks))
    return _Figures(kind, blocks, hidden, patches * patch, patches, {**_DEFAULTS[kind], **stated})


def _begun(figures: _Figures, precision: Precision) -> tuple[Tower, str, tuple[TensorSpec, ...]]:
    stated = figures.stated
    heads, eps, activation = (stated[key] for key in ("num_attention_heads", "layer_norm_eps", "hidden_act"))
    made = Tower(precision, heads=heads, eps=eps, activation=activation)
    spec = TensorSpec(name="pixel_values", shape=(1, 3, figures.side, figures.side), dtype="float32")
    return made, made.input(spec), (spec,)


def _encoded(made: Tower, pixels: str, tower: Weights, figures: _Figures, *, blocks: int) -> str:
    """Return the hidden states [1, T, width] after so many blocks."""
    positions: Array = tower["embeddings.position_embedding.weight"]
    kernel = tower["embeddings.patch_embedding.weight"]
    x = made.patches(pixels, kernel, figures.side)
    if figures.kind == _CLIP:
        first = (tower["embeddings.class_embedding"] + positions[0]).reshape(1, 1, -1)
        x = made.add(x, "positions", positions[None, 1:])
        x = made.graph.op("Concat", made.graph.weight("class", first.astype(made.dtype)), x, axis=1)
        x = made.norm(x, "pre_layrnorm", *norm_of(tower, "pre_layrnorm"))  # the checkpoints spell it so
    else:
        x = made.add(x, "positions", positions[None] + tower["embeddings.patch_embedding.bias"])
    for number in range(blocks):
        x = made.block(x, _block(tower, f"encoder.layers.{number}"))
    return x


def _block(tower: Weights, at: str) -> Block:
    layers: list[Linear] = [linear_of(tower, f"{at}.self_attn.{part}_proj") for part in ("q", "k", "v", "out")]
    layers += [linear_of(tower, f"{at}.mlp.{part}") for part in ("fc1", "fc2")]
    return Block((norm_of(tower, f"{at}.layer_norm1"), norm_of(tower, f"{at}.layer_norm2")), *layers)
