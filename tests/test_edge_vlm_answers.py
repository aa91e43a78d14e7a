"""An exported VLM's answers: decisions, evidence, and streamed text. Tiny random bundles."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from saec.config import MllmSettings, PromptSettings
from saec.errors import BadInput
from saec.types import Query
from saec.vlm.edge import vlm as vlm_module
from saec.vlm.edge.generate import Answer, Sampling, pieces
from saec.vlm.edge.vlm import OnnxVlm
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


def asked(ask: Ask = Ask.LABEL, *, seed: int = 0, reference: int = 9) -> Question:
    query = Query("p", "cell", picture(seed), (32, 24), references=(picture(reference),))
    return build_question(query, ask, SMALL)


def text_of(answer: Answer) -> str:
    return "".join(answer)


# -- decisions and evidence


def test_a_decision_is_the_softmax_over_the_two_labels_and_says_their_mass(vlm):
    question = asked()
    decision, seen = vlm.decide(question)
    fresh = vlm._graphs.open()
    logits = vlm._graphs.feed(fresh, list(seen.ids), lambda: vlm._prompts.pictures(question)).astype(np.float64)
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
    monkeypatch.setattr(vlm._graphs, "see", lambda feeds: pytest.fail("looked again"))
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


# -- what prompts begin with in common


def test_the_beginning_of_a_products_prompts_is_computed_once_and_changes_nothing(folder, monkeypatch):
    plain, keeping = (OnnxVlm.load(folder, threads=1, prefixes=kept) for kept in (0, 2))
    looked: list[int] = []
    real = keeping._graphs.see
    monkeypatch.setattr(keeping._graphs, "see", lambda feeds: looked.append(1) or real(feeds))
    for seed, looks in ((0, 2), (5, 1), (6, 1)):  # the reference and the part; then parts alone
        looked.clear()
        decision, _ = keeping.decide(asked(seed=seed))
        wanted, _ = plain.decide(asked(seed=seed))
        assert decision.p_defect == pytest.approx(wanted.p_defect, abs=1e-5)
        assert decision.mass == pytest.approx(wanted.mass, rel=1e-4)
        assert len(looked) == looks
    text = keeping.evidence(asked(seed=6), max_tokens=16)
    assert text == plain.evidence(asked(seed=6), max_tokens=16)


def test_another_reference_is_another_beginning_and_only_the_latest_are_kept(folder):
    plain, keeping = (OnnxVlm.load(folder, threads=1, prefixes=kept) for kept in (0, 2))
    for reference in (9, 8, 7, 9):
        question = asked(reference=reference)
        assert keeping.decide(question)[0].p_defect == pytest.approx(plain.decide(question)[0].p_defect, abs=1e-5)
        assert len(keeping._beginnings) <= 2


def test_images_are_shown_at_the_size_that_the_model_sees_unless_somebody_says_otherwise(vlm):
    assert vlm.at_its_size(MllmSettings()).max_side == 8
    assert vlm.at_its_size(MllmSettings()).side_multiple == 1
    assert vlm.at_its_size(MllmSettings(max_side=100)).max_side == 100


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
from saec.config import MllmSettings, PromptSettings
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
