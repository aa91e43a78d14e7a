"""From a checkpoint to a bundle: all graphs of a VLM, its tokenizer, and the record of what they are."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from saec.errors import BadInput
from saec.vlm.contract.bundle import DECODER, EMBEDDING, TOKENIZER, VISION, Bundle, Precision, Vision, write_bundle
from saec.vlm.contract.shape import DecoderShape
from saec.vlm.contract.signature import Signature
from saec.vlm.export.checkpoint import Opened, open_source
from saec.vlm.export.decoder import METADATA, build_decoder
from saec.vlm.export.embedding import build_embedding
from saec.vlm.export.source import PARTS, Layout, Part, find_source
from saec.vlm.sources import FULL

ROOM = 64
"""A context must hold an image's tokens and at least this many of text."""

CONTEXTS = {"loupe": 512}
"""Tokens of a conversation where nothing is said: prompts of this project's own model are short."""

OTHERS_CONTEXT = 2048


def export_bundle(
    model: str,
    out: Path,
    *,
    precision: Precision = "int8",
    context: int | None = None,
    adapter: Path | None = None,
    n: int | None = None,
    parts: Sequence[Part] = PARTS,
    layout: Layout | None = None,
    progress: Callable[[str], None] | None = None,
) -> Bundle:
    """Write a model's graphs, tokenizer and record into ``out``, whole or not at all; return the record.

    Args:
        model: a name of the registry, a checkpoint's folder, or a GGUF file of a decoder.
        out: a folder that is not there yet, or is empty.
        precision: of the matrix products. The vision graph of an int4 bundle is int8, which is closer to the model and
            faster at hundreds of rows; FastVLM's is float32.
        context: tokens of a conversation; by default 512 for Loupe, 2048 for others.
        adapter: LoRA to merge; Loupe has its own by default.
        n: new tokens of a step, all dimensions of the decoder fixed, as NPUs want it; ``None`` leaves them free.
        parts: which graphs to write.
        layout: of the decoder.
        progress: told what is under way.

    Raises:
        BadInput: a model or an adapter that cannot be exported, a context that is too small or too large, or an ``out``
            that is in use or cannot be written.
    """
    layout, tell = layout or Layout(), progress or (lambda what: None)
    source = find_source(model, adapter)
    tell("reading")
    opened = open_source(source, precision)
    _check_tokens(opened, source.place)
    with whole(out) as folder:
        vision = tower = None
        if opened.vision is not None and "vision" in parts:
            tell("vision")
            vision = opened.vision("int8" if precision == "int4" else precision, folder / VISION)
            tower = None if opened.tokens is None else opened.tokens(folder)
        room = context or min(CONTEXTS.get(source.family, OTHERS_CONTEXT), opened.shape.max_positions)
        signature = _signature(opened.shape, precision, room, n, layout, vision)
        if "decoder" in parts:
            tell("decoder")
            decoder = build_decoder(signature, opened.weights, precision)
            metadata = {METADATA: signature.model_dump_json()}
            decoder.save(folder / DECODER, external=not layout.embedded, metadata=metadata)
            del decoder  # and its weights
        if "embed" in parts and layout.embeddings == "outside":
            tell("embeddings")
            table = opened.weights.array("model.embed_tokens.weight")
            build_embedding(table, precision).save(folder / EMBEDDING, external=not layout.embedded)
        opened.tokenizer.save(str(folder / TOKENIZER))
        bundle = Bundle(
            name=source.name,
            family=source.family,
            model_id=source.model_id(precision),
            fingerprint=source.fingerprint(precision, context=context, n=n, parts=parts, layout=layout),
            precision=precision,
            signature=signature,
            vision=vision,
            tower=tower,
            prompt=opened.prompt,
        )
        return write_bundle(folder, bundle)


def _check_tokens(opened: Opened, where: Path) -> None:
    """Refuse a tokenizer of another checkpoint: tokens that have no embedding, or none that stands for an image."""
    prompt, ids = opened.prompt, opened.tokenizer.get_vocab(with_added_tokens=False).values()
    largest = max(*ids, *prompt.ends, prompt.image_token or 0)
    fix = "take tokenizer, configuration and weights from one checkpoint"
    if largest >= opened.shape.vocab_size:
        what = f"the tokenizer or the configuration has token {largest}, the decoder {opened.shape.vocab_size} tokens"
        raise BadInput(what, where=where, fix=fix)
    if opened.vision is not None and prompt.image_token is None:
        raise BadInput("the configuration does not say which token stands for an image", where=where, fix=fix)


def _signature(
    shape: DecoderShape, precision: Precision, context: int, n: int | None, layout: Layout, vision: Vision | None
) -> Signature:
    least = (vision.tokens if vision else 0) + max(ROOM, n or 1)
    if context < least:
        what = f"a context of {context} tokens is too small: image, question and answer need {least}"
        raise BadInput(what, where="context", fix=f"pass {least} or more")
    if context > shape.max_positions:
        what = f"a context of {context} tokens is too large: the model was trained for {shape.max_positions}"
        raise BadInput(what, where="context")
    return Signature(
        shape=shape,
        cache=context - (n or 1),
        n=n,
        dtype="float16" if precision == "float16" else "float32",
        style=layout.style,
        rope=layout.rope,
        embeddings=layout.embeddings,
        logits="last" if n is None else "all",  # whoever lets a prompt in wants the next token
    )


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Lend a folder beside ``out`` and put it there at the end; nothing stays of a failure.

    Raises:
        BadInput: ``out`` is in use, or cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BadInput("this is in use", where=out, fix="choose another folder, or remove this one")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            yield new
            new.replace(out)
    except OSError as error:
        what = "the disk is full" if error.errno in FULL else f"cannot be written ({error.strerror})"
        raise BadInput(what, where=out) from None
