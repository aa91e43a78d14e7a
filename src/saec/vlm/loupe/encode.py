"""Loupe's inputs as torch tensors: what :class:`~saec.vlm.loupe.inputs.LoupePrompts` makes, for the torch model."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from saec.vlm.encode import Encoded, Encoder
from saec.vlm.loupe.inputs import LoupePrompts
from saec.vlm.loupe.model import LoupeConfig
from saec.vlm.prompt import Question


class LoupeEncoder(Encoder):
    """Makes ``input_ids`` of a short prompt, ``pixel_values`` [B, 3, side, side] and ``anomaly_map`` [B, patches,
    patches]."""

    def __init__(self, tokenizer: Tokenizer, config: LoupeConfig) -> None:
        self._prompts = LoupePrompts(tokenizer, config.sizes)
        end = tokenizer.id_to_token(self._prompts.end)
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
        self.padding = self._prompts.end
        self.label_tokens = self._prompts.label_tokens

    def prepare(self, question: Question, answer: str | None = None) -> Encoded:
        """Encode one question; see :class:`saec.vlm.encode.Encoder`."""
        prompt = self._prompts.ids(question)
        reply = [] if answer is None else [*self._prompts.plain(answer), self.padding]  # which also ends a turn
        picture = {name: torch.from_numpy(values) for name, values in self._prompts.picture(question).items()}
        return Encoded(torch.tensor(prompt + reply), (picture,), len(prompt))
