"""A small OpenAI-compatible server around a tiny model: what vLLM and SGLang answer to the requests that saec sends.

    with serving(Engine(folder)) as base_url:
        backend = OpenAIBackend(OpenAISettings(base_url=base_url))

Written from the engines' documented behaviour, not from saec's encoder: messages go through the checkpoint's own chat
template, images come as data URLs, ``continue_final_message`` leaves the last message open, log-probabilities are of
the raw logits, at most 20 of them, and ``response_format`` is met by an answer stated beforehand (a random model knows
no JSON), cut off at ``max_tokens``. What a request must not do is 400, an unknown model 404.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import torch
import uvicorn
from fastapi import FastAPI
from starlette.responses import JSONResponse
from transformers import AutoModelForImageTextToText

from cloud_fakes import query
from saec.config import MllmSettings
from saec.types import Image, Query
from saec.vlm.load import load_vlm
from saec.vlm.processors import load_processor
from saec.vlm.prompt import Ask, build_question
from tiny_vlms import save_tiny

MOST_LOGPROBS = 20
SIZE = (112, 112)
EVIDENCE = json.dumps({"kind": "surface", "bboxes": [[4, 4, 40, 30]], "desc": "A scratch near the left edge."})


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


def texture(seed: int) -> Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 215, (9, 9, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, SIZE, interpolation=cv2.INTER_CUBIC)
    return np.asarray(cv2.add(smooth, rng.integers(0, 12, smooth.shape, dtype=np.uint8)), np.uint8)


def parts(count: int = 6) -> list[Query]:
    heat = np.zeros((8, 8), np.float32)
    heat[5, 2] = 1
    good = texture(999)
    return [
        query(f"p{i}", image=texture(i), original_size=SIZE, references=(good,), anomaly_map=heat if i % 2 else None)
        for i in range(count)
    ]


def save_decided(family: str, folder: Path) -> Path:
    """Write a tiny model whose likely answers are 0 and 1, as a model's are that has learnt the question.

    An endpoint tells the 20 likeliest tokens only; a random model's are any. Both labels' rows of the output layer are
    turned towards the mean hidden state at the answer, a little above all others.
    """
    vlm = load_vlm(MllmSettings(model=str(save_tiny(family, folder)), device="cpu"))
    questions = [build_question(each, Ask.LABEL, MllmSettings()) for each in parts()]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = model(**vlm.encoder.encode(questions), output_hidden_states=True).hidden_states[-1]
    mean = states[:, -1].mean(dim=0)
    rows = model.lm_head.weight.detach().clone()
    top = (rows @ mean).max()
    for token in vlm.encoder.label_tokens:
        rows[token] += (top + 3 - rows[token] @ mean) / mean.dot(mean) * mean
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(rows)
    model.save_pretrained(folder)
    return folder


@dataclass
class Engine:
    """Serves the checkpoint in ``folder``. ``evidence`` answers what asks for JSON; ``logprobs`` off is an engine that
    leaves them out, as some do; ``spoil`` multiplies the logits, NaN for a broken model."""

    folder: Path
    evidence: str = EVIDENCE
    logprobs: bool = True
    spoil: float = 1.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.processor = load_processor(self.folder)
        self.model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32).eval()

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.folder.name, "object": "model", "max_model_len": 4096}]}

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["model"] != self.folder.name:
            raise Refused(404, f"The model `{request['model']}` does not exist.")
        if request.get("top_logprobs", 0) > MOST_LOGPROBS:
            raise Refused(400, f"top_logprobs is at most {MOST_LOGPROBS}")
        if request.get("continue_final_message") and request.get("add_generation_prompt", True):
            raise Refused(400, "Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
        assert request.get("temperature") == 0, "this server is greedy"
        with self.lock:
            self.asked.append(request)
            if "response_format" in request:
                return self._evidence(request)
            return self._generated(request)

    @torch.inference_mode()
    def _generated(self, request: dict[str, Any]) -> dict[str, Any]:
        inputs = self._inputs(request)
        made, content = [], []
        for _ in range(request["max_tokens"]):
            logprobs = (self.model(**inputs).logits[0, -1] * self.spoil).log_softmax(-1)
            best = logprobs.topk(1 + request.get("top_logprobs", 0))
            tops = [self._named(*pair) for pair in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
            content.append({**tops[0], "top_logprobs": tops[: request.get("top_logprobs", 0)]})
            made.append(int(best.indices[0]))
            if made[-1] == self.processor.tokenizer.eos_token_id:
                break
            inputs = self._with_token(inputs, made[-1])
        finish = "stop" if made[-1] == self.processor.tokenizer.eos_token_id else "length"
        text = self.processor.tokenizer.decode(made, skip_special_tokens=True)
        logprobs = {"content": content} if request.get("logprobs") and self.logprobs else None
        return _completion(request, text, finish, logprobs)

    def _evidence(self, request: dict[str, Any]) -> dict[str, Any]:
        assert request["response_format"]["type"] == "json_schema"
        tokens = self.processor.tokenizer(self.evidence, add_special_tokens=False)["input_ids"]
        cut = len(tokens) > request["max_tokens"]
        text = self.processor.tokenizer.decode(tokens[: request["max_tokens"]]) if cut else self.evidence
        return _completion(request, text, "length" if cut else "stop", None)

    def _inputs(self, request: dict[str, Any]) -> dict[str, torch.Tensor]:
        images: list[PIL.Image.Image] = []
        messages = [
            {"role": message["role"], "content": list(_items(message["content"], images))}
            for message in request["messages"]
        ]
        text = self.processor.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=request.get("add_generation_prompt", True),
            continue_final_message=request.get("continue_final_message", False),
        )
        return dict(self.processor(text=[text], images=images or None, return_tensors="pt"))

    def _with_token(self, inputs: dict[str, torch.Tensor], token: int) -> dict[str, torch.Tensor]:
        row = {"input_ids": token, "attention_mask": 1, "mm_token_type_ids": 0}
        return {
            name: torch.cat([value, torch.tensor([[row[name]]])], dim=1) if name in row else value
            for name, value in inputs.items()
        }

    def _named(self, logprob: float, token: int) -> dict[str, Any]:
        text = self.processor.tokenizer.decode([token])
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def _items(content: str | list[dict[str, Any]], images: list[PIL.Image.Image]) -> Iterator[dict[str, Any]]:
    """Yield a message's items as chat templates know them; the pictures go to ``images``."""
    for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if item["type"] == "text":
            yield item
            continue
        head, _, coded = item["image_url"]["url"].partition(",")
        if not (head.startswith("data:image/") and head.endswith(";base64")):
            raise Refused(400, "only data URLs are served")
        images.append(PIL.Image.open(io.BytesIO(base64.b64decode(coded, validate=True))).convert("RGB"))
        yield {"type": "image"}


def _completion(request: dict[str, Any], text: str, finish: str, logprobs: object) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return {
        "object": "chat.completion",
        "model": request["model"],
        "choices": [{**choice, "logprobs": logprobs, "finish_reason": finish}],
    }


@contextmanager
def serving(engine: Engine) -> Iterator[str]:
    """Serve over a real socket; yields the base address, which ends in /v1."""
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return engine.models()

    @app.post("/v1/chat/completions")
    def complete(request: dict[str, Any]) -> JSONResponse:
        try:
            # The engines write their JSON themselves: NaN stands as it is.
            return JSONResponse(json.loads(json.dumps(engine.complete(request)), parse_constant=lambda _: None))
        except Refused as error:
            return JSONResponse({"error": {"message": str(error), "code": error.status}}, status_code=error.status)

    with listening(app) as url:
        yield f"{url}/v1"


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Run an app in a thread, behind a socket of its own; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
