"""An exported VLM as the one who puts rejects into words: one evidence question about each, inside its time."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from saec.config import MllmSettings, Settings
from saec.errors import BadInput
from saec.types import Evidence, Query
from saec.vlm.answers import read_evidence
from saec.vlm.edge.vlm import OnnxVlm
from saec.vlm.export.ready import ready_bundle
from saec.vlm.prompt import Ask, build_question
from saec.vlm.trained import as_trained

_NICE = 10
"""A tenth of a busy processor, as Linux shares it out: the line's verdicts keep their pace, a sentence its budget."""


_PROBE = Query("probe", "probe", np.full((64, 64, 3), 127, np.uint8), (64, 64))


class OnnxExplainer:
    """Explains with ONNX Runtime, in a thread that gives way to the line; see :class:`saec.types.Explainer`."""

    def __init__(self, settings: Settings) -> None:
        """Load the model of ``settings.explain`` in the precision and on the threads of ``settings.mllm``; ask it once.

        Raises:
            BadInput: it names no model, one that is not pulled or cannot be exported, or one that takes no question
                about an image.
        """
        self._prompt = as_trained(_of_explain(settings))
        self._max_tokens = settings.explain.max_tokens
        self._thread = ThreadPoolExecutor(1, "saec-explainer", initializer=_give_way)
        try:
            self._thread.submit(self._load).result()  # the model's threads are as modest as the one that makes them
        except BaseException:
            self.close()
            raise

    def explain(self, query: Query, *, deadline: float) -> Evidence | None:
        """Return kind and text, or ``None`` at the deadline.

        Raises:
            UnusableAnswer: the model answered, but not in the asked form.
        """
        return self._thread.submit(self._explain, query, deadline).result()

    def close(self) -> None:
        """Stop the thread once the sentence at hand is done."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _load(self) -> None:
        self._vlm = OnnxVlm.load(ready_bundle(self._prompt), threads=self._prompt.threads)
        self._prompt = self._vlm.at_its_size(self._prompt)
        self.model_id = self._vlm.model_id
        self._vlm.evidence(build_question(_PROBE, Ask.EVIDENCE, self._prompt), max_tokens=1)

    def _explain(self, query: Query, deadline: float) -> Evidence | None:
        question = build_question(query, Ask.EVIDENCE, self._prompt)
        text = self._vlm.evidence(question, max_tokens=self._max_tokens, deadline=deadline)
        if time.monotonic() > deadline:
            return None  # the answer was cut off
        return read_evidence(text, question.seen, query, source=self.model_id)


def _give_way() -> None:
    """Lower the priority of this thread, and of those that it will start: only Linux has priorities of threads."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _of_explain(settings: Settings) -> MllmSettings:
    """Return the settings of the model that explains; an adapter is that of the model it was named with."""
    model = settings.explain.model
    if model is None:
        raise BadInput("no model to explain with", where="explain.model", fix="name one, such as loupe")
    same = model == settings.mllm.model
    return settings.mllm if same else settings.mllm.model_copy(update={"model": model, "adapter": None})
