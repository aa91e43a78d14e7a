"""An exported VLM's answers: decisions, evidence, streamed text, and saved beginnings. Tiny random bundles."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from saec.config import PromptSettings
from saec.errors import BadInput
from saec.types import Query
from saec.vlm.contract.bundle import read_bundle
from saec.vlm.edge import vlm as vlm_module
from saec.vlm.edge.generate import Sampling, pieces
from saec.vlm.edge.store import load_start, save_start
from saec.vlm.edge.vlm import Answer, OnnxVlm
from saec.vlm.prompt import Ask, Question, ask_evidence, build_question
from tiny_bundle import SPECIALS, save_bundle, tiny_tokenizer

SMALL = PromptSettings(max_side=56, references=1)
PROMPTS = ("What is wrong?", "Is it good or bad, and why?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    # Random models never stop by themselves: none of these tokens is likely.
    return save_bundle(tmp_path_factory.mktemp("bundle") / "tiny", cache=1023)


@pytest.fixture(scope="module")
def vlm(folder) -> OnnxVlm:
    return OnnxVlm.load(folder, threads=1)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)


def asked(ask: Ask = Ask.LABEL, *, seed: int = 0) -> Question:
    query = Query("p", "cell", picture(seed), (32, 24), references=(picture(9),))
    return build_question(query, ask, SMALL)


def text_of(answer: Answer) -> str:
    return "".join(answer)


# -- decisions and evidence


def test_a_decision_is_the_softmax_over_the_two_labels_and_says_their_mass(vlm):
    question = asked()
    decision, seen = vlm.decide(question)
    fresh = vlm._decoder.open()
    logits = vlm._feed(fresh, list(seen.ids), lambda: vlm._prompts.pictures(question)).astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    good, defect = (p[label] for label in vlm.bundle.prompt.labels)
    assert decision.mass == pytest.approx(good + defect, rel=1e-5)
    assert decision.p_defect == pytest.approx(defect / (good + defect), abs=1e-5)


def test_another_picture_is_another_decision(vlm):
    assert vlm.decide(asked())[0] != vlm.decide(asked(seed=5))[0]


def test_evidence_after_a_decision_is_the_same_and_needs_no_second_look(vlm, monkeypatch):
    question = asked()
    alone = vlm.evidence(question, max_tokens=24)
    _, seen = vlm.decide(question)
    monkeypatch.setattr(vlm, "_see", lambda feeds: pytest.fail("looked again"))
    assert vlm.evidence(ask_evidence(question), seen, max_tokens=24) == alone
    assert vlm.evidence(question, seen, max_tokens=24) == alone  # and seen is as it was


def test_what_was_seen_of_one_part_is_never_used_for_another(vlm):
    other = asked(seed=5)
    alone = vlm.evidence(other, max_tokens=24)
    _, seen = vlm.decide(asked())
    assert vlm.evidence(other, seen, max_tokens=24) == alone


def test_evidence_stops_at_its_deadline_and_at_the_contexts_end(folder, vlm, tmp_path):
    assert vlm.evidence(asked(), max_tokens=100, deadline=time.monotonic()) != ""
    assert len(vlm.evidence(asked(), max_tokens=100, deadline=time.monotonic())) < len(
        vlm.evidence(asked(), max_tokens=100)
    )
    length = len(vlm.decide(asked(Ask.EVIDENCE))[1].ids)
    small = OnnxVlm.load(save_bundle(tmp_path / "small", cache=length + 9), threads=1)
    whole = vlm.evidence(asked(), max_tokens=10)
    assert small.evidence(asked(), max_tokens=100) == whole


# -- free questions


def test_pieces_of_an_answer_come_one_by_one_and_make_the_text(vlm):
    answer = vlm.stream(picture(), PROMPTS[0], max_tokens=40)
    got = list(answer)
    assert len(got) > 5
    assert answer.tokens == 40
    assert "".join(got) == text_of(vlm.stream(picture(), PROMPTS[0], max_tokens=40))
    assert set(answer.timing_ms) == {"vision", "prefill", "first_token", "decode"}


@pytest.mark.parametrize("text", ["Schönes Öl – 漢字 🙂 done", "plain", ""])
def test_a_character_of_several_tokens_is_held_back_until_it_is_complete(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text).ids
    got = list(pieces(tokenizer, ids))
    assert "".join(got) == text
    assert not any("\ufffd" in piece for piece in got)
    assert len(got) > 1 or len(ids) < 2


def test_control_tokens_have_no_text_and_half_a_character_at_the_end_is_not_lost():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("a" + SPECIALS[1] + "b🙂").ids[:-1]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True) == "ab\ufffd"


def test_an_answer_ends_before_its_end_token(vlm, monkeypatch):
    ids = vlm._tokenizer.encode(text_of(vlm.stream(picture(), PROMPTS[0], max_tokens=30))).ids
    assert ids
    seen: list[int] = []
    real = vlm_module.generate

    def recording(*args, **how):
        for token in real(*args, **how):
            seen.append(token)
            yield token

    monkeypatch.setattr(vlm_module, "generate", recording)
    text_of(vlm.stream(picture(), PROMPTS[0], max_tokens=30))
    whole, end = list(seen), seen[12]
    seen.clear()
    prompt = vlm.bundle.prompt.model_copy(update={"ends": (end,)})
    monkeypatch.setattr(vlm, "bundle", vlm.bundle.model_copy(update={"prompt": prompt}))
    text_of(vlm.stream(picture(), PROMPTS[0], max_tokens=30))
    assert seen == whole[: whole.index(end)]


def test_sampling_is_reproducible_and_greedy_is_its_limit(vlm):
    def say(**how: float) -> str:
        return text_of(vlm.stream(picture(), PROMPTS[0], max_tokens=24, sampling=Sampling(**how)))

    drawn = say(temperature=1.5, seed=1)
    assert say(temperature=1.5, seed=1) == drawn
    assert say(temperature=1.5, seed=2) != drawn
    assert say(temperature=1.5, top_p=0.0, seed=3) == say() != drawn


def test_top_p_keeps_the_smallest_set_of_likely_tokens():
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    pick = Sampling(temperature=1.0, top_p=0.7, seed=0).picker()
    assert {pick(logits) for _ in range(200)} == {1, 3}
    pick = Sampling(temperature=1.0, seed=0).picker()
    counts = np.bincount([pick(logits) for _ in range(4000)]) / 4000
    assert counts == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=0.03)


def test_a_prompt_and_its_answer_must_fit_together(vlm):
    most = vlm.bundle.signature.context
    with pytest.raises(BadInput, match="fit into the model's context"):
        vlm.stream(picture(), PROMPTS[0], max_tokens=most)
    answer = vlm.stream(picture(), PROMPTS[0], max_tokens=most - 30, deadline=time.monotonic())
    assert answer.prompt_tokens <= 30


# -- saved beginnings


@pytest.fixture(scope="module")
def saved(vlm, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("saved") / "part.safetensors"
    save_start(file, vlm.begin(picture(), system="Be brief."), vlm.bundle, picture())
    return file


def test_a_cached_answer_is_the_uncached_one_token_for_token(vlm, saved, monkeypatch):
    plain = [text_of(vlm.stream(picture(), text, system="Be brief.", max_tokens=40)) for text in PROMPTS]
    start = load_start(saved, vlm.bundle)
    monkeypatch.setattr(vlm, "_see", lambda feeds: pytest.fail("looked again"))
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


# -- no torch


ALONE = """
import sys
from pathlib import Path

