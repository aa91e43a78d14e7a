"""From a float32 bundle to one of fewer bits, with what that costs measured on real questions and recorded.

The decoder is built anew by the exporter from the float32 graph's weights; the vision graph's constant matrix products
are emitted anew by the same function. Ranges of activations are found on real prompts, never on noise.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper
from pydantic import BaseModel, ConfigDict

from saec.data.hashing import sha256_json
from saec.data.manifest import write_atomic
from saec.errors import BadInput
from saec.vlm.contract.bundle import (
    BASIS,
    DECODER,
    EMBEDDING,
    PROJECTOR,
    TOKENIZER,
    VISION,
    Bundle,
    write_bundle,
)
from saec.vlm.contract.signature import Signature
from saec.vlm.export.bundle import whole
from saec.vlm.export.calibrate import write_w8a16
from saec.vlm.export.decoder import METADATA, build_decoder
from saec.vlm.export.embedding import build_embedding
from saec.vlm.export.quality import Asked, Example, losses
from saec.vlm.export.reread import GraphWeights
from saec.vlm.export.rewrite import rounded_products

Format = Literal["int8", "int4", "w8a16"]

RECORD = "quantization.json"
"""In the new bundle: what it was made from, and on which files it was calibrated and measured."""

LEAST = 4
"""Examples to measure on, and to calibrate with, at least."""


class Named(BaseModel):
    """A file and its hash."""

    model_config = ConfigDict(frozen=True)

    name: str
    sha256: str


class Quantization(BaseModel):
    """``quantization.json``. ``calibration`` is empty where only weights are rounded."""

    model_config = ConfigDict(frozen=True)

    source: str
    to: Format
    calibration: tuple[Named, ...]
    measured: tuple[Named, ...]
    quality: dict[str, float | int]


def quantize(
    folder: Path,
    to: Format,
    examples: Sequence[Example],
    out: Path,
    *,
    n: int = 32,
    calibrate: int = 32,
    progress: Callable[[str], None] | None = None,
) -> Bundle:
    """Write a float32 bundle again in another format, whole or not at all; return its record.

    Args:
        folder: the float32 bundle.
        to: ``int8`` and ``int4`` for CPUs; ``w8a16`` for NPUs, with fixed dimensions.
        examples: real ones. For w8a16 the first ``calibrate`` of them give the ranges, the others measure.
        out: a folder that is not there yet, or is empty.
        n: new tokens of a step, for w8a16.
        calibrate: see ``examples``.
        progress: told what is under way.

    Raises:
        BadInput: a bundle of another precision, too few different examples, or an ``out`` that is in use.
    """
    tell = progress or (lambda what: None)
    used = calibrate if to == "w8a16" else 0
    examples = list({example.sha256: example for example in examples}.values())
    if len(examples) < used + LEAST or 0 < used < LEAST:
        what = f"{len(examples)} different examples are too few: {max(used, LEAST if used else 0)} calibrate, "
        raise BadInput(f"{what}{LEAST} or more others measure", fix="pass more real ones; noise is no substitute")
    source = Asked(folder)
    if source.bundle.precision != "float32":
        fix = "export the model with --precision float32 and pass that bundle"
        raise BadInput(f"a bundle in {source.bundle.precision} was rounded already", where=folder, fix=fix)
    tell("asking the float32 model")
    measured = examples[used:]
    before = [source.logits(example) for example in measured]
    prompts = [source.embeddings(example) for example in examples[:used]]
    bundle = source.bundle
    del source
    with whole(out) as new:
        tell("rounding")
        signature = _write(folder, bundle.signature, to, prompts, new, n)
        rounded = _renamed(bundle, to, signature, examples[:used])
        write_bundle(new, rounded)
        tell("asking the rounded model")
        asked = Asked(new)
        quality = losses(bundle.prompt.labels, before, [asked.logits(example) for example in measured])
        record = Quantization(
            source=bundle.model_id,
            to=to,
            calibration=_named(examples[:used]),
            measured=_named(measured),
            quality=dict(quality),
        )
        write_atomic(new / RECORD, record.model_dump_json(indent=1) + "\n")
        return write_bundle(new, rounded.model_copy(update={"quality": {**bundle.quality, **quality}}))


def _write(
    folder: Path, signature: Signature, to: Format, prompts: Sequence[np.ndarray], new: Path, n: int
) -> Signature:
    """Write all files but the record; return the signature of the decoder."""
    weights = GraphWeights(folder / DECODER, signature.shape)
    if to == "w8a16":
        fixed = {"n": n, "cache": signature.context - n, "logits": "all"}
        if n >= signature.context:
            raise BadInput(f"no room for {n} new tokens", where=f"a context of {signature.context}")
        signature = signature.model_copy(update=fixed)
        with tempfile.TemporaryDirectory(dir=new.parent) as scratch:
            write_w8a16(signature, weights, prompts, new / DECODER, Path(scratch))
        copied = [EMBEDDING, VISION]
    else:
        decoder = build_decoder(signature, weights, to)
        decoder.save(new / DECODER, metadata={METADATA: signature.model_dump_json()})
        del decoder
        build_embedding(_table(folder / EMBEDDING), to).save(new / EMBEDDING)
        if (folder / VISION).is_file():
            rounded_products(folder / VISION, "int8").save(new / VISION)  # closer than int4, and as fast
        copied = []
    for name in (*copied, PROJECTOR, BASIS):
        for file in folder.glob(f"{Path(name).stem}.*"):
            shutil.copyfile(file, new / file.name)
    shutil.copyfile(folder / TOKENIZER, new / TOKENIZER)
    return signature


def _renamed(bundle: Bundle, to: Format, signature: Signature, calibration: Sequence[Example]) -> Bundle:
    made_of = [bundle.fingerprint, to, signature.model_dump_json(), [example.sha256 for example in calibration]]
    update = {
        "precision": to,
        "signature": signature,
        "model_id": bundle.model_id.replace("@float32", f"@{to}"),
        "fingerprint": sha256_json(made_of),
    }
    return bundle.model_copy(update=update)


def _table(file: Path) -> np.ndarray:
    (table,) = (each for each in onnx.load(file).graph.initializer if each.name == "table")
    return np.asarray(numpy_helper.to_array(table), np.float32)


def _named(examples: Sequence[Example]) -> tuple[Named, ...]:
    return tuple(Named(name=example.name, sha256=example.sha256) for example in examples)
