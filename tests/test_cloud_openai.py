"""The openai backend against a small conforming server."""

from __future__ import annotations

import base64
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI

from cloud_fakes import query
from saec.cloud.openai import OpenAIBackend
from saec.config import OpenAISettings
from saec.errors import BadInput
from saec.types import Box, CloudError, Opinion, Query, Reason

EVIDENCE = {"kind": "surface", "bboxes": [[14, 28, 28, 56]], "desc": "A scratch near the left edge."}


def tops(**probabilities: float) -> list[dict[str, Any]]:
    names = {"one": "1", "zero": "0", "space_one": " 1", "glued_zero": "Ġ0", "word": "The"}
    return [{"token": names[name], "logprob": math.log(p), "bytes": None} for name, p in probabilities.items()]


@dataclass
class Endpoint:
    """Behaves as vLLM's chat completions do; keeps what it was asked."""

    top: list[dict[str, Any]] = field(default_factory=lambda: tops(one=0.6, zero=0.3))
    evidence: str = json.dumps(EVIDENCE)
    finish: str = "stop"
    status: int = 200
    evidence_status: int = 200
    delay_s: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "tiny-vl", "object": "model"}]}

    def complete(self, question: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            self.asked.append(question)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.delay_s)
        with self.lock:
            self.at_once -= 1
        if "response_format" in question:
            choice = {"message": {"role": "assistant", "content": self.evidence}, "finish_reason": self.finish}
            return self.evidence_status, {"choices": [choice]}
        assert (question["max_tokens"], question["temperature"], question["logprobs"]) == (1, 0, True)
        assert question["top_logprobs"] == 20
        logprobs = {"content": [{**self.top[0], "top_logprobs": self.top}] if self.top else []}
        choice = {"message": {"content": "1"}, "logprobs": logprobs, "finish_reason": "length"}
        return self.status, {"choices": [choice], "usage": {"total_tokens": 99}}

    def handle(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json=self.models())
        assert request.url.path == "/v1/chat/completions"
        status, answer = self.complete(json.loads(request.read()))
        return httpx.Response(status, json=answer)


@contextmanager
def backend_of(endpoint: Endpoint, **more: object) -> Iterator[OpenAIBackend]:
    settings = OpenAISettings(**{"model": "tiny-vl", **more})  # type: ignore[arg-type]
    backend = OpenAIBackend(settings, transport=httpx.MockTransport(endpoint.handle))
    try:
        yield backend
    finally:
        backend.close()


def judge(endpoint: Endpoint, asked: Query | None = None, **more: object) -> Opinion | Exception:
    with backend_of(endpoint, **more) as backend:
        return backend.judge([asked or query()])[0]


def opinion(endpoint: Endpoint, asked: Query | None = None, **more: object) -> Opinion:
    answer = judge(endpoint, asked, **more)
    assert isinstance(answer, Opinion), answer
    return answer


def pictures(question: dict[str, Any]) -> list[np.ndarray]:
    urls = [item["image_url"]["url"] for item in question["messages"][1]["content"] if item["type"] == "image_url"]
    coded = [base64.b64decode(url.removeprefix("data:image/png;base64,"), validate=True) for url in urls]
    return [cv2.imdecode(np.frombuffer(each, np.uint8), cv2.IMREAD_COLOR) for each in coded]


def test_p_defect_is_renormalised_over_both_labels_and_all_their_spellings() -> None:
    answer = opinion(Endpoint(tops(one=0.3, zero=0.2, space_one=0.1, glued_zero=0.1, word=0.2)))
    assert answer.p_defect == pytest.approx(0.4 / 0.7)
    assert answer.diagnostics["label_mass"] == pytest.approx(0.7)
    assert answer.model_id == "tiny-vl+p2"


def test_a_label_that_is_not_reported_counts_as_nothing() -> None:
    assert opinion(Endpoint(tops(zero=0.9, word=0.1))).p_defect == 0.0


