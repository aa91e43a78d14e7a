"""The same tiny model behind an OpenAI-compatible endpoint and in this process: the same P(defect), within 1e-3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from openai_server import EVIDENCE, Engine, parts, save_decided, serving
from saec.cloud.openai import OpenAIBackend
from saec.cloud.transformers import TransformersBackend
from saec.config import MllmSettings, OpenAISettings, Settings
from saec.types import Box, Opinion, Query

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decided("qwen2.5-vl", tmp_path_factory.mktemp("models") / "tiny-qwen")


@contextmanager
def endpoint(engine: Engine, **more: object) -> Iterator[OpenAIBackend]:
    with serving(engine) as url:
        backend = OpenAIBackend(OpenAISettings(**{"base_url": url, "tau": 1.0, "min_label_mass": 0.0, **more}))  # type: ignore[arg-type]
        try:
            backend.warm_up()
            yield backend
        finally:
            backend.close()


def local(folder: Path, asked: Sequence[Query]) -> list[Opinion]:
    settings = MllmSettings(model=str(folder), device="cpu", tau=1.0, min_label_mass=0.0)
    backend = TransformersBackend(Settings(mllm=settings))
    backend.warm_up()
    try:
        return opinions(backend.judge(asked))
    finally:
        backend.close()


def opinions(answers: Sequence[Opinion | Exception]) -> list[Opinion]:
    for answer in answers:
        assert isinstance(answer, Opinion), answer
    return [answer for answer in answers if isinstance(answer, Opinion)]


def differences(ours: Sequence[Opinion], theirs: Sequence[Opinion]) -> np.ndarray:
    pairs = zip(ours, theirs, strict=True)
    return np.array([abs(mine.p_defect - its.p_defect) for mine, its in pairs])


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl", "llava"])
def test_the_endpoints_p_defect_is_that_of_the_same_model_here(family: str, tmp_path: Path) -> None:
    folder = save_decided(family, tmp_path / "tiny")
    ours = local(folder, parts())
    assert np.std([opinion.p_defect for opinion in ours]) > 10 * TOLERANCE, "the model looks at its images"
    engine = Engine(folder)
    with endpoint(engine, concurrency=3) as backend:
        assert backend.model_id == "tiny+p2"
        theirs = opinions(backend.judge(parts()))
    assert differences(ours, theirs).max() <= TOLERANCE
    for mine, its in zip(ours, theirs, strict=True):
        assert its.diagnostics["label_mass"] == pytest.approx(mine.diagnostics["label_mass"], abs=TOLERANCE)
    request = engine.asked[0]
    assert request["messages"][-1] == {"role": "assistant", "content": "Label: "}
    assert (request["add_generation_prompt"], request["continue_final_message"]) == (False, True)


def test_jpeg_moves_p_defect_which_is_why_images_go_as_png(qwen: Path) -> None:
    ours = local(qwen, parts())
    with endpoint(Engine(qwen), image_format="jpeg", jpeg_quality=95) as backend:
        theirs = opinions(backend.judge(parts()))
    assert differences(ours, theirs).max() > 3 * TOLERANCE


def test_evidence_comes_under_a_schema_and_a_truncated_one_is_recorded(qwen: Path) -> None:
    with endpoint(Engine(qwen), tau=0.0) as backend:
        found = opinions(backend.judge(parts(1)))[0].evidence
    assert found.boxes == (Box(4, 4, 40, 30),), EVIDENCE
    with endpoint(Engine(qwen), tau=0.0, evidence_tokens=16) as backend:
        cut = opinions(backend.judge(parts(1)))[0].evidence
    assert (cut.boxes, cut.text) == ((), "no evidence: the answer was cut off")
