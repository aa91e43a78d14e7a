"""Saved beginnings of free questions: keyed, checked, and never changed by a question."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from saec.errors import BadInput
from saec.vlm.contract.bundle import read_bundle
from saec.vlm.edge.generate import Answer
from saec.vlm.edge.store import load_start, save_start
from saec.vlm.edge.vlm import OnnxVlm
from tiny_bundle import save_bundle

PROMPTS = ("What is wrong?", "Is it good or bad, and why?")


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> OnnxVlm:
    return OnnxVlm.load(save_bundle(tmp_path_factory.mktemp("bundle") / "tiny", cache=1023), threads=1)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)


def text_of(answer: Answer) -> str:
    return "".join(answer)


@pytest.fixture(scope="module")
def saved(vlm, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("saved") / "part.safetensors"
    save_start(file, vlm.begin(picture(), system="Be brief."), vlm.bundle, picture())
    return file


def test_a_cached_answer_is_the_uncached_one_token_for_token(vlm, saved, monkeypatch):
    plain = [text_of(vlm.stream(picture(), text, system="Be brief.", max_tokens=40)) for text in PROMPTS]
    start = load_start(saved, vlm.bundle)
    monkeypatch.setattr(vlm._graphs, "see", lambda feeds: pytest.fail("looked again"))
    answers = [vlm.stream(None, text, start=start, max_tokens=40) for text in PROMPTS]
    assert all(answer.reused >= len(start.ids) - 1 for answer in answers)
    assert list(map(text_of, answers)) == plain
    assert plain[0] != plain[1]


def test_two_interleaved_questions_do_not_meet_and_the_saved_state_stays(vlm, saved):
    def digest() -> str:
        return hashlib.sha256(saved.read_bytes() + start.prefix.keys.tobytes()).hexdigest()

    start = load_start(saved, vlm.bundle)
    before = digest()
    alone = [text_of(vlm.stream(None, text, start=start, max_tokens=30)) for text in PROMPTS]
    both = [iter(vlm.stream(None, text, start=start, max_tokens=30)) for text in PROMPTS]
    said = ["", ""]
    for _ in range(60):
        for number, answer in enumerate(both):
            said[number] += next(answer, "")
    assert said == alone
    assert digest() == before


@pytest.mark.parametrize("change", ["seed", "cache", "precision"])
def test_a_beginning_of_another_model_or_context_is_refused(saved, tmp_path, change):
    how = {"seed": {"seed": 1}, "cache": {"cache": 511}, "precision": {"precision": "float16", "dtype": "float16"}}
    other = save_bundle(tmp_path / "other", **{"cache": 1023, **how[change]})
    with pytest.raises(BadInput, match=r"saved with another (model|context|dtype)"):
        load_start(saved, read_bundle(other))


def test_a_beginning_of_another_tokenizer_is_refused(vlm, saved):
    file = vlm.bundle.files["tokenizer.json"].model_copy(update={"sha256": "0" * 64})
    changed = vlm.bundle.model_copy(update={"files": {**vlm.bundle.files, "tokenizer.json": file}})
    with pytest.raises(BadInput, match="another tokenizer"):
        load_start(saved, changed)


@pytest.mark.parametrize("damage", ["cut", "states", "ids", "other", "missing"])
def test_a_damaged_file_is_refused_in_one_line(vlm, saved, tmp_path, damage):
    data, file = bytearray(saved.read_bytes()), tmp_path / "damaged.safetensors"
    if damage == "cut":
        data = data[:-100]
    elif damage == "states":
        data[-50] ^= 1
    elif damage == "ids":
        place = data.index(b'ids\\":[') + 8
        data[place : place + 1] = b"9" if data[place : place + 1] != b"9" else b"8"
    elif damage == "other":
        data = bytearray(b"not safetensors")
    if damage != "missing":
        file.write_bytes(bytes(data))
    with pytest.raises(BadInput, match=r"damaged|not a saved beginning|cannot be read") as caught:
        load_start(file, vlm.bundle)
    assert "\n" not in str(caught.value)


def test_the_key_names_the_image_and_the_prefix(vlm, tmp_path):
    def key(seed: int, system: str) -> str:
        start = vlm.begin(picture(seed), system=system)
        return save_start(tmp_path / "x", start, vlm.bundle, picture(seed))

    keys = [key(0, "a"), key(1, "a"), key(0, "b"), key(0, "a")]
    assert keys[0] == keys[3]
    assert len(set(keys)) == 3


def test_a_start_that_is_not_of_this_prompt_is_refused(vlm):
    start = vlm.begin(picture(), system="Be brief.")
    with pytest.raises(BadInput, match="not that of this prompt"):
        vlm.stream(None, "Why?", start=replace(start, system="Be long."))
