"""Hugging Face processors for still images only, on Pillow.

The stock processors of the Qwen and SmolVLM families insist on a video processor, which needs torchvision; the classes
here leave video out and read the same files, also those of the hub's repositories.

Sizes are the question's business (:mod:`saec.vlm.prompt`): a processor that would cut off what does not fit into its
square, or enlarge and tile, is set not to. What it must still resize, it resizes whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import (
    LlavaProcessor,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)

from saec.errors import BadInput


class Qwen2_5_VLImages(Qwen2_5_VLProcessor):
    """Qwen2.5-VL (and Qwen2-VL) without video."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.image_token_id = _special(tokenizer, "<|image_pad|>")
        self.video_token, self.video_token_id = _special(tokenizer, "<|video_pad|>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Qwen3VLImages(Qwen3VLProcessor):
    """Qwen3-VL without video."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.image_token_id = _special(tokenizer, "<|image_pad|>")
        self.video_token, self.video_token_id = _special(tokenizer, "<|video_pad|>")
        self.vision_start_token, self.vision_start_token_id = _special(tokenizer, "<|vision_start|>")
        self.vision_end_token, self.vision_end_token_id = _special(tokenizer, "<|vision_end|>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class SmolVLMImages(SmolVLMProcessor):
    """SmolVLM without video, and each image as one tile: a part is shown at most as large as a tile anyway."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_len: int = 169,
        chat_template: str | None = None,
    ) -> None:
        image_processor.do_image_splitting = False
        image_processor.size = image_processor.max_image_size
        self.fake_image_token, _ = _special(tokenizer, "<fake_token_around_image>")
        self.image_token, self.image_token_id = _special(tokenizer, "<image>")
        self.end_of_utterance_token, _ = _special(tokenizer, "<end_of_utterance>")
        self.global_image_token, _ = _special(tokenizer, "<global-img>")
        self.video_token = "<video>"  # noqa: S105 - not a password
        self.image_seq_len = image_seq_len
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


PROCESSORS: dict[str, type[ProcessorMixin]] = {
    "qwen2_vl": Qwen2_5_VLImages,
    "qwen2_5_vl": Qwen2_5_VLImages,
    "qwen3_vl": Qwen3VLImages,
    "smolvlm": SmolVLMImages,
    "llava": LlavaProcessor,
    "fast_vlm": LlavaProcessor,
}
"""By ``model_type`` of the checkpoint's ``config.json``."""


def load_processor(folder: Path) -> Any:
    """Return the processor of a checkpoint folder, padding on the left.

    Raises:
        BadInput: no readable ``config.json``, a family that is not known here, or files that do not load.
    """
    family = model_type(folder)
    stock = PROCESSORS.get(family)
    if stock is None:
        raise BadInput(f"a {family} model is not supported", where=folder, fix=f"supported: {', '.join(PROCESSORS)}")
    try:
        processor = stock.from_pretrained(folder, local_files_only=True, backend="pil", padding_side="left")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise BadInput(f"the processor cannot be loaded ({error})", where=folder) from error
    return processor


def model_type(folder: Path) -> str:
    """Return the family that a checkpoint's ``config.json`` names.

    Raises:
        BadInput: no such file, or it names none.
    """
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError) as error:
        fix = "pass the folder of a Hugging Face checkpoint, or a name that saec models list knows"
        raise BadInput(f"not a model ({error})", where=folder, fix=fix) from None


def _special(tokenizer: Any, token: str) -> tuple[str, int]:
    number = tokenizer.convert_tokens_to_ids(token)
    if number is None or number == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no {token}")
    return token, int(number)
