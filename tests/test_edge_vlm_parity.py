"""Exported models against the torch models they come from: tiny ones of the real classes, and Loupe itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from saec.config import MllmSettings, PromptSettings
from saec.errors import BadInput
from saec.types import Query
from saec.vlm.prompt import Ask, Question, ask_evidence, build_question
from saec.vlm.registry import resolve
from saec.vlm.trained import as_trained


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_a_checkpoint_decides_and_explains_as_in_torch(family, tmp_path):
    pytest.importorskip("torch")
    from saec.vlm.decide import generate_evidence, p_defect
    from saec.vlm.edge.vlm import OnnxVlm
    from saec.vlm.export.bundle import export_bundle
    from saec.vlm.load import load_vlm
    from tiny_vlms import save_tiny

    checkpoint = save_tiny(family, tmp_path / family)
    if family == "smolvlm":  # an exported tower sees one square, not tiles
        file = checkpoint / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"do_image_splitting": False}))
    export_bundle(str(checkpoint), tmp_path / "bundle", precision="float32")
    vlm = OnnxVlm.load(tmp_path / "bundle", threads=1)
    torch_model = load_vlm(MllmSettings(model=str(checkpoint), dtype="float32", device="cpu"))
    rng = np.random.default_rng(0)
    for _ in range(2):
        image, reference = (rng.integers(0, 256, (56, 56, 3), np.uint8) for _ in range(2))
        query = Query("p", "cell", image, (56, 56), references=(reference,))
        question = build_question(query, Ask.LABEL, PromptSettings(max_side=56))
        found, seen = vlm.decide(question)
        (wanted,) = p_defect(torch_model, [question])
        assert found.p_defect == pytest.approx(wanted.p_defect, abs=1e-4)
        assert found.mass == pytest.approx(wanted.mass, rel=1e-3)
        (text,) = generate_evidence(torch_model, [ask_evidence(question)], max_tokens=20)
        assert vlm.evidence(question, seen, max_tokens=20) == text


# -- Loupe


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


@pytest.mark.slow
def test_in_float32_it_decides_and_explains_as_the_torch_model(export):
    pytest.importorskip("torch")
    from saec.vlm.decide import generate_evidence, p_defect
    from saec.vlm.edge.vlm import OnnxVlm
    from saec.vlm.load import load_vlm

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


@pytest.mark.slow
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
