"""The loss of the distillation: every term once, nothing for a student that equals its teacher, no word about pads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("peft", reason="the train extra is not installed")

import torch

from saec.config import DistillSettings, MllmSettings, PromptSettings
from saec.learn.akd import akd_terms, feature_distance, projections, resampled
from saec.learn.features import Seen, look
from saec.learn.wavelet import wavedec
from saec.types import Query
from saec.vlm.load import Vlm, load_vlm
from saec.vlm.prompt import Ask, Question, build_question
from tiny_loupe import tiny_loupe
from tiny_vlms import FAMILIES, save_tiny
from train_rows import picture

ALL = DistillSettings(weight_features=0.5, weight_language=2.0, weight_logits=3.0)
LABELS = torch.tensor([0.9, 0.2, 1.0])
ONES = torch.ones(3)


def seen(seed: int, *, width: int = 8, tokens: tuple[int, int] = (4, 11)) -> Seen:
    draw = torch.Generator().manual_seed(seed)
    query, language = ([torch.randn(n, width, generator=draw) for _ in range(3)] for n in tokens)
    # All sure of the labels: this seed's teacher is believed everywhere.
    log_p = (torch.randn(3, 3, generator=draw) + torch.tensor([[0, 5, 0], [5, 0, 0], [0, 5, 0]])).log_softmax(1)
    return Seen(query, language, log_p)


def terms(student: Seen, teacher: Seen, settings: DistillSettings = ALL, p: torch.Tensor = LABELS) -> dict[str, float]:
    widths = projections(student.query[0].shape[1], teacher.query[0].shape[1])
    return {name: float(term.detach()) for name, term in akd_terms(student, teacher, p, ONES, widths, settings).items()}


def questions(count: int, prompt: PromptSettings) -> list[Question]:
    """Parts of products with names of different lengths, so that a batch of them is padded."""
    images = [picture(number, defect=number % 2 == 1) for number in range(count)]
    names = ["cell", "a much longer product name", "nut"]
    queries = [Query(f"p{i}", names[i % 3], image, (56, 56)) for i, image in enumerate(images)]
    maps = [np.full((8, 8), 0.5 + i, dtype=np.float32) for i in range(count)]
    return [build_question(replace(q, anomaly_map=m), Ask.LABEL, prompt) for q, m in zip(queries, maps, strict=True)]


@pytest.fixture(scope="module", params=["loupe", *FAMILIES])
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    if request.param == "loupe":
        return tiny_loupe()
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param) / "tiny")
    return load_vlm(MllmSettings(model=str(folder), dtype="float32"))


# -- the terms


def test_a_student_that_equals_its_teacher_has_exactly_nothing_to_distil():
    found = terms(seen(1), seen(1))
    assert found["answer"] > 0
    assert (found["query"], found["language"], found["logits"]) == (0.0, 0.0, 0.0)


def test_every_term_is_the_one_of_the_formula_and_counted_once():
    own, aim = seen(1), seen(2)
    found = terms(own, aim)
    assert set(found) == {"answer", "query", "language", "logits"}

    def distance(h: torch.Tensor, t: torch.Tensor) -> float:
        unit = t.square().mean().sqrt()
        bands = zip(wavedec(h / unit)[1:], wavedec(t / unit)[1:], strict=True)
        return float(((h - t) / unit).square().mean() + sum((a - b).abs().mean() for a, b in bands))

    p, log_p = own.log_p.exp(), own.log_p
    answer = -sum(float(y * log_p[i, 1] + (1 - y) * log_p[i, 0]) for i, y in enumerate(LABELS))
    divergence = (aim.log_p.exp() * (aim.log_p.exp() / p).log()).sum()
    assert found["answer"] == pytest.approx(answer, rel=1e-5)
    assert found["query"] == pytest.approx(0.5 * sum(map(distance, own.query, aim.query)), rel=1e-5)
    assert found["language"] == pytest.approx(2 * sum(map(distance, own.language, aim.language)), rel=1e-5)
    assert found["logits"] == pytest.approx(3 * float(divergence), rel=1e-5)


@pytest.mark.parametrize("name", ["features", "language", "logits"])
def test_a_weight_of_zero_switches_its_term_off_and_no_other(name: str):
    whole, without = terms(seen(1), seen(2)), terms(seen(1), seen(2), ALL.model_copy(update={f"weight_{name}": 0.0}))
    gone = {"features": "query"}.get(name, name)
    assert without == {key: value for key, value in whole.items() if key != gone}


def test_where_a_person_knew_better_the_teacher_teaches_no_answer():
    wrong = torch.tensor([0.0, 0.2, 1.0])  # the teacher is sure that the first one is a defect
    right, corrected = terms(seen(1), seen(2)), terms(seen(1), seen(2), p=wrong)
    assert corrected["query"] == right["query"]
    assert corrected["language"] < right["language"]
    assert corrected["logits"] < right["logits"]
    assert terms(seen(1), seen(2), p=1 - LABELS)["language"] == 0.0


def test_a_label_counts_as_much_as_its_weight_says_and_what_the_teacher_sees_counts_whatever_it_is():
    widths = projections(8, 8)
    weights = ([1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0])
    found = [akd_terms(seen(1), seen(2), LABELS, torch.tensor(weight), widths, ALL) for weight in weights]
    whole, some, rest = ({name: float(term.detach()) for name, term in terms.items()} for terms in found)
    assert whole["answer"] == pytest.approx(some["answer"] + rest["answer"], rel=1e-6)
    for name in ("query", "language", "logits"):
        assert whole[name] == some[name] == rest[name] > 0


def test_other_widths_and_other_numbers_of_tokens_are_brought_together():
    own = seen(1)
    own.query[0].requires_grad_()
    widths = projections(8, 12)
    found = akd_terms(own, seen(2, width=12, tokens=(9, 30)), LABELS, ONES, widths, ALL)
    sum(found.values()).backward()
    assert float(own.query[0].grad.abs().min()) > 0
    assert all(float(weight.grad.abs().sum()) > 0 for weight in widths.parameters())


def test_grids_are_resampled_over_the_grid_and_ends_stay_on_ends():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    fine = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    coarse = resampled(fine, 16, grid=True).reshape(4, 4, 2)
    assert torch.allclose(coarse[1:3, 1:3, 0], torch.tensor([[2.5, 2.5], [4.5, 4.5]]))
    assert torch.allclose(coarse[..., 1], coarse[..., 0].T)
    words = torch.arange(7.0)[:, None]
    assert resampled(words, 13, grid=False)[:, 0].tolist() == pytest.approx([i / 2 for i in range(13)])
    assert resampled(words, 7, grid=False) is words


def test_the_distance_does_not_depend_on_the_scale_of_a_models_features():
    own, aim = seen(1).query[0], seen(2).query[0]
    assert float(feature_distance(1000 * own, 1000 * aim)) == pytest.approx(float(feature_distance(own, aim)), rel=1e-5)


# -- what is read from real models


def test_what_is_read_is_what_the_model_answers_from_and_pads_are_no_part_of_it(vlm: Vlm):
    prompt = PromptSettings(max_side=56, side_multiple=28)
    rows = [vlm.encoder.prepare(question) for question in questions(3, prompt)]
    with torch.no_grad():
        together = look(vlm, vlm.encoder.collate(rows))
        head = vlm.model.get_output_embeddings() or vlm.model.language_model.lm_head
        for at, row in enumerate(rows):
            alone = look(vlm, vlm.encoder.collate([row]))
            assert len(together.language[at]) == len(row.ids)
            for mine, own in ((together.query[at], alone.query[0]), (together.language[at], alone.language[0])):
                assert torch.allclose(mine, own, atol=2e-4)
            logits = head(alone.language[0][-1]).log_softmax(0)
            assert torch.allclose(logits[list(vlm.encoder.label_tokens)], together.log_p[at, :2], atol=1e-3)
            assert float(together.log_p[at].exp().sum()) == pytest.approx(1, rel=1e-5)
    assert len({len(row.ids) for row in rows}) > 1, "the batch was padded"


def test_the_visual_tokens_are_those_of_the_parts_own_image(vlm: Vlm):
    asked = questions(2, PromptSettings(max_side=56, side_multiple=28))
    rows = [vlm.encoder.prepare(question) for question in asked]
    other = [vlm.encoder.prepare(replace(q, content=_elsewhere(q))) for q in asked]
    with torch.no_grad():
        before, after = look(vlm, vlm.encoder.collate(rows)), look(vlm, vlm.encoder.collate(other))
    assert len(before.query[0]) == (16 if "Llava" in type(vlm.model).__name__ else 4)
    for mine, same in zip(before.query, after.query, strict=True):
        assert torch.allclose(mine, same, atol=1e-5), "the close-up is no part of them"


def _elsewhere(question: Question) -> tuple[object, ...]:
    """Return the question's content with all images but the last one blackened."""
    last = max(at for at, item in enumerate(question.content) if not isinstance(item, str))
    return tuple(
        item if isinstance(item, str) or at == last else np.zeros_like(item) for at, item in enumerate(question.content)
    )
