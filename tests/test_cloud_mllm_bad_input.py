"""What multimodal LLMs and their endpoints get wrong, seen from the edge: one clear error or a recorded fallback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

from cloud_fakes import query
from openai_server import Engine, listening, save_decided, serving
from saec.cloud.client import HttpCloudClient
from saec.cloud.openai import OpenAIBackend
from saec.cloud.service import create_app, serve
from saec.cloud.transformers import TransformersBackend
from saec.config import CloudSettings, OpenAISettings, ServeSettings, Settings
from saec.errors import BadInput
from saec.types import Backend, CloudError, Opinion, Query, Reason
from tiny_vlms import QWEN_SPECIALS, bpe_tokenizer, save_tiny, save_tiny_adapter

PART = query("p1", size=112)
GOOD = {"kind": "surface", "bboxes": [[4, 4, 40, 30]], "desc": "A scratch."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decided("qwen2.5-vl", tmp_path_factory.mktemp("models") / "tiny")


def local(folder: Path, **more: object) -> TransformersBackend:
    section = {"model": str(folder), "device": "cpu", "max_side": 112, "min_label_mass": 0, **more}
    return TransformersBackend(Settings.model_validate({"mllm": section}))


def remote(url: str, **more: object) -> OpenAIBackend:
    settings = {"base_url": url, "min_label_mass": 0, "max_side": 112, "timeout_s": 10, **more}
    return OpenAIBackend(OpenAISettings.model_validate(settings))


@contextmanager
def asking(backend: Backend) -> Iterator[HttpCloudClient]:
    """The whole way: the edge's client, HTTP, the service, the backend."""
    ready: Queue[Exception | None] = Queue()
    with listening(create_app(backend, ServeSettings(), on_started=ready.put)) as url:
        client = HttpCloudClient(url, CloudSettings())
        assert ready.get(timeout=60) is None
        try:
            yield client
        finally:
            client.close()


def error_of(client: HttpCloudClient, asked: Query = PART) -> CloudError:
    with pytest.raises(CloudError) as raised:
        client.judge(asked, deadline_s=20)
    return raised.value


def refusal_to_start(backend: Backend) -> str:
    with pytest.raises(BadInput) as raised:
        serve(backend, ServeSettings(port=0))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (json.dumps(GOOD)[:40], "not the asked JSON"),
        ("The part is scratched.", "not the asked JSON"),
        (json.dumps(GOOD | {"bboxes": [[4, 4, 400, 30]]}), "is not inside an image of 112 x 112"),
        (json.dumps(GOOD | {"kind": "magic"}), "'magic' is none of"),
        (" " + json.dumps(GOOD) + " and more " * 300, "cut off"),
    ],
)
def test_an_answer_that_cannot_be_used_is_recorded_and_the_verdict_stands(folder: Path, answer: str, why: str) -> None:
    with serving(Engine(folder, evidence=answer)) as endpoint:
        backend = remote(endpoint, tau=0.0)
        with asking(backend) as client:
            opinion = client.judge(PART, deadline_s=20)
        backend.close()
    assert 0 <= opinion.p_defect <= 1
    assert opinion.evidence.boxes == ()
    assert opinion.evidence.text is not None
    assert opinion.evidence.text.startswith("no evidence: ")
    assert why in opinion.evidence.text


def test_what_a_model_in_this_process_writes_instead_of_json_reaches_the_edge_as_no_evidence(folder: Path) -> None:
    backend = local(folder, tau=0.0, evidence_tokens=16)
    with asking(backend) as client:
        opinion = client.judge(PART, deadline_s=20)
    backend.close()
    assert opinion.evidence.boxes == ()
    assert str(opinion.evidence.text).startswith("no evidence: not the asked JSON")


def test_a_part_whose_logits_are_not_numbers_gets_no_opinion(folder: Path) -> None:
    backend = local(folder, tau=0.0)
    with asking(backend) as client:
        assert isinstance(client.judge(PART, deadline_s=20), Opinion)
        assert backend._serving is not None
        with torch.no_grad():
            backend._serving.vlm.model.lm_head.weight.fill_(float("nan"))
        error = error_of(client)
    backend.close()
    assert error.reason is Reason.CLOUD_BAD_ANSWER
    assert "only nan of the probability" in str(error)


def test_a_model_whose_output_is_no_number_does_not_start(folder: Path, tmp_path: Path) -> None:
    broken = save_tiny("qwen2.5-vl", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    weights[name].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert "the model's output is not a number" in refusal_to_start(local(broken))


def test_a_tokenizer_without_single_label_tokens_does_not_start(tmp_path: Path) -> None:
    glued = save_tiny("qwen2.5-vl", tmp_path / "glued")
    bpe_tokenizer(QWEN_SPECIALS, end="<|im_end|>", pad="<|endoftext|>", digits=False).save_pretrained(glued)
    assert "is not one token" in refusal_to_start(local(glued))


def test_an_adapter_for_another_base_does_not_start(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = save_tiny_adapter(save_tiny("qwen2.5-vl", tmp_path / "other", seed=1), tmp_path / "adapter", seed=1)
    assert "another base" in refusal_to_start(local(folder, adapter=str(other)))
    assert not [record for record in caplog.records if record.exc_info]  # one line says it all


def test_an_endpoint_that_is_not_there_does_not_start(folder: Path) -> None:
    with serving(Engine(folder)) as endpoint:
        pass
    assert "the model endpoint cannot be used (no connection" in refusal_to_start(remote(endpoint))


def test_an_endpoint_that_goes_away_is_an_error_of_each_part_and_no_verdict(folder: Path) -> None:
    with serving(Engine(folder)) as endpoint:
        backend = remote(endpoint)
        backend.warm_up()
    answers = backend.judge([PART, PART])
    backend.close()
    assert [type(answer) for answer in answers] == [CloudError, CloudError]
    assert {answer.reason for answer in answers if isinstance(answer, CloudError)} == {Reason.CLOUD_UNREACHABLE}


def test_an_endpoint_without_log_probabilities_does_not_start_and_gives_no_opinion(folder: Path) -> None:
    engine = Engine(folder)
    with serving(engine) as endpoint:
        backend = remote(endpoint)
        with asking(backend) as client:
            engine.logprobs = False
            error = error_of(client)
        assert "no first-token log-probabilities" in refusal_to_start(remote(endpoint))
        backend.close()
    assert error.reason is Reason.CLOUD_BAD_ANSWER
    assert "no first-token log-probabilities" in str(error)


def test_an_endpoint_whose_model_is_broken_gives_no_opinion(folder: Path) -> None:
    engine = Engine(folder)
    with serving(engine) as endpoint:
        backend = remote(endpoint)
        with asking(backend) as client:
            engine.spoil = float("nan")
            error = error_of(client)
        backend.close()
    assert error.reason is Reason.CLOUD_BAD_ANSWER
    assert "no first-token log-probabilities" in str(error)
