"""The token uplink: no image leaves the line, the cloud answers from tokens, and who cannot says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the export extra is not installed")

from cloud_fakes import FakeBackend, query
from saec.cloud import wire
from saec.cloud.client import HttpCloudClient
from saec.cloud.embedded import EmbeddedClient
from saec.cloud.expert import ExpertBackend
from saec.cloud.onnx_vlm import OnnxVlmBackend
from saec.cloud.tokens import TokenClient
from saec.config import Settings
from saec.errors import BadInput
from saec.types import CloudError, Image, Opinion, Query, Reason, Tokens
from saec.vlm.tokens.tower import TowerTokeniser
from tiny_bundle import save_bundle
from tiny_tower import TOWER_ID, save_loupe, save_tower

MLLM = {"max_side": 224, "min_label_mass": 0, "tau": 1.0, "threads": 1}  # a random model: evidence is not asked for


class FakeTokeniser:
    """Makes the same tokens of every image, or fails."""

    model_id = TOWER_ID

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def tokens(self, image: Image) -> Tokens:
        if self.error is not None:
            raise self.error
        return Tokens(np.ones((2, 3), np.int8), 0.5, np.array([1, 4], np.int32), 64, self.model_id)


def asked(number: int = 0) -> Query:
    rng = np.random.default_rng(number)
    image = rng.integers(0, 256, (120, 90, 3), np.uint8)
    heatmap = np.exp(rng.normal(-0.35, 0.2, (10, 8))).astype(np.float32)
    return query(f"p{number}", image=image, original_size=(90, 120), anomaly_map=heatmap)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_tower(root / "tower")
    save_loupe(root / "loupe")
    save_bundle(root / "other", cache=1023)
    return root


def settings_of(folders: Path, model: str = "loupe", **tokens: object) -> Settings:
    section = {"model": str(folders / "tower"), "passes": 2, "ratio": 1.0, "bits": 8, **tokens}
    return Settings.model_validate({"tokens": section, "mllm": {"model": str(folders / model), **MLLM}})


@contextmanager
def backend_of(settings: Settings) -> Iterator[OnnxVlmBackend]:
    backend = OnnxVlmBackend(settings)
    backend.warm_up()
    try:
        yield backend
    finally:
        backend.close()


def as_tokens(question: Query, settings: Settings) -> Query:
    assert question.image is not None
    tokens = TowerTokeniser.load(settings).tokens(question.image)
    return replace(question, image=None, tokens=tokens)


# -- what goes up


def test_neither_the_part_s_image_nor_a_reference_goes_up():
    backend = FakeBackend()
    inner = EmbeddedClient(backend)
    client = TokenClient(inner, FakeTokeniser())
    question = replace(asked(), references=(asked(1).image,))
    opinion = client.judge(question, deadline_s=5)
    client.close()
    (seen,) = backend.seen
    assert seen.image is None and seen.references == () and seen.region is None and seen.tokens.total == 64
    np.testing.assert_array_equal(seen.anomaly_map, question.anomaly_map)
    assert opinion.timing_ms["tokens"] >= 0 and client.model_id == opinion.model_id


def test_a_part_of_which_no_tokens_can_be_made_is_refused_and_the_edge_s_verdict_stands():
    client = TokenClient(EmbeddedClient(FakeBackend()), FakeTokeniser(RuntimeError("no memory")))
    with pytest.raises(CloudError, match="no memory") as error:
        client.judge(asked(), deadline_s=5)
    client.close()
    assert error.value.reason is Reason.CLOUD_REFUSED


def test_tokens_arrive_over_the_wire_as_they_were_sent(folders: Path):
    sent = as_tokens(asked(), settings_of(folders))
    body = wire.encode_question(sent, [], max_side=1024, jpeg_quality=92)
    found = wire.parse_question(body).decode({}, max_pixels=10**6)
    assert found.image is None and found.original_size == (90, 120)
    np.testing.assert_array_equal(found.tokens.levels, sent.tokens.levels)
    assert found.tokens.model_id == TOWER_ID


def test_a_question_with_both_or_neither_and_damaged_tokens_are_refused(folders: Path):
    from test_cloud_wire import with_header

    body = wire.encode_question(as_tokens(asked(), settings_of(folders)), [], max_side=1024, jpeg_quality=92)
    blob = json.loads(body[9 : 9 + int.from_bytes(body[5:9], "big")])["tokens"]
    with pytest.raises(wire.WireError, match="one of them"):
        wire.parse_question(with_header(body, image=blob))
    with pytest.raises(wire.WireError, match="one of them"):
        wire.parse_question(with_header(body, tokens=None))
    with pytest.raises(wire.WireError, match="the image"):  # a frame is no picture
        wire.parse_question(with_header(body, tokens=None, image=blob)).decode({}, max_pixels=10**6)
    picture = wire.encode_question(asked(), [], max_side=1024, jpeg_quality=92)
    named = json.loads(picture[9 : 9 + int.from_bytes(picture[5:9], "big")])["image"]
    with pytest.raises(wire.WireError, match="the tokens: not a frame"):
        wire.parse_question(with_header(picture, image=None, tokens=named)).decode({}, max_pixels=10**6)


# -- who answers


def test_all_tokens_give_the_answer_that_the_image_gives(folders: Path):
    settings = settings_of(folders)
    with backend_of(settings) as backend:
        for number in range(3):
            question = asked(number)
            image, tokens = backend.judge([question, as_tokens(question, settings)])
            assert isinstance(image, Opinion) and isinstance(tokens, Opinion)
            assert tokens.p_defect == pytest.approx(image.p_defect, abs=0.02)
            assert tokens.model_id == f"{image.model_id}+tokens"


def test_fewer_tokens_leave_an_answer_and_the_map_still_counts(folders: Path):
    settings = settings_of(folders, ratio=0.25, dims=8, bits=6)
    with backend_of(settings) as backend:
        few = as_tokens(asked(), settings)
        hot = replace(few, anomaly_map=few.anomaly_map * 4)
        answers = backend.judge([few, hot])
        assert all(isinstance(each, Opinion) for each in answers)
        assert answers[0].p_defect != answers[1].p_defect


def test_tokens_of_another_tower_fail_alone_with_a_clear_message(folders: Path):
    settings = settings_of(folders)
    right = as_tokens(asked(), settings)
    foreign = replace(right, tokens=replace(right.tokens, model_id="other-tower:2"))
    with backend_of(settings) as backend:
        wrong, good = backend.judge([foreign, right])
    assert isinstance(wrong, BadInput) and "other-tower:2" in str(wrong) and TOWER_ID in str(wrong)
    assert isinstance(good, Opinion)


def backends(folders: Path) -> Sequence[object]:
    other = OnnxVlmBackend(settings_of(folders, "other"))
    other.warm_up()
    return [other, ExpertBackend({"cell": object()}, "expert@1")]  # type: ignore[dict-item]


def test_a_model_that_needs_pixels_refuses_that_part_only(folders: Path):
    question = as_tokens(asked(), settings_of(folders))
    for backend in backends(folders):
        (answer,) = backend.judge([question])
        assert isinstance(answer, BadInput) and "tokens" in str(answer)


# -- two processes


def test_a_service_answers_tokens_and_refuses_strangers_with_a_reason(folders: Path, tmp_path: Path):
    ready = tmp_path / "ready.json"
    command = [sys.executable, "-m", "saec", "cloud", "serve", "--backend", "onnx-vlm", "--port", "0"]
    command += ["--model", str(folders / "loupe"), "--ready-file", str(ready)]
    for name, value in MLLM.items():
        command += ["--set", f"mllm.{name}={value}"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    try:
        give_up = time.monotonic() + 60
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < give_up, "the service did not start"
            time.sleep(0.05)
        settings = settings_of(folders, ratio=0.5)
        http = HttpCloudClient(json.loads(ready.read_text())["url"], settings.cloud)
        client = TokenClient(http, TowerTokeniser.load(settings))
        opinion = client.judge(asked(), deadline_s=30)
        assert opinion.model_id == "tiny-loupe@float32+p2+tokens" == client.model_id
        with backend_of(settings) as backend:
            (here,) = backend.judge([as_tokens(asked(), settings)])
        assert isinstance(here, Opinion) and opinion.p_defect == pytest.approx(here.p_defect, abs=0.02)
        assert 0 < opinion.uplink_bytes < 5_000
        stranger = TokenClient(http, FakeTokeniser())
        stranger._tokeniser.model_id = "other-tower:2"
        with pytest.raises(CloudError, match=r"status 422.*other-tower:2"):
            stranger.judge(asked(), deadline_s=30)
        client.close()
    finally:
        process.kill()
        process.communicate()
