"""The onnx runtime of the multimodal LLM behind the protocol of every backend, on a tiny random bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from cloud_fakes import query
from saec.cloud.embedded import EmbeddedClient
from saec.cloud.onnx_vlm import OnnxVlmBackend
from saec.config import Settings
from saec.errors import BadInput
from saec.types import Box, CloudError, Opinion, Query, Reason
from saec.vlm.edge.graphs import Graphs
from saec.vlm.edge.vlm import OnnxVlm
from saec.vlm.looks import decisions, five_crops, mirrored
from saec.vlm.prompt import Ask, build_question
from tiny_bundle import save_bundle

EVIDENCE = {"kind": "surface", "bboxes": [[14, 28, 28, 56]], "desc": "A scratch near the left edge."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("bundle") / "tiny", cache=1023)


def settings_of(folder: Path, **mllm: object) -> Settings:
    # A random model puts next to no probability on the labels, and knows no JSON.
    section = {"model": str(folder), "max_side": 112, "min_label_mass": 0, "tau": 1.0, "threads": 1, **mllm}
    return Settings.model_validate({"mllm": section})


@contextmanager
def backend_of(folder: Path, **mllm: object) -> Iterator[OnnxVlmBackend]:
    backend = OnnxVlmBackend(settings_of(folder, **mllm))
    backend.warm_up()
    try:
        yield backend
    finally:
        backend.close()


def part(number: int, **more: object) -> Query:
    rng = np.random.default_rng(number)
    image = rng.integers(0, 256, (112, 112, 3), np.uint8)
    return query(f"p{number}", **{"image": image, "original_size": (112, 112), **more})


def says(monkeypatch: pytest.MonkeyPatch, text: str | Exception) -> None:
    def evidence(self: OnnxVlm, question: object, seen: object = None, **how: object) -> str:
        if isinstance(text, Exception):
            raise text
        return text

    monkeypatch.setattr(OnnxVlm, "evidence", evidence)


def test_a_batch_gets_the_models_decisions_and_each_opinion_says_whose_it_is(folder):
    queries = [part(number) for number in range(3)]
    with backend_of(folder) as backend:
        found = backend.judge(queries)
        again = backend.judge(queries[::-1])[::-1]
        settings = backend._settings
    vlm = OnnxVlm.load(folder, threads=1)
    for one, answer, repeated in zip(queries, found, again, strict=True):
        decision, _ = vlm.decide(build_question(one, Ask.LABEL, settings))
        assert isinstance(answer, Opinion)
        assert answer.p_defect == repeated.p_defect == decision.p_defect
        assert answer.diagnostics["label_mass"] == decision.mass
        assert answer.model_id == answer.evidence.source == "tiny-0@float32+p2"
        assert set(answer.timing_ms) == {"prepare", "label"}


@pytest.mark.parametrize(
    ("how", "suffix"), [({"mirrors": 2}, "+mirrors2"), ({"ranking": True, "crop_side": 56}, "+rank")]
)
def test_several_looks_are_averaged_and_the_model_id_says_so(folder, how, suffix):
    with backend_of(folder, **how) as backend:
        (found,) = backend.judge([part(0)])
        settings = backend._settings
    vlm = OnnxVlm.load(folder, threads=1)
    question = build_question(part(0), Ask.LABEL, settings)
    looks = five_crops(question, 56) if settings.ranking else mirrored(question, 2)
    (wanted,) = decisions(np.stack([vlm.look(look)[0] for look in looks])[:, None])
    assert found.p_defect == wanted.p_defect != vlm.decide(question)[0].p_defect
    assert found.model_id == f"tiny-0@float32+p2{suffix}"


@pytest.mark.parametrize("how", [{}, {"mirrors": 4}, {"ranking": True, "crop_side": 56}])
def test_a_defect_is_asked_for_evidence_in_pixels_of_the_original(folder, monkeypatch, how):
    says(monkeypatch, json.dumps(EVIDENCE))
    shown = part(0, original_size=(1000, 800), region=Box(100, 200, 324, 424))
    with backend_of(folder, tau=0.0, **how) as backend:
        (found,) = backend.judge([shown])
        (quiet,) = backend.judge([part(0, evidence=False)])
    assert found.evidence.boxes == (Box(128, 256, 156, 312),)
    assert found.evidence.kind == "surface"
    assert set(found.timing_ms) == {"prepare", "label", "evidence"}
    assert quiet.evidence.kind is None
    assert "evidence" not in quiet.timing_ms


def test_evidence_is_asked_about_the_part_that_was_seen_and_computed_once(folder, monkeypatch):
    looked = []
    real = Graphs.see
    monkeypatch.setattr(Graphs, "see", lambda self, feeds: looked.append(1) or real(self, feeds))
    with backend_of(folder, tau=0.0, evidence_tokens=16, mirrors=2) as backend:
        looked.clear()
        (found,) = backend.judge([part(0)])
    assert len(looked) == 2  # one look a view, none for the evidence
    assert "no evidence: not the asked JSON" in found.evidence.text


@pytest.mark.parametrize("wrong", ["The part is scratched.", RuntimeError("out of memory")])
def test_without_usable_evidence_the_verdict_stands_and_the_record_says_why(folder, monkeypatch, wrong):
    with backend_of(folder) as backend:
        (plain,) = backend.judge([part(0)])
    says(monkeypatch, wrong)
    with backend_of(folder, tau=0.0) as backend:
        (found,) = backend.judge([part(0)])
    assert found.p_defect == plain.p_defect
    assert found.evidence.text.startswith("no evidence: ")


def test_a_part_whose_image_cannot_be_used_fails_alone(folder):
    odd = part(1, image=np.zeros((0, 0, 3), np.uint8))
    with backend_of(folder) as backend:
        first, failed, last = backend.judge([part(0), odd, part(2)])
    assert isinstance(failed, Exception)
    assert isinstance(first, Opinion)
    assert isinstance(last, Opinion)


def test_without_probability_on_the_labels_there_is_no_opinion(folder):
    with backend_of(folder, min_label_mass=0.9) as backend:
        (answer,) = backend.judge([part(0)])
    assert isinstance(answer, CloudError)
    assert answer.reason is Reason.CLOUD_BAD_ANSWER


def test_it_serves_as_an_embedded_cloud(folder):
    client = EmbeddedClient(OnnxVlmBackend(settings_of(folder)))
    try:
        assert client.model_id == "tiny-0@float32+p2"
        assert 0 <= client.judge(part(0), deadline_s=30).p_defect <= 1
    finally:
        client.close()


def test_a_damaged_bundle_is_refused_in_one_line(folder, tmp_path):
    broken = save_bundle(tmp_path / "broken", cache=1023)
    data = bytearray((broken / "decoder.bin").read_bytes())
    data[0] ^= 1
    (broken / "decoder.bin").write_bytes(bytes(data))
    with pytest.raises(BadInput, match="damaged") as caught:
        OnnxVlmBackend(settings_of(broken)).warm_up()
    assert "\n" not in str(caught.value)


def test_nobody_is_judged_before_the_model_is_loaded(folder):
    with pytest.raises(RuntimeError, match="warm_up"):
        OnnxVlmBackend(settings_of(folder)).judge([part(0)])


ALONE = """
import sys

HEAVY = ("torch", "torchvision", "transformers", "peft", "accelerate", "onnx", "gguf")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Absent())

from saec.cloud.backend import probe
from saec.cloud.onnx_vlm import OnnxVlmBackend
from saec.config import Settings

mllm = {"model": sys.argv[1], "min_label_mass": 0, "tau": 0, "evidence_tokens": 16, "threads": 1, "max_side": 56}
backend = OnnxVlmBackend(Settings.model_validate({"mllm": mllm}))
backend.warm_up()
(opinion,) = backend.judge([probe()])
assert not set(HEAVY) & set(sys.modules)
print(opinion.model_id)
"""


def test_an_exported_model_judges_where_no_training_or_exporting_package_is_installed(folder):
    command = [sys.executable, "-W", "error", "-c", ALONE, str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "tiny-0@float32+p2"
