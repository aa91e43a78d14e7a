"""The multimodal LLM on the command line: what it needs, said in one line."""

from __future__ import annotations

import sys

import pytest

from cli_run import saec
from saec.cli.options import mllm_backend
from saec.config import Settings
from saec.errors import BadInput


def test_a_model_is_named_only_for_the_backend_that_loads_one(tmp_path):
    line = saec("cloud", "serve", "--backend", "openai", "--model", "loupe").error()
    assert "--model and --adapter belong to --backend transformers" in line
    assert "belong to" in saec("cloud", "serve", "--adapter", tmp_path).error()


def test_without_its_extra_a_multimodal_llm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "saec.cloud.transformers", None)
    with pytest.raises(BadInput, match=r"pip install 'saec\[cloud\]'"):
        mllm_backend(Settings())
    assert "pip install" in saec("cloud", "serve", "--backend", "transformers").error()


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("SAEC_MODELS", str(tmp_path))
    args = ("cloud", "serve", "--backend", "transformers", "--port", "0", "--model")
    assert "saec models pull" in saec(*args, "qwen2.5-vl-7b").error()
    assert "unknown model" in saec(*args, tmp_path / "nowhere").error()