@pytest.mark.parametrize(
    ("top", "message"),
    [
        (tops(word=0.9), "neither 0 nor 1"),
        (tops(word=0.9, one=0.01), "only 0.01 of the probability"),
        ([], "no first-token log-probabilities"),
        ([{"token": "1", "logprob": None}], "no first-token log-probabilities"),
        ([{"token": "1", "logprob": 2.0}], "no first-token log-probabilities"),
        ([{"token": "1", "logprob": -9999.0}], "neither 0 nor 1"),
    ],
)
def test_without_a_label_there_is_an_error_never_a_half(top: list[dict[str, Any]], message: str) -> None:
    error = judge(Endpoint(top))
    assert isinstance(error, CloudError)
    assert error.reason is Reason.CLOUD_BAD_ANSWER
    assert message in str(error)


def test_evidence_is_asked_for_from_tau_on_and_mapped_to_the_original() -> None:
    image = np.zeros((112, 112, 3), np.uint8)
    asked = query(image=image, original_size=(1000, 800), region=Box(100, 200, 324, 424))
    endpoint = Endpoint()
    answer = opinion(endpoint, asked, tau=0.6)
    assert len(endpoint.asked) == 2
    assert endpoint.asked[1]["response_format"]["type"] == "json_schema"
    # The region is 224 pixels wide and was seen at 112: every seen pixel is two of the original.
    assert answer.evidence.boxes == (Box(128, 256, 156, 312),)
    assert answer.evidence.kind == "surface"
    assert answer.evidence.text == EVIDENCE["desc"]
    assert answer.evidence.source == "tiny-vl+p2"

    endpoint = Endpoint()
    assert opinion(endpoint, tau=0.7).evidence.boxes == ()
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evidence": "The part is scratched."}, "not the asked JSON"),
        ({"evidence": '{"kind": "surface", "bboxes": [[1, 2, 3'}, "not the asked JSON"),
        ({"evidence": json.dumps({**EVIDENCE, "kind": "magic"})}, "'magic' is none of surface"),
        ({"evidence": json.dumps({**EVIDENCE, "bboxes": [[0, 0, 57, 20]]})}, "not inside an image of 56 x 56"),
        ({"evidence": json.dumps({**EVIDENCE, "bboxes": [[9, 0, 3, 20]]})}, "not inside"),
        ({"evidence": json.dumps({**EVIDENCE, "bboxes": [[0, 0, 10]]})}, "not the asked JSON"),
        ({"evidence": '{"kind": "surface", "bboxes": [[0, 0, NaN, 5]], "desc": ""}'}, "not the asked JSON"),
        ({"finish": "length"}, "cut off"),
        ({"evidence_status": 500}, "the endpoint answered 500"),
    ],
)
def test_without_usable_evidence_the_opinion_stands_and_says_why(changes: dict[str, Any], message: str) -> None:
    answer = opinion(Endpoint(**changes), max_side=56)
    assert answer.p_defect == pytest.approx(2 / 3)
    assert answer.evidence.boxes == ()
    assert answer.evidence.kind is None
    assert answer.evidence.text is not None
    assert answer.evidence.text.startswith("no evidence: ")
    assert message in answer.evidence.text


