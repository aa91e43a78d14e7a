"""What the small files of a Hugging Face checkpoint say: tokenizer, chat template, end tokens, preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from saec.errors import BadInput
from saec.vlm.contract.bundle import TOKENIZER, Preprocess, Prompt
from saec.vlm.prompt import LABELS, PREFILL
from saec.vlm.trained import read_record

_IMAGE_TOKEN = ("image_token_index", "image_token_id")


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer in ``tokenizer.json``.

    Raises:
        BadInput: it is missing or damaged.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        fix = "load the tokenizer with transformers and save it again: the fast tokenizers write this file"
        raise BadInput(f"the checkpoint has no {TOKENIZER}", where=folder, fix=fix)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the tokenizers library has no errors of its own
        raise BadInput(f"the tokenizer cannot be read ({error})", where=file) from None


def read_prompt(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> Prompt:
    """Return image token, labels, ends and chat template of a checkpoint.

    Raises:
        BadInput: no token ends an answer.
    """
    image_token = next((int(config[key]) for key in _IMAGE_TOKEN if config.get(key) is not None), None)
    ends = _ends(folder, config, tokenizer)
    if not ends:
        raise BadInput("the checkpoint names no token that ends an answer", where=folder, fix="set eos_token_id")
    return Prompt(image_token=image_token, labels=label_ids(tokenizer), ends=ends, template=_template(folder))


def label_ids(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Return the ids of 0 and 1 after the prefill; ``None`` where one is not a token of its own there."""
    before = tokenizer.encode(PREFILL, add_special_tokens=False).ids
    found = []
    for label in LABELS:
        after = tokenizer.encode(PREFILL + label, add_special_tokens=False).ids
        if after[:-1] != before:
            return None
        found.append(int(after[-1]))
    return found[0], found[1]


def read_preprocess(folder: Path, side: int) -> Preprocess:
    """Return how images of a checkpoint become squares of ``side`` pixels, the rest being the mean colour.

    Where the checkpoint's own processor pads, the image is in the middle; elsewhere in the corner, so that boxes are
    in pixels of the image.

    Raises:
        BadInput: no mean or standard deviation of pixels is given, or what is given are not three numbers each.
    """
    own, processor = (_record(folder / name) for name in ("preprocessor_config.json", "processor_config.json"))
    found = {**processor.get("image_processor", {}), **own}
    try:
        mean, std = (tuple(map(float, found[key])) for key in ("image_mean", "image_std"))
        return Preprocess(
            side=side,
            place="centre" if found.get("do_pad") and found.get("do_center_crop") else "corner",
            fill=tuple(float(round(255 * value)) for value in mean),
            mean=mean,
            std=std,
        )
    except KeyError as error:
        raise BadInput(f"the processor's configuration lacks {error}", where=folder) from None
    except (TypeError, ValueError):
        what = "image_mean and image_std of the processor's configuration are not three numbers each"
        raise BadInput(what, where=folder) from None


def _ends(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    text = config.get("text_config") or {}
    stated = [_record(folder / "generation_config.json"), text, config]
    found = next((one["eos_token_id"] for one in stated if one.get("eos_token_id") is not None), ())
    try:
        ends = {int(end) for end in (found if isinstance(found, list | tuple) else [found])}
    except (TypeError, ValueError):
        raise BadInput(f"eos_token_id is no token's id: {found}", where=folder) from None
    named = _record(folder / "tokenizer_config.json").get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    own = None if named is None else tokenizer.token_to_id(named)
    return tuple(sorted(ends | ({own} if own is not None else set())))


def _template(folder: Path) -> str | None:
    """Return the chat template: in a file of its own, or among what the processor or the tokenizer says."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise BadInput("the chat template is not text in UTF-8", where=file) from None
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = _record(folder / name).get("chat_template")
        if isinstance(found, list):  # several by name
            found = next((one["template"] for one in found if one.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def _record(file: Path) -> dict[str, Any]:
    return read_record(file) if file.is_file() else {}