HEAVY = ("torch", "torchvision", "transformers", "peft", "accelerate", "onnx", "gguf")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Absent())

import numpy as np
from saec.config import PromptSettings
from saec.types import Query
from saec.vlm.edge.store import load_start, save_start
from saec.vlm.edge.vlm import OnnxVlm
from saec.vlm.prompt import Ask, build_question

vlm = OnnxVlm.load(Path(sys.argv[1]), threads=1)
image = np.full((24, 32, 3), 90, np.uint8)
question = build_question(Query("p", "cell", image, (32, 24)), Ask.LABEL, PromptSettings(max_side=56))
decision, seen = vlm.decide(question)
assert 0 <= decision.p_defect <= 1
vlm.evidence(question, seen, max_tokens=4)
save_start(Path(sys.argv[2]), vlm.begin(image), vlm.bundle, image)
answer = vlm.stream(None, "Why?", start=load_start(Path(sys.argv[2]), vlm.bundle), max_tokens=4)
assert "".join(answer)
assert not set(HEAVY) & set(sys.modules)
print("answered")
"""


def test_everything_works_where_no_training_or_exporting_package_is_installed(folder, tmp_path):
    command = [sys.executable, "-W", "error", "-c", ALONE, str(folder), str(tmp_path / "saved")]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "answered"
