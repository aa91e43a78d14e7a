"""Decisions, ranking and evidence of every class: the same alone and in a batch, with and without a kept prefix."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from cloud_fakes import query  # noqa: E402
from saec.config import MllmSettings  # noqa: E402
from saec.vlm.decide import Decision, generate_evidence, p_defect, rank  # noqa: E402
from saec.vlm.encode import IGNORED  # noqa: E402
from saec.vlm.load import Vlm, load_vlm  # noqa: E402
from saec.vlm.looks import five_crops  # noqa: E402
from saec.vlm.prefix import PROVED, PrefixCache  # noqa: E402
from saec.vlm.prompt import Ask, Question, ask_evidence, build_question  # noqa: E402
from saec.vlm.run import forward  # noqa: E402
from tiny_vlms import FAMILIES, save_tiny, save_tiny_adapter  # noqa: E402

SEEN = MllmSettings(max_side=112)
EXACT = 1e-5
"""Of one P(defect) in float32."""

vlms = pytest.mark.parametrize("vlm", FAMILIES, indirect=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / f"tiny-{family}") for family in FAMILIES}


@pytest.fixture(scope="module")
def loaded(folders) -> dict[str, Vlm]:
    return {family: load(folder) for family, folder in folders.items()}


@pytest.fixture
def vlm(loaded, request) -> Vlm:
    return loaded[request.param]


def load(folder: Path, **more: object) -> Vlm:
    return load_vlm(MllmSettings(model=str(folder), device="cpu", **more))  # type: ignore[arg-type]


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def asked(number: int, **more: object) -> Question:
    """Questions of different lengths: every third part has a close-up, and the parts differ in shape."""
    height = 60 + 20 * (number % 4)
    fields: dict[str, object] = {"image": noise(number, height, 112), "original_size": (112, height)}
    if number % 3 == 1:
        fields["anomaly_map"] = np.eye(4, dtype=np.float32) * np.arange(4, dtype=np.float32)
    return build_question(query(f"p{number}", **{**fields, **more}), Ask.LABEL, SEEN)


def batch() -> list[Question]:
    reference = (noise(99, 80, 60),)
    return [asked(0, references=reference), asked(1), asked(2, references=reference, product="bolt"), asked(3)]


def assert_same(found: list[Decision], wanted: list[Decision], tolerance: float = EXACT) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.p_defect == pytest.approx(other.p_defect, abs=tolerance)
        assert one.mass == pytest.approx(other.mass, rel=1e-3)


@vlms
def test_p_defect_is_the_softmax_over_both_labels_after_the_prefill(vlm):
    (question,) = batch()[:1]
    inputs = vlm.encoder.encode([question])
    assert vlm.encoder.tokenizer.decode(inputs["input_ids"][0]).endswith("Label: ")
    with torch.inference_mode():
        logits = vlm.model(**inputs).logits[0, -1]
    good, defect = (float(logits[token]) for token in vlm.encoder.label_tokens)
    (found,) = p_defect(vlm, [question])
    assert found.p_defect == pytest.approx(1 / (1 + np.exp(good - defect)), abs=EXACT)
    whole = logits.softmax(0)
    assert found.mass == pytest.approx(sum(float(whole[token]) for token in vlm.encoder.label_tokens), rel=1e-4)


@vlms
def test_a_part_gets_the_same_answer_alone_and_in_any_batch(vlm):
    questions = batch()
    together = p_defect(vlm, questions)
    assert len({round(decision.p_defect, 4) for decision in together}) == len(questions), "the parts differ"
    assert_same([p_defect(vlm, [question])[0] for question in questions], together)
    assert_same(p_defect(vlm, questions[::-1])[::-1], together)


@vlms
def test_a_kept_prefix_changes_no_answer(vlm):
    questions = batch()
    plain = p_defect(vlm, questions)
    prefixes = PrefixCache(vlm, 8)
    assert prefixes.usable
    for _ in range(2):
        assert_same(p_defect(vlm, questions, prefixes=prefixes), plain)
    assert prefixes.hits >= len(questions)
    assert_same([p_defect(vlm, [question], prefixes=prefixes)[0] for question in questions], plain)
    other = [asked(number, references=(noise(5, 64, 64),)) for number in (4, 5, 7)]
    assert_same(p_defect(vlm, other, prefixes=prefixes), p_defect(vlm, other))


@vlms
def test_a_kept_prefix_is_never_written_to(vlm):
    prefixes = PrefixCache(vlm, 8)
    questions = [asked(0), asked(2)]
    p_defect(vlm, questions, prefixes=prefixes)
    (kept,) = prefixes._kept.values()
    before = [(keys.clone(), values.clone()) for keys, values in kept.layers]
    p_defect(vlm, questions, prefixes=prefixes)
    assert prefixes._kept.popitem()[1] is kept
    for (keys, values), (old_keys, old_values) in zip(kept.layers, before, strict=True):
        assert torch.equal(keys, old_keys)
        assert torch.equal(values, old_values)


@pytest.mark.parametrize("vlm", ["qwen2.5-vl"], indirect=True)
def test_parts_that_share_product_and_reference_share_a_prefix_and_few_are_kept(vlm):
    prefixes = PrefixCache(vlm, 2)
    p_defect(vlm, [asked(0), asked(2), asked(6)], prefixes=prefixes)
    assert (len(prefixes._kept), prefixes.hits) == (1, 2)
    p_defect(vlm, [asked(0, product=name) for name in ("bolt", "nut", "cell")], prefixes=prefixes)
    assert len(prefixes._kept) == 2
    p_defect(
        vlm, [asked(0, references=(noise(1, 60, 60),)), asked(0, references=(noise(2, 60, 60),))], prefixes=prefixes
    )
    assert (len(prefixes._kept), prefixes.hits) == (2, 2), "the same reference text, other pixels"


@pytest.mark.parametrize("vlm", ["llava"], indirect=True)
def test_a_family_that_no_test_has_proved_runs_without(vlm, monkeypatch):
    monkeypatch.setattr("saec.vlm.prefix.PROVED", PROVED - {"llava"})
    prefixes = PrefixCache(vlm, 8)
    assert not prefixes.usable
    assert_same(p_defect(vlm, batch(), prefixes=prefixes), p_defect(vlm, batch()), 0)
    assert not PrefixCache(vlm, 0).usable


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_decides_alike_with_and_without_a_kept_prefix(folders, tmp_path, family):
    adapter = save_tiny_adapter(folders[family], tmp_path / "adapter")
    base = load(folders[family])
    tuned = load_vlm(MllmSettings(model=str(folders[family]), adapter=adapter, device="cpu"), base=base)
    plain = p_defect(tuned, batch())
    assert_same(p_defect(tuned, batch(), prefixes=PrefixCache(tuned, 4)), plain)
    merged = load_vlm(MllmSettings(model=str(folders[family]), adapter=adapter, device="cpu"))
    merged.model = merged.model.merge_and_unload()
    assert_same(p_defect(merged, batch()), plain)


@pytest.mark.parametrize("vlm", ["qwen2.5-vl", "llava"], indirect=True)
def test_in_bfloat16_alone_and_batched_with_and_without_prefix_stay_close(folders, vlm):
    half = load(folders["llava" if "llava" in vlm.base_id else "qwen2.5-vl"], dtype="bfloat16")
    exact = p_defect(vlm, batch())
    for found in (p_defect(half, batch()), p_defect(half, batch(), prefixes=PrefixCache(half, 4))):
        assert_same_label = [abs(one.p_defect - other.p_defect) for one, other in zip(found, exact, strict=True)]
        assert max(assert_same_label) < 0.05


@pytest.mark.parametrize("vlm", ["smolvlm"], indirect=True)
def test_only_the_last_positions_logits_are_computed(vlm):
    with torch.inference_mode():
        assert forward(vlm, vlm.encoder.encode(batch())).logits.shape[:2] == (4, 1)


# -- ranking


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 120))
def test_the_five_crops_are_the_corners_and_the_centre(height, width, side):
    image = noise(3, height, width)
    shown = query(image=image, original_size=(width, height), anomaly_map=np.ones((3, 4), np.float32))
    question = build_question(shown, Ask.LABEL, MllmSettings(max_side=256, side_multiple=1))
    crops = five_crops(question, side)
    down, across = min(side, height), min(side, width)
    assert [crop.seen for crop in crops] == [(across, down)] * 5
    corners = [image[:down, :across], image[:down, width - across :], image[height - down :, :across]]
    corners += [image[height - down :, width - across :]]
    for crop, wanted in zip(crops, corners, strict=False):
        np.testing.assert_array_equal(crop.part, wanted)
    top, left = (height - down) // 2, (width - across) // 2
    np.testing.assert_array_equal(crops[4].part, image[top : top + down, left : left + across])
    for crop in crops:
        assert crop.content[-2] is crop.part
        assert crop.anomaly_map is not None
        assert crop.anomaly_map.size


def whole_answer(vlm: Vlm, question: Question, answer: str) -> float:
    """The summed log-probability of all tokens of an answer, as SAEC's ranking has it."""
    question = Question(question.ask, question.system, question.content, "", "", question.part, question.seen)
    inputs = vlm.encoder.encode([question], [answer])
    labels = inputs.pop("labels")[0]
    with torch.inference_mode():
        scores = vlm.model(**inputs).logits[0].log_softmax(-1)
    places = (labels != IGNORED).nonzero().flatten()[:-1]  # without the end-of-turn token
    return sum(float(scores[place - 1, labels[place]]) for place in places)


