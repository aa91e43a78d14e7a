"""The ``openai`` backend: any OpenAI-compatible vision endpoint, such as vLLM or SGLang.

One request decides: a single token with its log-probabilities, after the answer's beginning ``Label: `` (SAEC §3).
Parts whose P(defect) reaches ``tau`` get a second one, which asks for boxes, kind and a sentence under a JSON schema.
Failing to get evidence never changes the verdict: it is said in ``Evidence.text``.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from saec.cloud.answers import first_token, read_label, read_models, read_text
from saec.cloud.backend import probe
from saec.cloud.images import encode_jpeg, encode_png
from saec.cloud.transport import Reply, Uplink
from saec.config import OpenAISettings
from saec.errors import BadInput
from saec.types import CloudError, Evidence, Image, Opinion, Query, Reason
from saec.vlm.answers import Decision, UnusableAnswer, no_evidence, read_evidence
from saec.vlm.prompt import EVIDENCE_SCHEMA, VERSION, Ask, Question, ask_evidence, build_question

_LABEL = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
_PROBE_S = 5.0
_FIRST_ANSWER_S = 60.0  # engines compile at their first question


class OpenAIBackend:
    """Asks an OpenAI-compatible endpoint, several parts of a batch at once.

    ``model_id`` is the model's name and the version of the prompt, such as ``Qwen/Qwen2.5-VL-7B-Instruct+p1``.
    ``Opinion.diagnostics`` holds ``label_mass``, the probability of the tokens 0 and 1 together. A part that the
    endpoint does not answer fails alone, with a :class:`~saec.types.CloudError` that says why.
    """

    def __init__(self, settings: OpenAISettings, *, transport: httpx.BaseTransport | None = None) -> None:
        self._settings = settings
        self._model = settings.model
        self.model_id = _model_id(settings.model)
        self._uplink = Uplink(
            settings.base_url, token=settings.api_key, connections=settings.concurrency, transport=transport
        )
        self._threads = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="saec-openai")

    @property
    def device(self) -> str:
        """The endpoint's address: what computes behind it, it does not tell."""
        return self._settings.base_url

    def warm_up(self) -> None:
        """Check that the endpoint answers, serves the model and tells log-probabilities; take its only model if none
        was named.

        Raises:
            BadInput: no answer, a refused key, a model that is not there, or one that cannot be asked for a label.
        """
        where = self._settings.base_url
        try:
            reply = self._uplink.request("GET", "/models", deadline=time.monotonic() + _PROBE_S)
            served = read_models(_accepted(reply).body)
        except (CloudError, UnusableAnswer) as error:
            fix = "check openai.base_url (it ends in /v1) and openai.api_key"
            raise BadInput(f"the model endpoint cannot be used ({error})", where=where, fix=fix) from None
        if self._model is None and len(served) == 1:
            self._model = served[0]
            self.model_id = _model_id(self._model)
        if self._model not in served:
            what = "the endpoint serves several models" if self._model is None else f"there is no model {self._model}"
            raise BadInput(what, where=where, fix=f"set openai.model to one of: {', '.join(served)}")
        try:
            question = build_question(probe(), Ask.LABEL, self._settings)
            first_token(self._ask(question, _LABEL, timeout_s=max(_FIRST_ANSWER_S, self._settings.timeout_s)).body)
        except (CloudError, UnusableAnswer) as error:
            fix = "it must tell logprobs; set openai.prefill=false if it refuses to continue an answer"
            raise BadInput(f"the model endpoint cannot be asked for a label ({error})", where=where, fix=fix) from None

    def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
        """Return an opinion or a :class:`~saec.types.CloudError` for each query, in order."""
        return list(self._threads.map(self._judge_one, queries))

    def close(self) -> None:
        """Close threads and connections."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._uplink.close()

    def _judge_one(self, query: Query) -> Opinion | Exception:
        begun = time.monotonic()
        try:
            question = build_question(query, Ask.LABEL, self._settings)
            built = time.monotonic()
            label = self._label(question)
            decided = time.monotonic()
            timing_ms = {"prompt": (built - begun) * 1e3, "label": (decided - built) * 1e3}
            evidence = Evidence(source=self.model_id)
            if query.evidence and label.p_defect >= self._settings.tau:
                evidence = self._evidence(ask_evidence(question), query)
                timing_ms["evidence"] = (time.monotonic() - decided) * 1e3
        except Exception as error:  # noqa: BLE001 - an odd image must not fail the batch; the service reports it
            return error
        return Opinion(label.p_defect, evidence, self.model_id, timing_ms, diagnostics={"label_mass": label.mass})

    def _label(self, question: Question) -> Decision:
        reply = self._ask(question, _LABEL)
        try:
            return read_label(reply.body, min_mass=self._settings.min_label_mass)
        except UnusableAnswer as error:
            raise CloudError(Reason.CLOUD_BAD_ANSWER, f"{self.model_id}: {error}") from None

    def _evidence(self, question: Question, query: Query) -> Evidence:
        schema = {"name": "evidence", "strict": True, "schema": EVIDENCE_SCHEMA}
        options = {
            "max_tokens": self._settings.evidence_tokens,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }
        try:
            text = read_text(self._ask(question, options).body)
            return read_evidence(text, question.seen, query, source=self.model_id)
        except (CloudError, UnusableAnswer) as error:
            return no_evidence(error, source=self.model_id)

    def _ask(self, question: Question, options: dict[str, Any], *, timeout_s: float | None = None) -> Reply:
        body = {"model": self._model, "temperature": 0, **chat(question, self._settings), **options}
        deadline = time.monotonic() + (timeout_s or self._settings.timeout_s)
        headers = {"Content-Type": "application/json"}
        return _accepted(
            self._uplink.request(
                "POST", "/chat/completions", deadline=deadline, body=json.dumps(body).encode(), headers=headers
            )
        )


def chat(question: Question, settings: OpenAISettings) -> dict[str, Any]:
    """Return a question as the fields of a chat completion that hold the prompt, images as data URLs."""
    content = [
        {"type": "text", "text": item} if isinstance(item, str) else _picture(item, settings)
        for item in question.content
    ]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": question.system},
        {"role": "user", "content": content},
    ]
    if not (question.prefill and settings.prefill):
        return {"messages": messages}
    messages.append({"role": "assistant", "content": question.prefill})
    return {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}


def _picture(image: Image, settings: OpenAISettings) -> dict[str, Any]:
    lossless = settings.image_format == "png"
    coded = base64.b64encode(encode_png(image) if lossless else encode_jpeg(image, settings.jpeg_quality))
    url = f"data:image/{settings.image_format};base64,{coded.decode('ascii')}"
    return {"type": "image_url", "image_url": {"url": url}}


def _model_id(model: str | None) -> str:
    return f"{model or 'openai'}+{VERSION}"


def _accepted(reply: Reply) -> Reply:
    """Return the reply if its status is 200, else raise what another status means."""
    if reply.status == 200:
        return reply
    detail = " ".join(reply.body[:300].decode("utf-8", "replace").split())
    message = f"the endpoint answered {reply.status} ({detail})"
    if reply.status in (429, 503):
        raise CloudError(Reason.CLOUD_REFUSED, message, retry_after_s=reply.retry_after_s)
    raise CloudError(Reason.CLOUD_TIMEOUT if reply.status in (408, 504) else Reason.CLOUD_BAD_ANSWER, message)
