"""The ``onnx`` runtime of a multimodal LLM: an exported bundle in ONNX Runtime, in this process, without torch.

A part is decided in one pass a view; a part whose P(defect) reaches ``tau`` is asked a second time, for boxes, kind and
a sentence, on top of the keys and values that its first question left. Failing to get evidence never changes the
verdict. Parts are judged one after the other: on the cores of an edge a batch is no faster than its parts, and nothing
is prepared ahead, since that would take the same cores.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saec.cloud.backend import probe
from saec.cloud.judging import check_numbers, evidence_of, is_defect, opinion
from saec.config import PromptSettings, Settings
from saec.types import Evidence, Opinion, Query
from saec.vlm.answers import no_evidence
from saec.vlm.edge.vlm import OnnxVlm, Seen
from saec.vlm.export.ready import ready_bundle
from saec.vlm.looks import decisions, views, way
from saec.vlm.prompt import Ask, Question, build_question
from saec.vlm.trained import as_trained

TOKENS = "+tokens"
"""Ends the model id of an opinion on tokens: from fewer bytes comes another P(defect), to whoever calibrates on it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Serving:
    """The model that answers now, replaced as a whole."""

    vlm: OnnxVlm
    model_id: str
    prompt: PromptSettings


class OnnxVlmBackend:
    """Judges parts with the model of ``settings.mllm``, exported into the model cache where it is not yet.

    ``model_id`` names base, adapter, precision and prompt, such as ``loupe@int8+adapter:1a2b3c4d+p2``, and each opinion
    the one that made it. ``Opinion.diagnostics`` holds ``label_mass``, the probability of the tokens 0 and 1 together.
    A part whose image, or whose tokens in its place, cannot be used fails alone. The weights are loaded by
    :meth:`warm_up`.
    """

    device = "cpu"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.mllm
        self.model_id = settings.mllm.model
        self._serving: _Serving | None = None
        self._swapping = threading.Lock()

    def warm_up(self) -> None:
        """Load the model with its adapter, and ask it once.

        Raises:
            BadInput: a model or an adapter that cannot be used, or that would have to be exported where the extra for
                that is not installed.
        """
        self.swap_adapter(self._settings.adapter)

    def swap_adapter(self, folder: Path | None) -> None:
        """Answer with another adapter, or with the model's own, from the next batch on; callable from any thread.

        Raises:
            BadInput: as :meth:`warm_up`; the model at work goes on.
        """
        with self._swapping:
            wanted = as_trained(self._settings.model_copy(update={"adapter": folder}))
            folder = ready_bundle(wanted)
            vlm = OnnxVlm.load(folder, threads=wanted.threads, prefixes=wanted.prefix_cache, width=wanted.width)
            wanted = vlm.at_its_size(wanted)
            check_numbers(vlm.decide(build_question(probe(), Ask.LABEL, wanted))[0], vlm.model_id)
            self._serving = _Serving(vlm, vlm.model_id + way(wanted), wanted)
            self.model_id = self._serving.model_id

    def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
        """Return an opinion on each query, or what is wrong with it, in order."""
        if self._serving is None:
            raise RuntimeError("the model is not loaded: call warm_up() first")
        serving = self._serving
        answers: list[Opinion | Exception] = []
        for query in queries:
            try:
                answers.append(self._judged(serving, query))
            except Exception as error:  # noqa: BLE001 - an odd image must not fail the batch
                answers.append(error)
        return answers

    def close(self) -> None:
        """Let go of the model."""
        self._serving = None

    def _judged(self, serving: _Serving, query: Query) -> Opinion | Exception:
        begun = time.monotonic()
        tokens = None if query.tokens is None else serving.vlm.expand(query.tokens)
        question = build_question(query, Ask.LABEL, serving.prompt, tokens=tokens)
        # What a tower saw cannot be mirrored or cropped afterwards.
        looks = views(question, self._settings) if tokens is None else (question,)
        prepared = time.monotonic()
        found = [serving.vlm.look(view) for view in looks]
        decision = decisions(np.stack([logs for logs, _ in found])[:, None])[0]
        decided = time.monotonic()
        timing_ms = {"prepare": (prepared - begun) * 1e3, "label": (decided - prepared) * 1e3}
        evidence = None
        if query.evidence and is_defect(decision, self._settings):
            # The first of the mirrored views is the part as it is; of five crops none is.
            whole = question if self._settings.ranking else looks[0]
            evidence = self._evidence(serving, query, whole, found[0][1])
            timing_ms["evidence"] = (time.monotonic() - decided) * 1e3
        model_id = serving.model_id if tokens is None else f"{serving.vlm.model_id}{TOKENS}"
        return opinion(decision, evidence, model_id, self._settings, timing_ms)

    def _evidence(self, serving: _Serving, query: Query, question: Question, seen: Seen) -> Evidence:
        """Return evidence for a defect, or the record of why there is none."""
        source = serving.model_id
        try:
            text = serving.vlm.evidence(question, seen, max_tokens=self._settings.evidence_tokens)
        except Exception as error:  # whatever a model throws here, the verdict stands
            logger.exception("no evidence for %s", query.part_id)
            return no_evidence(error, source=source)
        return evidence_of(text, question.seen, query, source=source)
