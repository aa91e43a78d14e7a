"""A tower in two halves: without dropout it is the model's own, with it every image is judged by itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

pytest.importorskip("onnx", reason="the export extra is not installed")

from saec.config import Settings
from saec.errors import BadInput
from saec.types import Image
from saec.vlm.contract.bundle import PROJECTOR, UPPER, VISION
from saec.vlm.edge.pixels import pixel_values
from saec.vlm.export.ready import ready_tower
from saec.vlm.loupe.inputs import LOUPE
from saec.vlm.tokens.codec import standardised
from saec.vlm.tokens.tower import TowerTokeniser
from tiny_tower import save_loupe, save_tower


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tower(tmp_path_factory.mktemp("tower") / "tiny")


def tokeniser(tower: Path, **tokens: object) -> TowerTokeniser:
    section = {"model": str(tower), "passes": 4, **tokens}
    return TowerTokeniser.load(Settings.model_validate({"tokens": section, "edge": {"threads": 1}}))


def image(seed: int, size: int = 80) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def test_the_two_halves_and_the_projector_are_the_whole_vision_graph(tower: Path, tmp_path: Path):
    bundle, made = save_loupe(tmp_path / "bundle"), tokeniser(tower)
    pixels = pixel_values(image(1), LOUPE.preprocess)
    anomaly_map = np.exp(np.random.default_rng(2).normal(-0.35, 0.2, (1, 16, 16))).astype(np.float32)
    whole = onnxruntime.InferenceSession(str(bundle / VISION))
    projector = onnxruntime.InferenceSession(str(bundle / PROJECTOR))
    (wanted,) = whole.run(None, {"pixel_values": pixels, "anomaly_map": anomaly_map})
    tokens = made.plain(made.see(image(1)))
    (found,) = projector.run(None, {"tokens": standardised(tokens)[None], "anomaly_map": anomaly_map})
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_no_dropout_changes_nothing_and_leaves_no_uncertainty(tower: Path):
    made = tokeniser(tower, dropout=0.0)
    sight = made.see(image(1))
    for tokens in made.passes(sight):
        np.testing.assert_array_equal(tokens, made.plain(sight))
    assert not made.uncertainty(sight).any()


def test_dropout_reaches_all_tokens_and_more_of_it_leaves_more_unsure(tower: Path):
    made = [tokeniser(tower, passes=10, dropout=p) for p in (0.1, 0.5)]
    some, more = (each.uncertainty(each.see(image(1))) for each in made)
    assert some.shape == (64,) and (some > 0).all() and (more < 1).all()
    assert more.mean() > 2 * some.mean()


@pytest.mark.parametrize("choose", ["dropout", "entropy"])
def test_an_image_s_tokens_are_the_same_whatever_else_is_under_way(tower: Path, choose: str):
    made = tokeniser(tower, choose=choose, ratio=0.25)
    alone = [made.tokens(image(seed)) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda seed: made.tokens(image(seed)), reversed(range(6))))[::-1]
    again = [tokeniser(tower, choose=choose, ratio=0.25).tokens(image(0))]
    for one, other in zip([*alone, alone[0]], [*together, *again], strict=True):
        np.testing.assert_array_equal(one.indices, other.indices)
        np.testing.assert_array_equal(one.levels, other.levels)
        assert one.scale == other.scale


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 64), (0.5, 32), (0.13, 9), (0.001, 1)])
def test_as_many_tokens_go_up_as_asked_for_in_as_many_coordinates(tower: Path, ratio: float, count: int):
    found = tokeniser(tower, ratio=ratio, dims=5, bits=4, choose="entropy").tokens(image(3))
    assert found.levels.shape == (count, 5) and found.levels.dtype == np.int8 and np.abs(found.levels).max() == 7
    assert found.total == 64 and found.model_id == "tiny-tower:1"


def test_where_all_tokens_go_up_none_is_chosen(tower: Path, monkeypatch: pytest.MonkeyPatch):
    made = tokeniser(tower, ratio=1.0)
    monkeypatch.setattr(made, "uncertainty", lambda sight: pytest.fail("chosen all the same"))
    assert made.tokens(image(3)).indices.tolist() == list(range(64))


def test_a_damaged_tower_is_refused(tower: Path, tmp_path: Path):
    broken = save_tower(tmp_path / "broken")
    (broken / UPPER).write_bytes(b"x")
    with pytest.raises(BadInput, match="damaged"):
        tokeniser(broken)


def test_a_model_whose_tower_is_not_taken_apart_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("peft", reason="the cloud extra is not installed")
    from tiny_vlms import save_tiny

    monkeypatch.setenv("SAEC_MODELS", str(tmp_path / "cache"))
    save_tiny("smolvlm", tmp_path / "smolvlm")
    with pytest.raises(BadInput, match="gives no tokens"):
        ready_tower(str(tmp_path / "smolvlm"))
