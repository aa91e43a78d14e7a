"""The explainer of exported models: an evidence question inside its time, in a thread that gives way to the line."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_fakes import flat, tree
from cli_run import process, saec
from saec.config import MllmSettings, Settings
from saec.errors import BadInput
from saec.types import Query
from saec.vlm.answers import UnusableAnswer
from saec.vlm.edge.explain import OnnxExplainer
from saec.vlm.edge.vlm import OnnxVlm
from tiny_bundle import save_bundle

QUERY = Query("p1", "bolt", np.full((56, 56, 3), 90, np.uint8), (56, 56))
JSON = '{"kind": "surface", "bboxes": [[0, 0, 5, 5]], "desc": "A scratch at the top left."}'


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = save_bundle(tmp_path_factory.mktemp("bundles") / "tiny", cache=1023)
    small = {"max_side": 56, "threads": 1}
    return Settings.model_validate({"mllm": small, "explain": {"model": str(folder), "max_tokens": 8}})


def test_an_answer_in_the_asked_form_becomes_kind_and_text_in_the_models_name(settings, monkeypatch):
    asked: list[Any] = []

    def evidence(self: OnnxVlm, question: Any, **how: Any) -> str:
        asked.append((question.ask, how["max_tokens"], how.get("deadline")))
        return JSON

    monkeypatch.setattr(OnnxVlm, "evidence", evidence)
    explainer = OnnxExplainer(settings)
    deadline = time.monotonic() + 60
    said = explainer.explain(QUERY, deadline=deadline)
    explainer.close()
    assert said is not None
    assert (said.kind, said.text, said.source) == ("surface", "A scratch at the top left.", explainer.model_id)
    assert asked[1:] == [("evidence", 8, deadline)]


def test_a_model_that_takes_no_such_question_is_refused_before_anything_is_inspected(tmp_path):
    small = save_bundle(tmp_path / "small", cache=63)
    with pytest.raises(BadInput, match="do not fit into the model's context of 64"):
        OnnxExplainer(Settings.model_validate({"explain": {"model": str(small)}}))


def test_a_part_is_shown_at_the_size_that_the_model_sees(settings, monkeypatch):
    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(OnnxVlm, "evidence", lambda self, question, **how: shown.append(question.seen) or JSON)
    explainer = OnnxExplainer(settings.model_copy(update={"mllm": MllmSettings(threads=1)}))
    explainer.explain(QUERY, deadline=time.monotonic() + 60)
    explainer.close()
    assert shown == [(8, 8)] * 2  # the question to warm up, too


def test_an_answer_that_is_not_the_asked_form_is_an_error_and_a_late_one_is_none(settings):
    explainer = OnnxExplainer(settings)
    with pytest.raises(UnusableAnswer):  # random weights speak no JSON
        explainer.explain(QUERY, deadline=time.monotonic() + 60)
    assert explainer.explain(QUERY, deadline=time.monotonic() - 1) is None
    explainer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_the_model_runs_at_low_priority_and_the_line_at_its_own(settings, monkeypatch):
    seen: list[int] = []

    def evidence(self: OnnxVlm, question: Any, **how: Any) -> str:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return JSON

    monkeypatch.setattr(OnnxVlm, "evidence", evidence)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    explainer = OnnxExplainer(settings)
    explainer.explain(QUERY, deadline=time.monotonic() + 60)
    explainer.close()
    assert set(seen) == {10}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


@pytest.fixture(scope="module")
def station(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tree(tmp_path_factory.mktemp("data") / "parts")
    out = tmp_path_factory.mktemp("stations") / "bolt"
    assert process("fit", data, "--out", out).code == 0
    return out


@pytest.mark.parametrize(
    ("model", "fix"), [("loupe", "saec models pull loupe"), ("loupee", "one of "), ("/no/where", "")]
)
def test_a_model_that_is_not_at_hand_is_one_line_before_anything_is_inspected(
    tmp_path, station, monkeypatch, model, fix
):
    import cli_fakes

    cli_fakes.install(monkeypatch)
    monkeypatch.setenv("SAEC_MODELS", str(tmp_path / "empty"))
    line = saec("inspect", flat(tmp_path / "in", 3), "-s", station, "-o", tmp_path / "run", "--explain", model).error()
    assert model in line and fix in line
    assert not (tmp_path / "run").exists()


def test_explaining_loads_neither_torch_nor_the_exporter(settings, tmp_path, station):
    """As on a line's computer, where neither is installed."""
    blocked = tmp_path / "blocked"
    for name in ("torch", "transformers", "peft", "onnx", "gguf"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text(
            f"raise ModuleNotFoundError('No module named {name}', name='{name}')"
        )
    command = ("inspect", flat(tmp_path / "in", 9), "-s", station, "-o", tmp_path / "run")
    dials = ("--explain", settings.explain.model, "--set", "mllm.max_side=56", "--set", "explain.max_tokens=8")
    found = process(*command, *dials, PYTHONPATH=os.pathsep.join([str(blocked), os.environ.get("PYTHONPATH", "")]))
    assert found.code == 0, found.err
    assert "rejects put into words by" in found.out