@pytest.mark.parametrize("vlm", ["qwen2.5-vl", "qwen3-vl"], indirect=True)
def test_ranking_is_the_softmax_of_the_whole_answers_mean_log_probabilities_over_the_crops(vlm):
    questions = [asked(0), asked(1)]
    crops = [five_crops(question, 56) for question in questions]
    found = rank(vlm, crops, prefixes=PrefixCache(vlm, 4))
    for decision, views in zip(found, crops, strict=True):
        good, defect = (np.mean([whole_answer(vlm, view, f"Label: {label}") for view in views]) for label in ("0", "1"))
        assert decision.p_defect == pytest.approx(1 / (1 + np.exp(good - defect)), abs=1e-4)
        assert 0 < decision.mass <= 1


# -- evidence


@vlms
def test_evidence_is_generated_greedily_alike_alone_and_in_a_batch(vlm):
    questions = [ask_evidence(question) for question in batch()[:3]]
    together = generate_evidence(vlm, questions, max_tokens=6)
    assert together == [generate_evidence(vlm, [question], max_tokens=6)[0] for question in questions]
    assert all(isinstance(text, str) for text in together)


@pytest.mark.parametrize("vlm", ["qwen2.5-vl"], indirect=True)
def test_what_the_checkpoint_says_about_sampling_does_not_count(vlm, monkeypatch):
    plain = generate_evidence(vlm, [ask_evidence(asked(0))], max_tokens=8)
    own = {"do_sample": True, "repetition_penalty": 1.9, "temperature": 1e-6, "top_k": 1, "top_p": 0.1}
    for name, value in own.items():  # as in Qwen2.5-VL's generation_config.json
        monkeypatch.setattr(vlm.model.generation_config, name, value)
    assert generate_evidence(vlm, [ask_evidence(asked(0))], max_tokens=8) == plain


@pytest.mark.parametrize("vlm", ["llava"], indirect=True)
def test_special_tokens_are_no_part_of_the_evidence(vlm, monkeypatch):
    tokenizer = vlm.encoder.tokenizer
    text = json.dumps({"kind": "surface", "bboxes": [], "desc": "A scratch."})
    answer = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id]

    def generate(input_ids: torch.Tensor, **more: object) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([answer])], dim=1)

    monkeypatch.setattr(vlm.model, "generate", generate)
    assert generate_evidence(vlm, [ask_evidence(asked(0))]) == [text]
