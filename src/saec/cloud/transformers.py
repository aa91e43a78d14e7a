"""The ``transformers`` backend: a multimodal LLM in this process, one implementation for every model class.

One batched forward pass decides; parts whose P(defect) reaches ``tau`` are asked a second time, for boxes, kind and a
sentence. Failing to get evidence never changes the verdict: it is said in ``Evidence.text``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from saec.cloud.ahead import Ahead
from saec.cloud.backend import probe
from saec.cloud.judging import check_numbers, evidence_of, is_defect, opinion
from saec.config import PromptSettings, Settings
from saec.types import Evidence, Opinion, Query
from saec.vlm.answers import Decision, no_evidence
from saec.vlm.decide import generate_evidence, p_defect, rank
from saec.vlm.encode import Encoded
from saec.vlm.load import Vlm, load_vlm
from saec.vlm.looks import views, way
from saec.vlm.prefix import PrefixCache
from saec.vlm.prompt import Ask, Question, ask_evidence, build_question
from saec.vlm.trained import as_trained

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Serving:
    """The model that answers now. Replaced as a whole, so that a batch is judged by one adapter from end to end."""

    vlm: Vlm
    prefixes: PrefixCache
    model_id: str
    prompt: PromptSettings

    @property
    def base(self) -> Vlm | None:
        """The model without an adapter, where it is in memory."""
        return self.vlm if self.vlm.adapter_id is None else self.vlm.base


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """A query as the model of ``serving`` will be asked: the question, and its views encoded."""

    serving: _Serving
    question: Question
    views: tuple[Encoded, ...]
    seconds: float


class TransformersBackend:
    """Judges parts with the model of ``settings.mllm``.

    ``model_id`` names base, adapter and prompt, such as ``qwen2.5-vl-7b+adapter:1a2b3c4d+p2``, and each opinion the one
    that made it. ``Opinion.diagnostics`` holds ``label_mass``, the probability of the tokens 0 and 1 together. A part
    whose image cannot be used fails alone. The weights are loaded by :meth:`warm_up`.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.mllm
        self.model_id = settings.mllm.model
        self._serving: _Serving | None = None
        self._swapping = threading.Lock()
        self._ahead: Ahead[_Ready] = Ahead(
            lambda query: self._ready(self._at_work(), query),
            threads=self._settings.workers,
            ahead=2 * settings.serve.max_batch,
        )

    @property
    def device(self) -> str:
        """``cpu``, or the name of the GPU that the model is on."""
        device = self._at_work().vlm.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)

    def warm_up(self) -> None:
        """Load the model and its adapter, and ask it once.

        Raises:
            BadInput: a model or an adapter that cannot be used.
        """
        self.swap_adapter(self._settings.adapter)

    def swap_adapter(self, folder: Path | None) -> None:
        """Answer with another adapter, or with none, from the next batch on; callable from any thread.

        The new one is loaded and tried beside the one at work, which goes on alone if this fails. Loupe, whose
        projector comes with its adapter, answers with its own where no folder is named.

        Raises:
            BadInput: an adapter that does not fit the model, or with which its output is not a number.
        """
        with self._swapping:
            wanted = as_trained(self._settings.model_copy(update={"adapter": folder}))
            vlm = load_vlm(wanted, base=None if self._serving is None else self._serving.base)
            model_id = vlm.model_id + way(self._settings)
            check_numbers(p_defect(vlm, [build_question(probe(), Ask.LABEL, wanted)])[0], vlm.model_id)
            self._serving = _Serving(vlm, PrefixCache(vlm, self._settings.prefix_cache), model_id, wanted)
            self.model_id = model_id

    def prepare(self, query: Query) -> Query:
        """Begin to resize and encode a query that waits for its batch."""
        return self._ahead.put(query)

    def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
        """Return an opinion on each query, or what is wrong with it, in order."""
        serving = self._at_work()
        begun = time.monotonic()
        answers: list[Opinion | Exception | None] = [None] * len(queries)
        ready: dict[int, _Ready] = {}
        for place, (query, future) in enumerate(zip(queries, self._ahead.take(queries), strict=True)):
            try:
                found = future.result()
                # Prepared before a swap: the new adapter may have been trained at another size.
                ready[place] = found if found.serving is serving else self._ready(serving, query)
            except Exception as error:  # noqa: BLE001 - an odd image must not fail the batch; the service reports it
                answers[place] = error
        waited = time.monotonic()
        decisions = dict(zip(ready, self._decide(serving, list(ready.values())), strict=True))
        decided = time.monotonic()
        evidence = self._evidence(serving, queries, ready, decisions)
        asked = time.monotonic()
        for place, decision in decisions.items():
            timing_ms = {"prepare": ready[place].seconds * 1e3, "wait": (waited - begun) * 1e3}
            timing_ms["label"] = (decided - waited) * 1e3
            if place in evidence:
                timing_ms["evidence"] = (asked - decided) * 1e3
            answers[place] = opinion(decision, evidence.get(place), serving.model_id, self._settings, timing_ms)
        return [answer for answer in answers if answer is not None]

    def close(self) -> None:
        """Stop the threads and let go of the model."""
        self._ahead.close()
        self._serving = None

    def _at_work(self) -> _Serving:
        if self._serving is None:
            raise RuntimeError("the model is not loaded: call warm_up() first")
        return self._serving

    def _ready(self, serving: _Serving, query: Query) -> _Ready:
        begun = time.monotonic()
        question = build_question(query, Ask.LABEL, serving.prompt)
        encoded = tuple(map(serving.vlm.encoder.prepare, views(question, self._settings)))
        return _Ready(serving, question, encoded, time.monotonic() - begun)

    def _decide(self, serving: _Serving, ready: Sequence[_Ready]) -> list[Decision]:
        if not ready:
            return []
        return rank(serving.vlm, [one.views for one in ready], prefixes=serving.prefixes)

    def _evidence(
        self, serving: _Serving, queries: Sequence[Query], ready: dict[int, _Ready], decisions: dict[int, Decision]
    ) -> dict[int, Evidence]:
        """Return evidence for the defects among the decisions, or the record of why there is none."""
        wanted = [place for place, decision in decisions.items() if queries[place].evidence]
        places = [place for place in wanted if is_defect(decisions[place], self._settings)]
        if not places:
            return {}
        source = serving.model_id
        questions = [ask_evidence(ready[place].question) for place in places]
        try:
            texts = generate_evidence(serving.vlm, questions, max_tokens=self._settings.evidence_tokens)
        except Exception as error:  # whatever a model throws here, the verdicts stand
            logger.exception("no evidence for %d parts", len(places))
            return dict.fromkeys(places, no_evidence(error, source=source))
        return {
            place: evidence_of(text, question.seen, queries[place], source=source)
            for place, question, text in zip(places, questions, texts, strict=True)
        }
