"""Width projector: a cloud answers from the tokens of a tower of another width, another grid, another family."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the export extra is not installed")

from cli_run import Result, saec
from edge_parts import put
from saec.config import Settings
from saec.errors import BadInput
from saec.types import Image, Opinion, Query, Tokens
from saec.vlm.tokens.codec import quantised, standardised
from saec.vlm.tokens.tower import TowerTokeniser
from saec.vlm.tokens.width import WidthProjector, fit_width, held_out_r2, regridded
from test_tokens_uplink import MLLM, as_tokens, backend_of
from tiny_tower import TOWER_ID, save_loupe, save_tower

RNG = np.random.default_rng(0)


def tokens_of(coordinates: np.ndarray, model_id: str) -> Tokens:
    levels, scale = quantised(coordinates, 8)
    return Tokens(levels, scale, np.arange(len(levels), dtype=np.int32), len(levels), model_id)


def smooth(seed: int) -> Image:
    """An image in which towers see something alike: a few soft spots on a ramp."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:112, :112] / 112
    grey = rng.random() * x + rng.random() * y
    for _ in range(4):
        grey += rng.normal() * np.exp(-((x - rng.random()) ** 2 + (y - rng.random()) ** 2) / 0.02)
    grey = 255 * (grey - grey.min()) / np.ptp(grey)
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


@pytest.mark.parametrize(("across", "back"), [(6, 20), (20, 6)])
def test_what_is_linear_is_found_whichever_tower_is_the_wider(across: int, back: int):
    weight, bias = RNG.standard_normal((back, across)), RNG.standard_normal(back)
    device = RNG.standard_normal((40, 16, across)).astype(np.float32) + 0.5
    cloud = (device @ weight.T + bias).astype(np.float32)
    made = fit_width(device, cloud, source="a", target="b", ridge=1e-6)
    found = made.expand(tokens_of(device[0], "a"))
    np.testing.assert_allclose(found, cloud[0], atol=0.2)
    np.testing.assert_allclose(made.weight, weight, atol=1e-3)


