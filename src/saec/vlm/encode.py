"""From a :class:`~saec.vlm.prompt.Question` to what a Hugging Face image-text-to-text model reads, and back to labels.

The prompt ends in ``Label: ``; the label is the next token. Its two ids are looked up from the tokenizer *in that
place*: the token that ``0`` becomes alone may be another one.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image as Pillow
from torch.nn.utils.rnn import pad_sequence

from saec.errors import BadInput
from saec.types import Image
from saec.vlm.prompt import LABELS, PREFILL, Question

IGNORED = -100
"""The label of tokens that the training loss leaves out; PyTorch's own default."""

Pictures = tuple[dict[str, torch.Tensor], ...]
"""The model's inputs of each image, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One encoded question.

    ``ids`` [L] int64 end after the prefill, or after the answer, which begins at ``answer_at``. The first ``shared``
    tokens, with ``shared_pictures`` images, begin every prompt of the product; ``shared_key`` names them and their
    pixels. Nothing is shared where the images cannot be told apart in the tokens.
    """

    ids: torch.Tensor
    pictures: Pictures
    answer_at: int
    shared: int = 0
    shared_pictures: int = 0
    shared_key: bytes = b""


class Encoder(ABC):
    """How questions become tensors for one model. Thread-safe.

    ``label_tokens`` are the ids of ``0`` and ``1`` as they follow the prefill; rows are filled up with ``padding``.
    """

    tokenizer: Any
    label_tokens: tuple[int, int]
    padding: int

    @abstractmethod
    def prepare(self, question: Question, answer: str | None = None) -> Encoded:
        """Encode one question: the part of the work that needs no model and no other question."""

    def encode(self, questions: Sequence[Question], answers: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Return the model's inputs for a batch of questions.

        Without answers they are padded on the left, so that the next token of every row comes after the last column.
        With answers they are padded on the right, and ``labels`` [B, L] int64 is -100 except on the answer's tokens
        and the end-of-turn token after it.
        """
        if answers is None:
            return self.collate([self.prepare(question) for question in questions])
        rows = [self.prepare(question, answer) for question, answer in zip(questions, answers, strict=True)]
        return self.collate(rows, pad_left=False)

    def collate(self, rows: Sequence[Encoded], *, pad_left: bool = True) -> dict[str, torch.Tensor]:
        """Return the inputs of a batch: input_ids, attention_mask (and labels) [B, L] int64, and the images'."""
        side = "left" if pad_left else "right"
        ids = [row.ids for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.padding, padding_side=side),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side),
        }
        if not pad_left:
            batch["labels"] = pad_sequence(
                [torch.cat([torch.full((row.answer_at,), IGNORED), row.ids[row.answer_at :]]) for row in rows],
                batch_first=True,
                padding_value=IGNORED,
            )
        return batch | stack([row.pictures for row in rows])


