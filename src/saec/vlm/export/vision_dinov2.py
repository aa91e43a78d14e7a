"""Loupe's vision graph: a DINOv2 tower (Oquab et al., TMLR 2024), two blocks' patches, and the projector with the map.

The same computation as :meth:`saec.vlm.loupe.model.Loupe.see`; layer scales are folded into the weights before them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saec.vlm.contract.bundle import Precision, Vision
from saec.vlm.contract.signature import TensorSpec
from saec.vlm.export.graph import Graph
from saec.vlm.export.linear import emit
from saec.vlm.export.vision_layers import Block, Tower, Weights, linear_of, norm_of, resized_positions, scaled
from saec.vlm.loupe.inputs import LOUPE, LoupeSizes

EPS, PROJECTOR_EPS = 1e-6, 1e-5
"""Of the tower's layer normalisations, and of the projector's."""


def loupe_vision(
    tower: Weights, projector: Weights, precision: Precision, *, heads: int, sizes: LoupeSizes = LOUPE
) -> tuple[Graph, Vision]:
    """Return the graph from ``pixel_values`` [1, 3, S, S] and ``anomaly_map`` [1, P, P] to ``image_embeds`` [1, T, H].

    Args:
        tower: weights under the names of ``Dinov2Model``, adapter merged.
        projector: weights under the names of :class:`saec.vlm.loupe.model.Projector`.
        precision: of the matrix products.
        heads: of the tower's attention.
        sizes: of the picture.

    Raises:
        KeyError: a weight is missing; its name is the error's text.
    """
    made = Tower(precision, heads=heads, eps=EPS, activation="gelu")
    side, patches = sizes.image_side, sizes.patches
    inputs = (
        TensorSpec(name="pixel_values", shape=(1, 3, side, side), dtype="float32"),
        TensorSpec(name="anomaly_map", shape=(1, patches, patches), dtype="float32"),
    )
    pixels, anomaly_map = (made.input(spec) for spec in inputs)
    seen = _seen(made, pixels, tower, sizes)
    embeds = _projected(made, seen, _standardised(made, anomaly_map, sizes), projector, sizes)
    hidden = len(projector["visual.bias"])
    vision = Vision(inputs=inputs, tokens=sizes.image_tokens, preprocess=sizes.preprocess)
    return made.finish(embeds, vision, hidden)


def loupe_lower(
    tower: Weights, precision: Precision, *, heads: int, split: int, sizes: LoupeSizes = LOUPE
) -> tuple[Graph, TensorSpec]:
    """Return the graph of the first ``split`` blocks, ``pixel_values`` to ``state``, and what the state is."""
    made = Tower(precision, heads=heads, eps=EPS, activation="gelu")
    pixels = made.input(TensorSpec(name="pixel_values", shape=(1, 3, *[sizes.image_side] * 2), dtype="float32"))
    x = _embedded(made, pixels, tower, sizes)
    for number in range(split):
        x = made.block(x, _block(tower, f"encoder.layer.{number}"))
    width = tower["embeddings.cls_token"].size
    state = TensorSpec(name="state", shape=(1, 1 + sizes.patches**2, width), dtype="float32")
    made.graph.output(state, x)
    return made.graph, state


def loupe_upper(
    tower: Weights, precision: Precision, *, heads: int, split: int, sizes: LoupeSizes = LOUPE
) -> tuple[Graph, TensorSpec, TensorSpec]:
    """Return the graph of the other blocks, ``state`` and ``masks`` [2 blocks, 1, T, width] to ``tokens`` [1, L, W],
    and what masks and tokens are.

    What each block's two branches add is multiplied with a mask: with ones it is the tower that the model has, with
    zeros and 1 / (1 - p) it is dropout inside the network (Gal and Ghahramani, ICML 2016). The tokens are those that
    the projector takes.
    """
    made = Tower(precision, heads=heads, eps=EPS, activation="gelu")
    graph, count = made.graph, 2 * (max(sizes.tower_layers) - split)
    width = tower["embeddings.cls_token"].size
    rows = 1 + sizes.patches**2
    state = made.input(TensorSpec(name="state", shape=(1, rows, width), dtype="float32"))
    masks_spec = TensorSpec(name="masks", shape=(count, 1, rows, width), dtype="float32")
    whole = graph.ops("Split", made.input(masks_spec), outputs=count, axis=0, num_outputs=count)
    masks = [graph.op("Squeeze", each, graph.ints(0)) for each in whole]
    seen = _blocks(made, state, tower, sizes, first=split, masks=masks)
    wide = width * len(sizes.tower_layers)
    spec = TensorSpec(name="tokens", shape=(1, sizes.image_tokens, sizes.merge**2 * wide), dtype="float32")
    graph.output(spec, made.merged(seen, sizes.patches, sizes.merge, channels=wide))
    return graph, masks_spec, spec


def loupe_projector(projector: Weights, sizes: LoupeSizes = LOUPE) -> Graph:
    """Return the graph from standardised ``tokens`` [1, L, W] and ``anomaly_map`` [1, P, P] to ``image_embeds``.

    Standardised is what layer normalisation makes of a token before its scale and shift: mean 0, variance 1.
    """
    made = Tower("float32", heads=1, eps=EPS, activation="gelu")
    scale, shift = norm_of(projector, "norm")
    tokens = made.input(TensorSpec(name="tokens", shape=(1, sizes.image_tokens, len(scale)), dtype="float32"))
    anomaly_map = made.input(TensorSpec(name="anomaly_map", shape=(1, sizes.patches, sizes.patches), dtype="float32"))
    x = made.add(
        made.graph.op("Mul", tokens, made.graph.weight("projector.norm.scale", scale)), "projector.norm.shift", shift
    )
    embeds = _mixed(made, x, _standardised(made, anomaly_map, sizes), projector)
    spec = TensorSpec(
        name="image_embeds", shape=(1, sizes.image_tokens, len(projector["visual.bias"])), dtype="float32"
    )
    made.graph.output(spec, embeds)
    return made.graph


def _seen(made: Tower, pixels: str, tower: Weights, sizes: LoupeSizes) -> str:
    """Return the normalised patches of the chosen blocks side by side: [1, patches, layers x width]."""
    return _blocks(made, _embedded(made, pixels, tower, sizes), tower, sizes)


def _embedded(made: Tower, pixels: str, tower: Weights, sizes: LoupeSizes) -> str:
    """Return the class token and the patches, with their positions: [1, 1 + patches, width]."""
    kernel = tower["embeddings.patch_embeddings.projection.weight"]
    positions = tower["embeddings.position_embeddings"][0]
    first = tower["embeddings.cls_token"].reshape(1, 1, -1) + positions[:1]
    grid = resized_positions(positions[1:], sizes.patches) + tower["embeddings.patch_embeddings.projection.bias"]
    x = made.add(made.patches(pixels, kernel, sizes.image_side), "positions", grid[None])
    return made.graph.op("Concat", made.graph.weight("class", first.astype(made.dtype)), x, axis=1)


def _blocks(
    made: Tower, x: str, tower: Weights, sizes: LoupeSizes, *, first: int = 0, masks: Sequence[str] | None = None
) -> str:
    """Return the normalised patches of the chosen blocks, from the state ``x`` after the ``first`` blocks on."""
    found = []
    for number in range(first, max(sizes.tower_layers)):
        both = None if masks is None else (masks[2 * (number - first)], masks[2 * (number - first) + 1])
        x = made.block(x, _block(tower, f"encoder.layer.{number}"), both)
        if number + 1 in sizes.tower_layers:
            found.append(made.without_class(made.norm(x, "layernorm", *norm_of(tower, "layernorm"))))
    return made.graph.op("Concat", *found, axis=-1)


def _block(tower: Weights, at: str) -> Block:
    queries, keys, values = (linear_of(tower, f"{at}.attention.{part}_proj") for part in "qkv")
    return Block(
        (norm_of(tower, f"{at}.norm1"), norm_of(tower, f"{at}.norm2")),
        queries,
        keys,
        values,
        scaled(linear_of(tower, f"{at}.attention.o_proj"), tower[f"{at}.layer_scale1.lambda1"]),
        linear_of(tower, f"{at}.mlp.fc1"),
        scaled(linear_of(tower, f"{at}.mlp.fc2"), tower[f"{at}.layer_scale2.lambda1"]),
    )


def _standardised(made: Tower, anomaly_map: str, sizes: LoupeSizes) -> str:
    """Return the standardised log map at the patches of each token: [1, T, merge^2]."""
    graph, dtype = made.graph, made.dtype
    logs = graph.op("Log", graph.op("Max", anomaly_map, graph.constant(1e-3, dtype)))
    centred = graph.op("Sub", logs, graph.constant(sizes.map_mean, dtype))
    standard = graph.op("Div", centred, graph.constant(sizes.map_std, dtype))
    return made.merged(standard, sizes.patches, sizes.merge, channels=1)


def _projected(made: Tower, seen: str, cells: str, weights: Weights, sizes: LoupeSizes) -> str:
    width = weights["norm.weight"].shape[0] // sizes.merge**2
    x = made.merged(seen, sizes.patches, sizes.merge, channels=width)
    return _mixed(made, made.norm(x, "projector.norm", *norm_of(weights, "norm"), eps=PROJECTOR_EPS), cells, weights)


def _mixed(made: Tower, x: str, cells: str, weights: Weights) -> str:
    """Return what the projector makes of normalised tokens and of the map's cells."""
    graph, plain = made.graph, made.dtype
    x = made.linear(x, linear_of(weights, "visual"))
    m = graph.op("Concat", cells, graph.op("Mul", cells, cells), axis=-1)
    m = made.active(emit(graph, m, linear_of(weights, "map.0"), plain), "gelu")
    m = emit(graph, m, linear_of(weights, "map.2"), plain)
    mixed = made.active(graph.op("Add", x, m), "gelu")
    return graph.op("Mul", mixed, graph.constant(np.asarray(weights["scale"]).reshape(()), made.dtype))
