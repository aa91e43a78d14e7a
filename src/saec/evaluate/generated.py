"""SAEC's LLaVA baseline: the verdict is read from a generated answer of two tokens (§5 of the specification)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from saec.config import MllmSettings
from saec.types import CloudError, Evidence, Opinion, Query, Reason

ANSWER_TOKENS = 2
"""Tokens that the model may answer with."""

_LABEL = re.compile(r"\s*([01])(?!\w|[.,]\d)")


def read_label(text: str) -> Literal[0, 1] | None:
    """Return what a generated answer says: 1 for a defect, 0 for a good part, ``None`` for no answer.

    An answer is a text whose first character after white space is the digit 0 or 1, standing alone: what follows is
    its end, white space or punctuation, but no letter, no further digit and no decimal fraction. Words are no answer
    ("good", "Yes"): the question asks for one digit.
    """
    found = _LABEL.match(text)
    if found is None:
        return None
    return 1 if found[1] == "1" else 0


class GeneratingBackend:
    """A backend that reads its verdict from generated text, as SAEC's LLaVA baseline does: P(defect) is 0 or 1."""

    def __init__(self, generate: Callable[[Sequence[Query]], Sequence[str]], model_id: str) -> None:
        """``generate`` returns the text that the model answers to each query."""
        self._generate = generate
        self.model_id = f"{model_id}+generated"

    def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
        """Return an opinion for each query, or a ``CloudError`` that quotes the answer that is no label."""
        return [self._opinion(text) for text in self._generate(queries)]

    def _opinion(self, text: str) -> Opinion | Exception:
        label = read_label(text)
        if label is None:
            return CloudError(Reason.CLOUD_BAD_ANSWER, f"{self.model_id} answered neither 0 nor 1: {text!r}")
        return Opinion(float(label), Evidence(source=self.model_id), self.model_id)


def load_generating(settings: MllmSettings) -> GeneratingBackend:
    """Load a model that answers in :data:`ANSWER_TOKENS` tokens, the most likely ones.

    Raises:
        BadInput: it cannot be loaded.
    """
    from saec.vlm.decide import generate_evidence
    from saec.vlm.load import load_vlm
    from saec.vlm.prompt import Ask, build_question

    vlm = load_vlm(settings)

    def generate(queries: Sequence[Query]) -> list[str]:
        questions = [build_question(query, Ask.LABEL, settings) for query in queries]
        return generate_evidence(vlm, questions, max_tokens=ANSWER_TOKENS)

    return GeneratingBackend(generate, vlm.model_id)
