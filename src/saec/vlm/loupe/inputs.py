"""From a question to what Loupe reads: a short prompt, the part in a square, and the anomaly map on its patches.

Loupe was trained for one task, so it needs no instructions: of the question's text it gets the product's name and what
is asked. References and the close-up are left out, the anomaly map says where good parts differ. No torch: the graphs
and the torch model are given the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from saec.errors import BadInput
from saec.types import Heatmap
from saec.vlm.contract.bundle import Preprocess
from saec.vlm.edge.pixels import fitted, pixel_values
from saec.vlm.prompt import LABELS, Ask, Question

_ASKED = {Ask.LABEL: "Is it good (0) or defective (1)?", Ask.EVIDENCE: "It is defective. What is wrong, as JSON?"}
_START, _END = "<|im_start|>", "<|im_end|>"

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, which the tower was trained with; RGB."""


@dataclass(frozen=True, slots=True)
class LoupeSizes:
    """Loupe's figures.

    ``image_side`` is the side of the square the tower sees, in pixels; ``merge`` x ``merge`` patches make one visual
    token; ``tower_layers`` are the blocks whose normalised outputs are concatenated. Log anomaly maps are standardised
    by ``map_mean`` and ``map_std``.
    """

    image_side: int = 224
    patch: int = 14
    merge: int = 2
    tower_layers: tuple[int, ...] = (9, 12)
    image_token: int = 16
    map_mean: float = -0.35
    map_std: float = 0.15

    @property
    def patches(self) -> int:
        """Patches in a row, and rows of them."""
        return self.image_side // self.patch

    @property
    def image_tokens(self) -> int:
        """Visual tokens of one image."""
        return (self.patches // self.merge) ** 2

    @property
    def preprocess(self) -> Preprocess:
        """The part in the upper left corner; beside it the pixels are 0 once normalised."""
        fill = (255 * _MEAN[0], 255 * _MEAN[1], 255 * _MEAN[2])
        return Preprocess(side=self.image_side, place="corner", fill=fill, mean=_MEAN, std=_STD)


LOUPE = LoupeSizes()
"""The model that ships."""


class LoupePrompts:
    """Makes Loupe's token ids and picture. ``label_tokens`` are the ids of ``0`` and ``1``, ``end`` ends a turn.

    Thread-safe. The tokenizer is set so that text of users never becomes a control token, whatever it spells.

    Raises:
        BadInput: another model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, sizes: LoupeSizes = LOUPE) -> None:
        tokenizer.encode_special_tokens = True
        self._tokens = tokenizer
        self._sizes = sizes
        self._preprocess = sizes.preprocess
        start, self.end = (_control(tokenizer, token) for token in (_START, _END))
        self.image_token = sizes.image_token
        self._before = [start, *self.plain("user\n"), *[sizes.image_token] * sizes.image_tokens]
        self._after = [self.end, *self.plain("\n"), start, *self.plain("assistant\n")]
        good, defect = (self.plain(label)[0] for label in LABELS)
        self.label_tokens = (good, defect)

    def ids(self, question: Question) -> list[int]:
        """Return the prompt's ids, which end after the question's prefill."""
        text = f"Product: {question.product}. {_ASKED[question.ask]}"
        return [*self.text_ids(text), *self.plain(question.prefill)]

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a free question about the picture, which end where the answer begins."""
        return [*self._before, *self.plain(f"\n{text}"), *self._after]

    def plain(self, text: str) -> list[int]:
        """Return the ids of a text; no control token is among them."""
        return list(self._tokens.encode(text, add_special_tokens=False).ids)

    def picture(self, question: Question) -> dict[str, NDArray[np.float32]]:
        """Return ``pixel_values`` [1, 3, side, side], or the ``tokens`` [1, L, W] that came in their place, and
        ``anomaly_map`` [1, patches, patches]."""
        anomaly_map = self._map(question)[None]
        if question.tokens is not None:
            return {"tokens": question.tokens[None], "anomaly_map": anomaly_map}
        return {"pixel_values": pixel_values(question.part, self._preprocess), "anomaly_map": anomaly_map}

    def _map(self, question: Question) -> Heatmap:
        """Return the anomaly map on the tower's patches; beside the part, and without a map, as on a good part."""
        patches = self._sizes.patches
        square = np.full((patches, patches), np.exp(self._sizes.map_mean), dtype=np.float32)
        if question.anomaly_map is not None:
            across, down = fitted(question.part.shape[1], question.part.shape[0], patches)
            shrinks = across * down < question.anomaly_map.size
            way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            square[:down, :across] = cv2.resize(question.anomaly_map, (across, down), interpolation=way)
        return square


def _control(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise BadInput(f"the tokenizer has no {token}: it is not Loupe's")
    return int(number)
