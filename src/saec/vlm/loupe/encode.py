"""From a question to Loupe's inputs: a short prompt, the part in a square, and the anomaly map on the tower's patches.

Loupe was trained for one task, so it needs no instructions: of the question's text it gets the product's name and what
is asked. References and the close-up are left out, the anomaly map says where good parts differ.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from saec.types import Heatmap, Image
from saec.vlm.encode import Encoded, Encoder
from saec.vlm.loupe.model import LoupeConfig
from saec.vlm.prompt import LABELS, Ask, Question

_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
"""ImageNet's, which the tower was trained with; RGB."""

_ASKED = {Ask.LABEL: "Is it good (0) or defective (1)?", Ask.EVIDENCE: "It is defective. What is wrong, as JSON?"}
_END = "<|im_end|>"


class LoupeEncoder(Encoder):
    """Makes ``input_ids`` of a short prompt, ``pixel_values`` [B, 3, side, side] and ``anomaly_map`` [B, patches,
    patches]."""

    def __init__(self, tokenizer: Tokenizer, config: LoupeConfig) -> None:
        self._config = config
        # Text of users never becomes a control token, whatever it spells.
        tokenizer.encode_special_tokens = True
        self._tokens = tokenizer
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)
        start, end = (int(self.tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", _END))
        self.padding = end
        self._before = [start, *self._ids("user\n"), *[config.image_token_id] * config.image_tokens]
        self._after = [end, *self._ids("\n"), start, *self._ids("assistant\n")]
        good, defect = (self._ids(label)[0] for label in LABELS)
        self.label_tokens = (good, defect)

    def prepare(self, question: Question, answer: str | None = None) -> Encoded:
        """Encode one question; see :class:`saec.vlm.encode.Encoder`."""
        prompt = self._prompt(question)
        reply = [] if answer is None else [*self._ids(answer), self.padding]  # which also ends a turn
        seen = {"pixel_values": self._pixels(question.part), "anomaly_map": self._map(question)}
        picture = {name: torch.from_numpy(values[None]) for name, values in seen.items()}
        return Encoded(torch.tensor(prompt + reply), (picture,), len(prompt))

    def _prompt(self, question: Question) -> list[int]:
        text = f"\nProduct: {question.product}. {_ASKED[question.ask]}"
        return [*self._before, *self._ids(text), *self._after, *self._ids(question.prefill)]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokens.encode(text, add_special_tokens=False).ids)

    def _pixels(self, part: Image) -> NDArray[np.float32]:
        """Return [3, side, side]: the part in the upper left corner, its longest side filling the square."""
        side = self._config.image_side
        across, down = _fitted(part.shape[1], part.shape[0], side)
        way = cv2.INTER_AREA if across * down < part.shape[0] * part.shape[1] else cv2.INTER_CUBIC
        rgb = cv2.cvtColor(cv2.resize(part, (across, down), interpolation=way), cv2.COLOR_BGR2RGB)
        square = np.zeros((side, side, 3), dtype=np.float32)
        square[:down, :across] = (rgb.astype(np.float32) / 255 - _MEAN) / _STD
        return np.ascontiguousarray(square.transpose(2, 0, 1))

    def _map(self, question: Question) -> Heatmap:
        """Return the anomaly map on the tower's patches; beside the part, and without a map, as on a good part."""
        patches = self._config.image_side // self._config.patch
        square = np.full((patches, patches), np.exp(self._config.map_mean), dtype=np.float32)
        if question.anomaly_map is not None:
            across, down = _fitted(question.part.shape[1], question.part.shape[0], patches)
            shrinks = across * down < question.anomaly_map.size
            way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            square[:down, :across] = cv2.resize(question.anomaly_map, (across, down), interpolation=way)
        return square


def _fitted(width: int, height: int, side: int) -> tuple[int, int]:
    """Return (width, height) with the longest side ``side`` and the same aspect ratio, none below 1."""
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
