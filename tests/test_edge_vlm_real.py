"""Loupe itself, exported: what the torch model says, and a saved picture that answers as the picture does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from saec.config import MllmSettings
from saec.errors import BadInput
from saec.types import Query
from saec.vlm.prompt import Ask, Question, build_question
from saec.vlm.registry import resolve
from saec.vlm.trained import as_trained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Iterator[object]:
    try:
        resolve("loupe")
    except BadInput as error:
        pytest.skip(str(error))
    from saec.vlm.export.bundle import export_bundle

    root = tmp_path_factory.mktemp("bundles")

    def make(precision: str) -> Path:
        folder = root / precision
        if not folder.exists():
            export_bundle("loupe", folder, precision=precision)
        return folder

    return make


def questions() -> list[Question]:
    rng, settings = np.random.default_rng(0), as_trained(MllmSettings())
    made = []
    for number in range(4):
        image = np.clip(rng.normal(120 + 10 * number, 12, (300, 280, 3)), 0, 255).astype(np.uint8)
        image[100:140, 60 : 100 + 20 * number] //= 3
        heatmap = rng.uniform(0.3, 1.8, (10, 9)).astype(np.float32)
        query = Query(str(number), "solar cell", image, (280, 300), anomaly_map=heatmap)
        made.append(build_question(query, Ask.LABEL, settings))
    return made


def test_in_float32_it_decides_and_explains_as_the_torch_model(export):
    pytest.importorskip("torch")
    from saec.vlm.decide import generate_evidence, p_defect
    from saec.vlm.edge.vlm import OnnxVlm
    from saec.vlm.load import load_vlm
    from saec.vlm.prompt import ask_evidence

    asked = questions()
    torch_model = load_vlm(as_trained(MllmSettings(device="cpu")))
    wanted = p_defect(torch_model, asked)
    texts = generate_evidence(torch_model, [ask_evidence(question) for question in asked], max_tokens=48)
    vlm = OnnxVlm.load(export("float32"))
    for question, decision, text in zip(asked, wanted, texts, strict=True):
        found, seen = vlm.decide(question)
        assert found.p_defect == pytest.approx(decision.p_defect, abs=1e-3)
        assert found.mass == pytest.approx(decision.mass, abs=1e-3)
        assert vlm.evidence(question, seen, max_tokens=48) == text


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_a_saved_picture_answers_as_the_picture_does(export, precision, tmp_path):
    from saec.vlm.edge.store import load_start, save_start
    from saec.vlm.edge.vlm import OnnxVlm

    vlm = OnnxVlm.load(export(precision))
    for question in questions():
        image = question.part
        save_start(tmp_path / "picture", vlm.begin(image), vlm.bundle, image)
        start = load_start(tmp_path / "picture", vlm.bundle)
        for text in ("What is wrong, as JSON?", "Describe the part.", "Is there a crack in it?"):
            plain = vlm.stream(image, text, max_tokens=48)
            cached = vlm.stream(None, text, start=start, max_tokens=48)
            assert "".join(cached) == "".join(plain)
            assert cached.reused > 64
