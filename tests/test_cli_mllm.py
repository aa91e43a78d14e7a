"""The multimodal LLM on the command line: what it needs, said in one line."""

from __future__ import annotations

import sys

import pytest

from cli_run import saec
from saec.cli.options import mllm_backend, runs_on_onnx
from saec.config import MllmSettings, Settings
from saec.errors import BadInput


def test_a_model_is_named_only_for_the_backends_that_load_one(tmp_path):
    line = saec("cloud", "serve", "--backend", "openai", "--model", "loupe").error()
    assert "--model and --adapter belong to --backend onnx-vlm and transformers" in line
    assert "belong to" in saec("cloud", "serve", "--adapter", tmp_path).error()


@pytest.mark.parametrize(
    ("runtime", "room", "extra"),
    [("onnx", "saec.cloud.onnx_vlm", "export"), ("transformers", "saec.cloud.transformers", "cloud")],
)
def test_without_its_extra_a_multimodal_llm_says_what_to_install(runtime, room, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, room, None)
    with pytest.raises(BadInput, match=rf"pip install 'saec\[{extra}\]'"):
        mllm_backend(Settings(mllm=MllmSettings(runtime=runtime)))


@pytest.mark.parametrize(
    ("asked", "onnx"),
    [
        ({}, True),
        ({"runtime": "transformers"}, False),
        ({"device": "cuda"}, False),
        ({"four_bit": True}, False),
        ({"dtype": "bfloat16"}, False),
        ({"model": "qwen2.5-vl-7b"}, False),
        ({"model": "qwen2.5-vl-7b", "runtime": "onnx"}, True),
    ],
)
def test_loupe_runs_on_onnx_unless_something_is_asked_for_that_only_hugging_face_has(asked, onnx):
    assert runs_on_onnx(Settings(mllm=MllmSettings(**asked))) is onnx


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("SAEC_MODELS", str(tmp_path))
    args = ("cloud", "serve", "--backend", "transformers", "--port", "0", "--model")
    assert "saec models pull" in saec(*args, "qwen2.5-vl-7b").error()
    assert "unknown model" in saec(*args, tmp_path / "nowhere").error()
