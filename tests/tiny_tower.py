"""A tiny random Loupe in two halves: a tower for the edge, and a bundle that takes its tokens. No torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from saec.vlm.contract.bundle import (
    BASIS,
    DECODER,
    EMBEDDING,
    LOWER,
    PROJECTOR,
    TOKENIZER,
    TOWER_RECORD,
    UPPER,
    VISION,
    Bundle,
    Prompt,
    Tower,
    write_bundle,
)
from saec.vlm.export.decoder import build_decoder
from saec.vlm.export.embedding import build_embedding
from saec.vlm.export.linear import Array
from saec.vlm.export.vision_dinov2 import loupe_lower, loupe_projector, loupe_upper, loupe_vision
from saec.vlm.loupe.inputs import LOUPE
from tiny_bundle import RandomWeights, tiny_signature, tiny_tokenizer

TOWER_ID = "tiny-tower:1"
HEADS, SPLIT = 2, 6


def tower_weights(width: int = 8, *, seed: int = 0) -> dict[str, Array]:
    """Weights under the names of Dinov2Model, as many blocks as Loupe looks at."""
    rng = np.random.default_rng(seed)

    def drawn(*shape: int, mean: float = 0.0, std: float = 0.4) -> Array:
        return (mean + std * rng.standard_normal(shape)).astype(np.float32)

    def norm(name: str) -> dict[str, Array]:
        return {f"{name}.weight": drawn(width, mean=1), f"{name}.bias": drawn(width)}

    def linear(name: str, out: int, into: int) -> dict[str, Array]:
        return {f"{name}.weight": drawn(out, into, std=into**-0.5), f"{name}.bias": drawn(out, std=0.1)}

    made = {
        "embeddings.cls_token": drawn(1, 1, width),
        "embeddings.position_embeddings": drawn(1, 1 + LOUPE.patches**2, width),
        "embeddings.patch_embeddings.projection.weight": drawn(width, 3, LOUPE.patch, LOUPE.patch, std=0.1),
        "embeddings.patch_embeddings.projection.bias": drawn(width),
        **norm("layernorm"),
    }
    for number in range(max(LOUPE.tower_layers)):
        at = f"encoder.layer.{number}"
        made |= norm(f"{at}.norm1") | norm(f"{at}.norm2")
        for part in "qkvo":
            made |= linear(f"{at}.attention.{part}_proj", width, width)
        made |= linear(f"{at}.mlp.fc1", 2 * width, width) | linear(f"{at}.mlp.fc2", width, 2 * width)
        made |= {f"{at}.layer_scale{n}.lambda1": drawn(width, mean=0.5, std=0.1) for n in (1, 2)}
    return made


def projector_weights(width: int = 8, hidden: int = 32) -> dict[str, Array]:
    """Weights under the names of :class:`saec.vlm.loupe.model.Projector`."""
    rng, wide = np.random.default_rng(5), LOUPE.merge**2 * len(LOUPE.tower_layers) * width
    cells = LOUPE.merge**2

    def drawn(*shape: int) -> Array:
        return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    return {
        "norm.weight": 1 + drawn(wide),
        "norm.bias": drawn(wide),
        "visual.weight": drawn(hidden, wide),
        "visual.bias": drawn(hidden),
        "map.0.weight": drawn(4, 2 * cells),
        "map.0.bias": drawn(4),
        "map.2.weight": drawn(hidden, 4),
        "map.2.bias": drawn(hidden),
        "scale": np.float32(1.0),
    }


def save_basis(file: Path, width: int = 8) -> None:
    """All of the width, turned: nothing is lost but by rounding."""
    wide = LOUPE.merge**2 * len(LOUPE.tower_layers) * width
    turned, _ = np.linalg.qr(np.random.default_rng(9).standard_normal((wide, wide)))
    turned = turned.astype(np.float32)
    save_file({"mean": np.zeros(wide, np.float32), "down": turned, "up": turned}, file)


def save_tower(folder: Path, *, width: int = 8, seed: int = 0, model_id: str = TOWER_ID) -> Path:
    """Write a tower's folder and return it."""
    folder.mkdir(parents=True)
    weights = tower_weights(width, seed=seed)
    lower, state = loupe_lower(weights, "float32", heads=HEADS, split=SPLIT)
    upper, masks, tokens = loupe_upper(weights, "float32", heads=HEADS, split=SPLIT)
    lower.save(folder / LOWER)
    upper.save(folder / UPPER)
    save_basis(folder / BASIS, width)
    record = Tower(
        name="tiny",
        model_id=model_id,
        fingerprint="f" * 64,
        state=state,
        masks=masks,
        tokens=tokens,
        preprocess=LOUPE.preprocess,
    )
    write_bundle(folder, record, TOWER_RECORD)
    return folder


def save_loupe(folder: Path, *, width: int = 8) -> Path:
    """Write the bundle of a Loupe with the same tower and return its folder."""
    folder.mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    signature = tiny_signature(tokenizer)
    decoder = RandomWeights(signature.shape)
    build_decoder(signature, decoder, "float32").save(folder / DECODER)
    build_embedding(decoder.array("model.embed_tokens.weight"), "float32").save(folder / EMBEDDING)
    projector = projector_weights(width, signature.shape.hidden_size)
    graph, vision = loupe_vision(tower_weights(width), projector, "float32", heads=HEADS)
    graph.save(folder / VISION)
    loupe_projector(projector).save(folder / PROJECTOR)
    save_basis(folder / BASIS, width)
    tokenizer.save(str(folder / TOKENIZER))
    ids = tokenizer.get_vocab()
    bundle = Bundle(
        name="tiny",
        family="loupe",
        model_id="tiny-loupe@float32+p2",
        fingerprint="0" * 64,
        precision="float32",
        signature=signature,
        vision=vision,
        tower=TOWER_ID,
        prompt=Prompt(image_token=LOUPE.image_token, labels=(ids["0"], ids["1"]), ends=(ids["<|im_end|>"],)),
    )
    write_bundle(folder, bundle)
    return folder
