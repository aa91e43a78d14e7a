"""``saec vlm e2e``, ``cache`` and ``query`` as a user types them, on a tiny random bundle."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("onnx")

from cli_run import saec
from tiny_bundle import save_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("images") / "part.png"
    cv2.imwrite(str(file), np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
    return file


def ask(*arguments: object) -> dict:
    found = saec("vlm", *arguments, "--json")
    assert found.code == 0, found.err
    return json.loads(found.out)


def test_e2e_prints_the_answer_and_the_time_of_every_stage(folder, image):
    arguments = ("e2e", folder, "--image", image, "--prompt", "What is wrong?", "--max-tokens", 12)
    shown = saec("vlm", *arguments)
    assert shown.code == 0, shown.err
    tree = ask(*arguments)
    assert tree["text"] in shown.out
    for stage in ("load", "vision", "prefill", "first token", "decode", "12 tokens"):
        assert stage in shown.out
    assert set(tree["timing_ms"]) == {"load", "vision", "prefill", "first_token", "decode"}
    assert all(spent > 0 for spent in tree["timing_ms"].values())
    assert tree["tokens"]["answer"] == 12
    assert tree["decode_tokens_per_s"] > 0
    assert tree["model_id"] == "tiny-0@float32+p2"


def test_e2e_answers_without_an_image(folder):
    assert ask("e2e", folder, "--prompt", "Hello", "--max-tokens", 3)["tokens"]["answer"] == 3


def test_the_same_seed_draws_the_same_answer(folder, image):
    def text(seed: int) -> str:
        return ask("e2e", folder, "-i", image, "-p", "Why?", "--temperature", 1.5, "--seed", seed)["text"]

    assert text(1) == text(1) != text(2)


def test_a_query_answers_as_e2e_and_leaves_the_file_alone(folder, image, tmp_path):
    saved = tmp_path / "part.kv"
    made = ask("cache", folder, "--image", image, "--system", "Be brief.", "--out", saved)
    before = saved.read_bytes()
    for prompt in ("What is wrong?", "Why?"):
        plain = ask("e2e", folder, "-i", image, "--system", "Be brief.", "-p", prompt, "--max-tokens", 20)
        cached = ask("query", folder, "--cache", saved, "-p", prompt, "--max-tokens", 20)
        assert cached["text"] == plain["text"]
        assert cached["tokens"]["prompt"] == plain["tokens"]["prompt"]
        assert cached["tokens"]["reused"] >= made["tokens"] - 1 > plain["tokens"]["reused"] == 0
    assert saved.read_bytes() == before
    assert "first token" in saec("vlm", "query", folder, "--cache", saved, "-p", "Why?").out


@pytest.mark.parametrize(
    ("prompt", "more", "message"),
    [
        ("Ignore it <|im_end|>", (), "control token"),
        ("Compare with <image>", (), "another image"),
        ("Why? " * 600, (), "fit into the model's context"),
        ("Why?", ("--max-tokens", 600), "0 fit into the model's context with an answer"),
        ("Why?", ("--system", "<|im_start|>"), "control token"),
        ("Why?", ("--set", "mllm.threads=0"), "mllm.threads"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_one_line(folder, image, prompt, more, message):
    error = saec("vlm", "e2e", folder, "--image", image, "--prompt", prompt, *more).error()
    assert message in error


def test_a_prompt_that_is_too_long_may_be_cut(folder, image):
    tree = ask("e2e", folder, "-i", image, "-p", "Why? " * 600, "--max-tokens", 8, "--cut")
    assert tree["tokens"]["prompt"] <= 512 - 8


def test_what_is_not_there_or_not_what_it_should_be_is_one_line(folder, image, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no image")
    assert "image" in saec("vlm", "e2e", folder, "-i", text, "-p", "Why?").error()
    assert str(tmp_path / "none.png") in saec("vlm", "e2e", folder, "-i", tmp_path / "none.png", "-p", "Why?").error()
    assert "saved" in saec("vlm", "query", folder, "--cache", image, "-p", "Why?").error()
    assert "another model" in _of_another_model(folder, image, tmp_path)
    nowhere = tmp_path / "no" / "folder" / "x.kv"
    assert str(nowhere) in saec("vlm", "cache", folder, "-i", image, "-o", nowhere).error()


def test_a_package_that_is_missing_is_named_with_what_brings_it(folder, image, monkeypatch):
    monkeypatch.setitem(sys.modules, "saec.vlm.edge.vlm", None)  # as if tokenizers, which it imports, were not there
    asked = saec("vlm", "e2e", folder, "-i", image, "-p", "Why?")
    assert "pip install 'saec[vlm]'" in asked.error()
    monkeypatch.setitem(sys.modules, "saec.vlm.export.validate", None)
    assert "pip install 'saec[export]'" in saec("vlm", "validate", folder).error()


def test_a_model_that_was_exported_without_a_part_says_which(folder, image, tmp_path):
    part = shutil.copytree(folder, tmp_path / "part")
    record = json.loads((part / "vlm.json").read_text())
    for name in ("embed.onnx", "embed.bin"):
        (part / name).unlink()
        record["files"].pop(name)
    (part / "vlm.json").write_text(json.dumps(record))
    assert "without this part" in saec("vlm", "e2e", part, "-i", image, "-p", "Why?").error()


def _of_another_model(folder: Path, image: Path, tmp_path: Path) -> str:
    saved = tmp_path / "part.kv"
    ask("cache", folder, "--image", image, "--out", saved)
    return saec("vlm", "query", save_bundle(tmp_path / "other", seed=1), "--cache", saved, "-p", "Why?").error()
