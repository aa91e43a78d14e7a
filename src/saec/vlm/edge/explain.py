"""An exported VLM as the one who puts rejects into words: one evidence question about each, inside its time."""

from __future__ import annotations

import time
from typing import Self

from saec.config import MllmSettings, PromptSettings, Settings
from saec.errors import BadInput
from saec.types import Evidence, Query
from saec.vlm.answers import read_evidence
from saec.vlm.edge.vlm import OnnxVlm
from saec.vlm.export.ready import ready_bundle
from saec.vlm.prompt import Ask, build_question
from saec.vlm.trained import as_trained


class OnnxExplainer:
    """Explains with ONNX Runtime; see :class:`saec.types.Explainer`."""

    def __init__(self, vlm: OnnxVlm, prompt: PromptSettings, *, max_tokens: int) -> None:
        self._vlm, self._prompt, self._max_tokens = vlm, prompt, max_tokens
        self.model_id = vlm.model_id

    @classmethod
    def load(cls, settings: Settings) -> Self:
        """Load the model of ``settings.explain`` in the precision and on the threads of ``settings.mllm``.

        Raises:
            BadInput: it names no model, or one that is not pulled or cannot be exported.
        """
        wanted = as_trained(_of_explain(settings))
        vlm = OnnxVlm.load(ready_bundle(wanted), threads=wanted.threads)
        return cls(vlm, wanted, max_tokens=settings.explain.max_tokens)

    def explain(self, query: Query, *, deadline: float) -> Evidence | None:
        """Return kind and text, or ``None`` at the deadline.

        Raises:
            UnusableAnswer: the model answered, but not in the asked form.
        """
        question = build_question(query, Ask.EVIDENCE, self._prompt)
        text = self._vlm.evidence(question, max_tokens=self._max_tokens, deadline=deadline)
        if time.monotonic() > deadline:
            return None  # the answer was cut off
        return read_evidence(text, question.seen, query, source=self.model_id)

    def close(self) -> None:
        """Nothing to let go of but memory."""


def _of_explain(settings: Settings) -> MllmSettings:
    """Return the settings of the model that explains; an adapter is that of the model it was named with."""
    model = settings.explain.model
    if model is None:
        raise BadInput("no model to explain with", where="explain.model", fix="name one, such as loupe")
    same = model == settings.mllm.model
    return settings.mllm if same else settings.mllm.model_copy(update={"model": model, "adapter": None})
