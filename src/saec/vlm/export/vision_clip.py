"""Vision graphs of LLaVA (a CLIP or SigLIP tower and an MLP) and SmolVLM (SigLIP, pixel shuffle, one product).

LLaVA: Liu et al., CVPR 2024; SmolVLM: Marafioti et al., 2025. SmolVLM's image is one tile: a part is shown at most as
large as a tile, and tiles of tiles cost a prefill of thousands of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saec.errors import BadInput
from saec.vlm.contract.bundle import Precision, Preprocess, Vision
from saec.vlm.contract.signature import TensorSpec
from saec.vlm.export.graph import Graph
from saec.vlm.export.linear import Array, Linear
from saec.vlm.export.vision_layers import Block, Tower, Weights, linear_of, norm_of

_SIGLIP = ("siglip_vision_model", "smolvlm_vision", "idefics3_vision")
_CLIP = "clip_vision_model"

# What Transformers takes for a CLIP or SigLIP tower where its configuration is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    _CLIP: {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    **{kind: {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6} for kind in _SIGLIP},
}


def llava_vision(
    config: Mapping[str, Any], tower: Weights, connector: Weights, precision: Precision, how: Preprocess
) -> tuple[Graph, Vision]:
    """Return LLaVA's graph from ``pixel_values`` [1, 3, S, S] to ``image_embeds`` [1, T, H].

    Args:
        config: the checkpoint's ``config.json``.
        tower: weights from ``embeddings.`` and ``encoder.`` on.
        connector: weights of ``multi_modal_projector``.
        precision: of the matrix products.
        how: the preprocessing to record.

    Raises:
        BadInput: a tower that is neither CLIP nor SigLIP, or features of several layers.
        KeyError: a weight or a figure is missing; its name is the error's text.
    """
    figures = _figures(config)
    chosen = config.get("vision_feature_layer", -2)
    if not isinstance(chosen, int):
        raise BadInput("a vision tower with features of several layers cannot be exported", where=str(chosen))
    layers = figures["num_hidden_layers"]
    made, pixels, inputs = _begun(figures, precision)
    x = _encoded(made, pixels, tower, figures, blocks=chosen if chosen >= 0 else layers + 1 + chosen)
    tokens = (figures["image_size"] // figures["patch_size"]) ** 2
    if figures["model_type"] == _CLIP:
        if config.get("vision_feature_select_strategy", "default") == "default":
            x = made.without_class(x)
        else:
            tokens += 1
    inner = made.active(made.linear(x, linear_of(connector, "linear_1")), config.get("projector_hidden_act", "gelu"))
    out = linear_of(connector, "linear_2")
    embeds = made.linear(inner, out)
    return made.finish(embeds, Vision(inputs=inputs, tokens=tokens, preprocess=how), out.sizes[0])


def smolvlm_vision(
    config: Mapping[str, Any], tower: Weights, connector: Weights, precision: Precision, how: Preprocess
) -> tuple[Graph, Vision]:
    """Return SmolVLM's graph; ``connector`` has the weight ``modality_projection.proj``; see :func:`llava_vision`."""
    figures, factor = _figures(config), int(config.get("scale_factor", 2))
    side = figures["image_size"] // figures["patch_size"]
    made, pixels, inputs = _begun(figures, precision)
    x = _encoded(made, pixels, tower, figures, blocks=figures["num_hidden_layers"])
    x = made.norm(x, "post_layernorm", *norm_of(tower, "post_layernorm"))
    out = linear_of(connector, "modality_projection.proj")
    embeds = made.linear(made.merged(x, side, factor, channels=figures["hidden_size"]), out)
    vision = Vision(inputs=inputs, tokens=(side // factor) ** 2, preprocess=how)
    return made.finish(embeds, vision, out.sizes[0])


def _figures(config: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(config["vision_config"])
    kind = str(found.get("model_type"))
    if kind not in _DEFAULTS:
        raise BadInput(f"unknown vision tower {kind}", fix=f"towers of {', '.join(_DEFAULTS)} can be exported")
    return {**_DEFAULTS[kind], **found}


def _begun(figures: Mapping[str, Any], precision: Precision) -> tuple[Tower, str, tuple[TensorSpec, ...]]:
    made = Tower(
        precision,
        heads=figures["num_attention_heads"],
        eps=figures["layer_norm_eps"],
        activation=figures["hidden_act"],
    )
    side = figures["image_size"]
    spec = TensorSpec(name="pixel_values", shape=(1, 3, side, side), dtype="float32")
    return made, made.input(spec), (spec,)


def _encoded(made: Tower, pixels: str, tower: Weights, figures: Mapping[str, Any], *, blocks: int) -> str:
    """Return the hidden states [1, T, width] after so many blocks."""
    positions: Array = tower["embeddings.position_embedding.weight"]
    kernel = tower["embeddings.patch_embedding.weight"]
    x = made.patches(pixels, kernel, figures["image_size"])
    if figures["model_type"] == _CLIP:
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