def test_grids_of_other_sizes_are_laid_over_each_other():
    square = RNG.standard_normal((36, 3)).astype(np.float32)
    fewer = regridded(square, 3)
    np.testing.assert_allclose(fewer.mean(axis=0), square.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(fewer[0], square[[0, 1, 6, 7]].mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(regridded(fewer, 6).reshape(6, 6, 3)[:2, :2], np.tile(fewer[0], (2, 2, 1)))
    uneven = regridded(np.ones((25, 2), np.float32), 8)
    np.testing.assert_allclose(uneven, 1, atol=1e-6)
    with pytest.raises(BadInput, match="square"):
        regridded(np.ones((5, 2), np.float32), 2)


def tower(folder: Path, width: int, seed: int, model_id: str) -> TowerTokeniser:
    save_tower(folder, width=width, seed=seed, model_id=model_id)
    section = {"model": str(folder), "choose": "entropy", "ratio": 1.0, "bits": 8}
    return TowerTokeniser.load(Settings.model_validate({"tokens": section, "edge": {"threads": 1}}))


def explained(made: WidthProjector, sent: list[Tokens], wanted: np.ndarray) -> float:
    """Share of the cloud's tokens' variance that the projector gives back."""
    found = np.stack([made.expand(tokens) for tokens in sent])
    return 1 - float(((found - wanted) ** 2).sum() / ((wanted - wanted.mean(axis=(0, 1))) ** 2).sum())


def test_how_well_it_does_is_told_from_images_that_it_was_not_fitted_to():
    device = RNG.standard_normal((40, 16, 6)).astype(np.float32)
    linear = device @ RNG.standard_normal((6, 9)).astype(np.float32)
    noise = RNG.standard_normal((40, 16, 9)).astype(np.float32)
    assert held_out_r2(device, linear) > 0.99
    assert held_out_r2(device, linear + np.sqrt(linear.var()) * noise) == pytest.approx(0.5, abs=0.1)
    assert held_out_r2(device, noise) < 0.02, "what a fit to few images finds in noise is gone on others"
    assert held_out_r2(device[:4], linear[:4]) is None


def test_the_command_says_how_well_the_projector_does_and_warns(tmp_path: Path):
    save_tower(tmp_path / "device", width=12, seed=3, model_id="device-tower:1")
    save_tower(tmp_path / "cloud", width=8, seed=0, model_id=TOWER_ID)
    for seed in range(35):
        put(tmp_path / "images" / f"{seed}.png", smooth(seed))

    def width(cloud: str, *more: object) -> Result:
        towers = ("--set", f"tokens.model={tmp_path / 'device'}", "--set", f"mllm.model={tmp_path / cloud}")
        return saec("vlm", "width", tmp_path / "images", *towers, "--set", "edge.threads=1", *more)

    good = width("cloud", "--out", tmp_path / "width")
    assert good.code == 0
    assert float(re.search(r"R² .*: (\d\.\d\d)", good.out).group(1)) > 0.3
    assert good.err == ""
    few = width("cloud", "--out", tmp_path / "few", "--limit", "1")
    assert few.code == 0
    assert "unknown, too few images" in few.out and "fewer than 30 images" in few.err
    assert "both towers are the same" in width("device", "--out", tmp_path / "same").err


@pytest.mark.parametrize("out", ["nowhere/w", "."])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_looked_at(tmp_path: Path, out: str):
    said = saec("vlm", "width", tmp_path / "no images", "--out", tmp_path / out).error()
    assert "no file can be written here" in said


def test_a_cloud_answers_tokens_of_a_tower_of_another_width(tmp_path: Path):
    device = tower(tmp_path / "device", 12, 3, "device-tower:1")
    cloud = tower(tmp_path / "cloud", 8, 0, TOWER_ID)
    shown = [smooth(seed) for seed in range(40)]
    x = np.stack([device.basis.coordinates(device.plain(device.see(image)), 64) for image in shown])
    y = np.stack([standardised(cloud.plain(cloud.see(image))) for image in shown])
    made = fit_width(x[:30], y[:30], source=device.model_id, target=cloud.model_id)
    assert explained(made, [device.tokens(image) for image in shown[30:]], y[30:]) > 0.3

    made.save(tmp_path / "width")
    section = {"model": str(save_loupe(tmp_path / "loupe")), **MLLM}
    question = Query("p", "cell", smooth(99), (112, 112), edge_p_defect=0.5)
    sent = replace(question, image=None, tokens=device.tokens(smooth(99)))
    with backend_of(Settings.model_validate({"mllm": section})) as backend:
        (refused,) = backend.judge([sent])
        assert isinstance(refused, BadInput) and "mllm.width" in str(refused)
    with backend_of(Settings.model_validate({"mllm": {**section, "width": str(tmp_path / "width")}})) as backend:
        own = as_tokens(question, Settings.model_validate({"tokens": {"model": str(tmp_path / "cloud"), "ratio": 1.0}}))
        answers = backend.judge([sent, own])
        assert all(isinstance(answer, Opinion) for answer in answers)


def test_tokens_of_another_family_become_the_cloud_s(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from transformers import CLIPVisionConfig, CLIPVisionModel

    cloud = tower(tmp_path / "cloud", 8, 0, TOWER_ID)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=112, patch_size=28, initializer_range=0.3)).eval()
    shown = [smooth(seed) for seed in range(40)]
    pixels = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).float() / 255 - 0.5
    with torch.inference_mode():
        x = clip(pixel_values=pixels).last_hidden_state[:, 1:].numpy()  # 4 x 4 tokens of width 24
    y = np.stack([standardised(cloud.plain(cloud.see(image))) for image in shown])
    made = fit_width(x[:30], y[:30], source="clip", target=TOWER_ID)
    sent = [tokens_of(each, "clip") for each in x[30:]]
    assert made.expand(sent[0]).shape == (64, y.shape[2])
    assert explained(made, sent, y[30:]) > 0.1


def test_a_projector_that_is_damaged_or_leads_elsewhere_is_refused(tmp_path: Path):
    device = RNG.standard_normal((4, 4, 3)).astype(np.float32)
    made = fit_width(device, device, source="a", target="elsewhere")
    made.save(tmp_path / "width")
    same = WidthProjector.load(tmp_path / "width")
    np.testing.assert_array_equal(same.weight, made.weight)
    with pytest.raises(BadInput, match="3 of a"):
        same.expand(tokens_of(device[0], "other"))
    with pytest.raises(BadInput, match="3 of a"):
        same.expand(tokens_of(device[0, :, :2], "a"))
    section = {"model": str(save_loupe(tmp_path / "loupe")), **MLLM, "width": str(tmp_path / "width")}
    with pytest.raises(BadInput, match="leads to elsewhere"), backend_of(Settings.model_validate({"mllm": section})):
        pass
    (tmp_path / "width").write_bytes((tmp_path / "width").read_bytes()[:-1])
    with pytest.raises(BadInput, match="cut off"):
        WidthProjector.load(tmp_path / "width")
    with pytest.raises(BadInput, match="same images"):
        fit_width(device, device[:2], source="a", target="b")
