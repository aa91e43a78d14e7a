"""Opening what is exported: decoder, vision and prompt of Loupe, of a Hugging Face folder, or of a GGUF file."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from saec.data.hashing import sha256_file
from saec.errors import BadInput
from saec.vlm.contract.bundle import BASIS, PROJECTOR, Precision, Prompt, Vision
from saec.vlm.contract.shape import DecoderShape
from saec.vlm.export.decoder import DecoderWeights
from saec.vlm.export.graph import Graph
from saec.vlm.export.hf_files import label_ids, read_preprocess, read_prompt, read_tokenizer
from saec.vlm.export.linear import Array
from saec.vlm.export.lora import Adapter, beside, decoder_modules, merged, read_adapter
from saec.vlm.export.source import Source
from saec.vlm.export.vision_clip import llava_vision, smolvlm_vision
from saec.vlm.export.vision_dinov2 import loupe_projector, loupe_vision
from saec.vlm.export.vision_torch import fastvlm_vision
from saec.vlm.export.weights import Tensors, open_checkpoint, open_decoder, open_gguf
from saec.vlm.loupe import LANGUAGE_FILE, TOKEN_BASIS, TOWER_FILE
from saec.vlm.loupe.inputs import LoupePrompts
from saec.vlm.loupe.tower import TOWER, tower_weights
from saec.vlm.trained import read_record

MakeVision = Callable[[Precision, Path], Vision]
"""Writes the vision graph into a file and returns what it is."""


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """Everything that a bundle is made of."""

    shape: DecoderShape
    weights: DecoderWeights
    tokenizer: Tokenizer
    prompt: Prompt
    vision: MakeVision | None = None
    tokens: Callable[[Path], str] | None = None
    """Writes into a folder what takes tokens in place of an image, and returns the id of the tower that makes them."""


@dataclass(frozen=True, slots=True)
class _Modules:
    """What a family calls its parts: ``text``, ``tower`` and ``connector`` as adapters name them, in memory; the other
    two are weights by which tower and connector are found in the files."""

    text: str
    tower: str = ""
    connector: str = ""
    tower_weight: str = "embeddings.patch_embedding.weight"
    connector_weight: str = "multi_modal_projector.linear_1.weight"


_MODULES = {
    "text": _Modules("model."),
    "loupe": _Modules("language_model.model.", "vision_tower.", "projector."),
    "llava": _Modules("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
    "smolvlm": _Modules(
        "model.text_model.",
        "model.vision_model.",
        "model.connector.",
        connector_weight="connector.modality_projection.proj.weight",
    ),
    "fastvlm": _Modules("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
}


def open_source(source: Source, precision: Precision) -> Opened:
    """Return the parts of a source, its adapter merged; for int4 it stays beside the decoder's stored 4-bit blocks.

    Raises:
        BadInput: a file is missing or damaged, or something that cannot be exported; the message names it.
    """
    adapter = None if source.adapter is None else read_adapter(source.adapter)
    if source.family == "loupe":
        opened = _loupe(source, adapter)
    else:
        opened = _folder(source, adapter) if source.place.is_dir() else _gguf(source)
    if adapter is None:
        return opened
    modules = _MODULES[source.family]
    if source.family in ("text", "fastvlm"):  # the tower of the latter gets its adapter from PyTorch
        inside = {modules.connector + part for part in ("linear_1", "linear_2")} if modules.connector else set()
        adapter.require(decoder_modules(opened.shape, modules.text) | inside)
    attach = beside if precision == "int4" else merged
    return replace(opened, weights=attach(opened.weights, adapter, modules.text))


def _loupe(source: Source, adapter: Adapter | None) -> Opened:
    gguf = open_gguf(source.place / LANGUAGE_FILE)
    tower, projector = _loupe_vision(source, adapter, gguf.shape)
    build = partial(loupe_vision, tower, projector, heads=TOWER["num_attention_heads"])
    tokenizer = gguf.tokenizer()
    prompts = LoupePrompts(tokenizer)
    prompt = Prompt(image_token=prompts.image_token, labels=prompts.label_tokens, ends=(prompts.end,))
    vision = _writer(build, source.place)
    if adapter is None:
        return Opened(gguf.shape, gguf, tokenizer, prompt, vision)
    takes = partial(_takes_tokens, projector, _tower_id(source, adapter))
    return Opened(gguf.shape, gguf, tokenizer, prompt, vision, takes)


def open_tower(source: Source) -> tuple[dict[str, Array], str]:
    """Return the weights of Loupe's tower, its adapter merged, and the tower's model id.

    Raises:
        BadInput: another family's model, or a file that is missing or damaged.
    """
    if source.family != "loupe" or source.adapter is None:
        what = f"{source.family} gives no tokens to send"
        raise BadInput(what, where=source.name, fix="set tokens.model to loupe, or cloud.uplink to image or crop")
    adapter = read_adapter(source.adapter)
    tower, _ = _loupe_vision(source, adapter, open_gguf(source.place / LANGUAGE_FILE).shape)
    return tower, _tower_id(source, adapter)


def _tower_id(source: Source, adapter: Adapter) -> str:
    """Name a tower by a hash of what it is made from: merging an adapter rounds otherwise on another machine."""
    at, digest = _MODULES["loupe"].tower, hashlib.sha256(source.base.encode())
    for path, side in sorted(adapter.sides.items()):
        if path.startswith(at):
            digest.update(path.encode() + side.a.tobytes() + side.b.tobytes())
    for path, values in sorted(adapter.saved.items()):
        if path.startswith(at):
            digest.update(path.encode() + values.tobytes())
    return f"{source.name}-tower:{digest.hexdigest()[:8]}+basis:{sha256_file(TOKEN_BASIS)[:8]}"


def _takes_tokens(projector: Mapping[str, Array], tower_id: str, folder: Path) -> str:
    """Write what turns tokens that were sent into visual tokens; return the id of the tower that makes them."""
    loupe_projector(projector).save(folder / PROJECTOR)
    shutil.copyfile(TOKEN_BASIS, folder / BASIS)
    return tower_id


def _loupe_vision(
    source: Source, adapter: Adapter | None, shape: DecoderShape
) -> tuple[dict[str, Array], dict[str, Array]]:
    modules, tower = _MODULES["loupe"], tower_weights(source.place / TOWER_FILE)
    if adapter is None:
        return tower, {}
    saved, at = adapter.saved, modules.connector
    projector = {name.removeprefix(at): values for name, values in saved.items() if name.startswith(at)}
    adapter.require(_changeable(shape, modules, tower, projector))
    return _adapted(tower, adapter, modules.tower), projector


def _gguf(source: Source) -> Opened:
    gguf = open_gguf(source.place)
    if gguf.end is None:
        raise BadInput("the file names no token that ends an answer", where=source.place)
    tokenizer = gguf.tokenizer()
    prompt = Prompt(labels=label_ids(tokenizer), ends=(gguf.end,), template=gguf.chat_template)
    return Opened(gguf.shape, gguf, tokenizer, prompt)


def _folder(source: Source, adapter: Adapter | None) -> Opened:
    shape, weights = open_decoder(source.place)
    config = read_record(source.place / "config.json")
    tokenizer = read_tokenizer(source.place)
    opened = Opened(shape, weights, tokenizer, read_prompt(source.place, config, tokenizer))
    if source.family == "fastvlm":
        return replace(opened, vision=partial(fastvlm_vision, source.place, source.adapter))
    if source.family == "text":
        return opened
    return replace(opened, vision=_tower(source, adapter, config, shape))


def _tower(source: Source, adapter: Adapter | None, config: Mapping[str, Any], shape: DecoderShape) -> MakeVision:
    modules, tensors = _MODULES[source.family], open_checkpoint(source.place)
    tower = _found(tensors, modules.tower_weight, modules.tower_weight, source.place)
    inside = modules.connector_weight.partition(".")[2]
    connector = _found(tensors, modules.connector_weight, inside, source.place)
    if adapter is not None:
        adapter.require(_changeable(shape, modules, tower, connector))
        tower, connector = _adapted(tower, adapter, modules.tower), _adapted(connector, adapter, modules.connector)
    make = llava_vision if source.family == "llava" else smolvlm_vision
    return _writer(partial(make, config, tower, connector, how=partial(read_preprocess, source.place)), source.place)


def _writer(build: Callable[..., tuple[Graph, Vision]], where: Path) -> MakeVision:
    def write(precision: Precision, file: Path) -> Vision:
        try:
            graph, vision = build(precision=precision)
        except KeyError as error:
            raise BadInput(f"the vision graph lacks the weight or figure {error}", where=where) from None
        graph.save(file)
        return vision

    return write


def _found(tensors: Tensors, weight: str, inside: str, folder: Path) -> dict[str, Array]:
    """Return the weights beside the one that ends in ``weight``, under their names from ``inside`` on."""
    stored = [name for name in tensors.shapes if f".{name}".endswith(f".{weight}")]
    if len(stored) != 1:
        raise BadInput(f"{len(stored)} weights are called {weight}, one tells where its module begins", where=folder)
    prefix = stored[0].removesuffix(inside)
    return {name.removeprefix(prefix): tensors.array(name) for name in tensors.shapes if name.startswith(prefix)}


def _changeable(
    shape: DecoderShape, modules: _Modules, tower: Mapping[str, Array], connector: Mapping[str, Array]
) -> set[str]:
    """Return the paths of all modules that an adapter may change."""
    found = decoder_modules(shape, modules.text)
    for prefix, weights in ((modules.tower, tower), (modules.connector, connector)):
        found |= {prefix.removesuffix(".")} if weights else set()
        found |= {prefix + name.removesuffix(".weight") for name, values in weights.items() if values.ndim == 2}
    return found


def _adapted(weights: Mapping[str, Array], adapter: Adapter, prefix: str) -> dict[str, Array]:
    """Return weights with an adapter's LoRA merged, and those replaced that it saved whole."""
    return {
        name: adapter.saved.get(prefix + name, adapter.merged(prefix + name.removesuffix(".weight"), values))
        for name, values in weights.items()
    }