class ProcessorEncoder(Encoder):
    """The encoder of every model that comes with a Hugging Face processor.

    Raises:
        BadInput: a tokenizer that does not make one token each of the labels, or has no end-of-turn token.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token = int(processor.image_token_id)
        self._template = processor.chat_template or self.tokenizer.chat_template
        end = self.tokenizer.eos_token_id
        if end is None or not self._template:
            raise BadInput("the tokenizer has no end-of-turn token or no chat template", where=self._name)
        self._end = int(end)
        pad = self.tokenizer.pad_token_id
        self.padding = self._end if pad is None else int(pad)
        images = processor.image_processor
        self._crops = bool(getattr(images, "do_center_crop", False)) and not getattr(images, "do_pad", False)
        self._tails = {prefill: self._render("", ["."], prefill) for prefill in (PREFILL, "")}
        good, defect = (self._label_token(label) for label in LABELS)
        self.label_tokens = (good, defect)

    def prepare(self, question: Question, answer: str | None = None) -> Encoded:
        """Encode one question; see :class:`Encoder`."""
        images = [item for item in question.content if not isinstance(item, str)]
        text = self._render(question.system, question.content, question.prefill)
        shown = [_pillow(self._whole(image)) for image in images]
        inputs = self.processor(text=[text], images=shown or None, return_tensors="pt")
        ids = inputs["input_ids"][0]
        pictures = _split(inputs, len(images))
        answer_at = len(ids)
        if answer is not None:
            ids = torch.cat([ids, torch.tensor([*self._answer(question.prefill, answer), self._end])])
        shared_images = [item for item in question.content[: question.shared] if not isinstance(item, str)]
        shared = self._start_of_picture(ids, len(images), len(shared_images))
        key = _key(ids[:shared], shared_images)
        return Encoded(ids, pictures, answer_at, shared, len(shared_images), key)

    def collate(self, rows: Sequence[Encoded], *, pad_left: bool = True) -> dict[str, torch.Tensor]:
        """Return the inputs of a batch; see :class:`Encoder`."""
        batch = super().collate(rows, pad_left=pad_left)
        if getattr(self.processor, "return_mm_token_type_ids", False):
            batch["mm_token_type_ids"] = (batch["input_ids"] == self.image_token).long()
        return batch

    @property
    def _name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", ""))

    def _render(self, system: str, content: Sequence[str | Image], prefill: str) -> str:
        user = [{"type": "text", "text": item} if isinstance(item, str) else {"type": "image"} for item in content]
        chat = [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": user},
        ]
        if prefill:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": prefill}]})
        text = self.tokenizer.apply_chat_template(
            chat,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=not prefill,
            continue_final_message=bool(prefill),
        )
        if not text.endswith(prefill):
            raise BadInput(f"the chat template does not keep the answer's beginning {prefill!r}", where=self._name)
        return str(text)

    def _label_token(self, label: str) -> int:
        tail = self._tails[PREFILL]
        tokens = self._continuation(tail, label)
        if tokens is None or len(tokens) != 1:
            made = self.tokenizer.convert_ids_to_tokens(self._ids(PREFILL + label))
            raise BadInput(
                f"the label {label} is not one token: the tokenizer makes {made} of {PREFILL + label!r}",
                where=self._name,
                fix="use a model whose tokenizer keeps single digits apart",
            )
        return tokens[0]

    def _answer(self, prefill: str, answer: str) -> list[int]:
        """Return the answer's tokens as a model generates them, token by token, after the prompt's."""
        tail = self._tails.get(prefill)
        tokens = None if tail is None else self._continuation(tail, answer)
        return self._ids(answer) if tokens is None else tokens

    def _continuation(self, text: str, more: str) -> list[int] | None:
        """Return what ``more`` adds to the tokens of ``text``; ``None`` if it would change them."""
        before, after = self._ids(text), self._ids(text + more)
        return after[len(before) :] if after[: len(before)] == before else None

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _whole(self, image: Image) -> Image:
        """Return the image with a margin at right and bottom, where the processor would cut its longer side."""
        height, width = image.shape[:2]
        side = max(height, width)
        if not self._crops or height == width:
            return image
        grey = tuple(round(255 * mean) for mean in reversed(self.processor.image_processor.image_mean))
        border = cv2.BORDER_CONSTANT
        return np.asarray(cv2.copyMakeBorder(image, 0, side - height, 0, side - width, border, value=grey), np.uint8)

    def _start_of_picture(self, ids: torch.Tensor, pictures: int, number: int) -> int:
        """Return where the tokens of an image begin, 0 if not every image is one run of image tokens."""
        is_image = torch.cat([torch.zeros(1, dtype=torch.bool), ids == self.image_token])
        starts = (is_image[1:] & ~is_image[:-1]).nonzero().flatten()
        return int(starts[number]) if len(starts) == pictures > number else 0


def stack(rows: Sequence[Pictures]) -> dict[str, torch.Tensor]:
    """Return the image inputs of a batch in the layout of the model's family.

    Where a family wants [B, images, ...], rows with fewer images are filled up with zeros, which it skips.
    """
    names = next((pictures[0].keys() for pictures in rows if pictures), ())
    batch = {}
    for name in names:
        parts = [torch.cat([picture[name] for picture in pictures], dim=_axis(pictures[0])) for pictures in rows]
        nested = _axis(rows[0][0]) == 1
        batch[name] = pad_sequence([part[0] for part in parts], batch_first=True) if nested else torch.cat(parts)
    return batch


def _split(inputs: Mapping[str, torch.Tensor], count: int) -> Pictures:
    """Split what the processor made of a question's images into what it made of each."""
    kept = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask", "image_grid_thw") if name in inputs}
    if not count:
        return ()
    if "image_grid_thw" in kept:  # [patches, values] in one row, as many patches as the grid has cells
        grids = kept["image_grid_thw"]
        patches = torch.split(kept["pixel_values"], grids.prod(dim=1).tolist())
        return tuple(
            {"pixel_values": own, "image_grid_thw": grid[None]} for own, grid in zip(patches, grids, strict=True)
        )
    axis = _axis(kept)
    each = {name: torch.split(value, 1, dim=axis) for name, value in kept.items()}
    return tuple({name: parts[number] for name, parts in each.items()} for number in range(count))


def _axis(picture: Mapping[str, torch.Tensor]) -> int:
    """Return the axis along which images of one row lie: 1 in [B, images, C, H, W], else 0."""
    return 1 if picture["pixel_values"].ndim == 5 else 0


def _pillow(image: Image) -> Pillow.Image:
    return Pillow.fromarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


def _key(ids: torch.Tensor, images: Sequence[Image]) -> bytes:
    digest = hashlib.blake2b(ids.numpy().tobytes(), digest_size=16)
    for image in images:
        digest.update(repr(image.shape).encode())
        digest.update(np.ascontiguousarray(image).data)
    return digest.digest()