def test_what_stays_the_same_comes_first_so_that_the_engines_prefix_cache_hits() -> None:
    good = np.full((56, 56, 3), 30, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[3, 0] = 1
    endpoint = Endpoint()
    with backend_of(endpoint, concurrency=1) as backend:
        for part_id, shade in (("p1", 90), ("p2", 150)):
            image = np.full((112, 112, 3), shade, np.uint8)
            backend.judge([query(part_id, image=image, original_size=(112, 112), references=(good,), anomaly_map=heat)])
    first, first_evidence, second, _ = endpoint.asked
    assert first["messages"][0] == second["messages"][0]
    ours, theirs = first["messages"][1]["content"], second["messages"][1]["content"]
    assert [item["type"] for item in ours] == [
        "text",
        "text",
        "image_url",
        "text",
        "image_url",
        "text",
        "image_url",
        "text",
    ]
    assert ours[:4] == theirs[:4], "product and reference image"
    assert "p1" not in json.dumps(first["messages"])
    assert first_evidence["messages"][1]["content"][:-1] == ours[:-1], "evidence shares all but the question"
    assert [picture.shape[:2] for picture in pictures(first)] == [(56, 56), (56, 56), (112, 112)]


def test_the_label_is_asked_for_as_the_next_token_of_an_answer_already_begun() -> None:
    endpoint = Endpoint()
    opinion(endpoint, tau=0.0)
    label, evidence = endpoint.asked
    assert label["messages"][-1] == {"role": "assistant", "content": "Label: "}
    assert (label["continue_final_message"], label["add_generation_prompt"]) == (True, False)
    assert [message["role"] for message in evidence["messages"]] == ["system", "user"]
    assert "continue_final_message" not in evidence

    plain = Endpoint()
    opinion(plain, prefill=False)
    assert [message["role"] for message in plain.asked[0]["messages"]] == ["system", "user"]
    assert "continue_final_message" not in plain.asked[0]


def test_png_brings_the_very_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    endpoint = Endpoint()
    opinion(endpoint, query(image=image, original_size=(84, 56)), image_format="png")
    url = endpoint.asked[0]["messages"][1]["content"][-2]["image_url"]["url"]
    coded = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(coded, np.uint8), cv2.IMREAD_COLOR), image)


def test_the_questions_of_a_batch_go_out_together_and_fail_alone() -> None:
    endpoint = Endpoint(delay_s=0.05)
    with backend_of(endpoint, concurrency=4, tau=1.0) as backend:
        odd = query("odd", image=np.zeros((0, 3, 3), np.uint8))
        answers = backend.judge([query(), odd, query(), query(), query()])
    assert [isinstance(answer, Opinion) for answer in answers] == [True, False, True, True, True]
    assert endpoint.most_at_once == 4


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (429, Reason.CLOUD_REFUSED),
        (503, Reason.CLOUD_REFUSED),
        (504, Reason.CLOUD_TIMEOUT),
        (400, Reason.CLOUD_BAD_ANSWER),
    ],
)
def test_a_refusal_of_the_endpoint_keeps_its_meaning(status: int, reason: Reason) -> None:
    error = judge(Endpoint(status=status))
    assert isinstance(error, CloudError)
    assert error.reason is reason


def test_the_only_model_is_taken_and_an_absent_one_is_bad_input() -> None:
    with backend_of(Endpoint(), model=None) as backend:
        backend.warm_up()
        assert backend.model_id == "tiny-vl+p2"
    with (
        backend_of(Endpoint(), model="other") as backend,
        pytest.raises(BadInput, match=r"set openai\.model to one of: tiny-vl"),
    ):
        backend.warm_up()


def test_an_endpoint_that_does_not_answer_is_bad_input() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    backend = OpenAIBackend(OpenAISettings(base_url=f"http://127.0.0.1:{port}/v1"))
    with pytest.raises(BadInput, match="the model endpoint cannot be used"):
        backend.warm_up()
    error = backend.judge([query()])[0]
    assert isinstance(error, CloudError)
    assert error.reason is Reason.CLOUD_UNREACHABLE
    backend.close()


def test_it_speaks_to_a_real_server_over_a_real_socket() -> None:
    endpoint = Endpoint()
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return endpoint.models()

    @app.post("/v1/chat/completions")
    def complete(question: dict[str, Any]) -> dict[str, Any]:
        return endpoint.complete(question)[1]

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        backend = OpenAIBackend(OpenAISettings(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1/"))
        backend.warm_up()
        answers = backend.judge([query(f"p{i}") for i in range(5)])
        assert [answer.p_defect for answer in answers if isinstance(answer, Opinion)] == [pytest.approx(2 / 3)] * 5
        backend.close()
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
