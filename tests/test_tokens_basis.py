"""The tool that fits the tokens' basis: what it makes is the best there is for the projector, and it knows another."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("onnx", reason="the export extra is not installed")

from saec.vlm.tokens.codec import Basis, standardised

TOOL = Path(__file__).parents[1] / "tools" / "build_token_basis.py"
WIDTH, HIDDEN, KEPT = 40, 12, 6


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_token_basis", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "COORDINATES", KEPT)
    monkeypatch.setattr(module, "SHOWN", (2, KEPT))
    return module


def tokens(seed: int, images: int = 30) -> list[np.ndarray]:
    """Tokens that lie near a few directions, as a tower's do; the mixture is the seed's, the projector is not."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(10, WIDTH)) * np.geomspace(3, 0.2, 10)[:, None]
    made = rng.normal(size=(images, 16, 10)) @ mix + rng.normal(size=(images, 16, WIDTH)) * 0.1 + rng.normal(size=WIDTH)
    return [standardised(each.astype(np.float32)) for each in made]


@pytest.fixture
def a() -> np.ndarray:
    rng = np.random.default_rng(9)
    return rng.normal(size=(HIDDEN, WIDTH)) * np.geomspace(1, 0.05, WIDTH)  # most of a token hardly matters to it


def principal(seen: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The tokens' own principal components, which know nothing of the projector."""
    x = np.concatenate(seen)
    rows = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][:KEPT]
    return {"mean": x.mean(axis=0), "down": rows, "up": rows}


def test_the_coordinates_are_uncorrelated_and_lose_less_than_principal_components(tool, a, tmp_path):
    seen = tokens(0)
    found = tool.fitted(*tool.moments(iter(seen)), a)
    save_file(found, tmp_path / "basis.safetensors")
    basis = Basis.load(tmp_path / "basis.safetensors")
    c = np.concatenate([basis.coordinates(each, KEPT) for each in seen])
    shares = np.corrcoef(c.T)
    assert np.abs(shares - np.eye(KEPT)).max() < 0.02
    assert (np.diff(c.var(axis=0)) < 0).all(), "by importance"
    few, all_ = tool.losses(found, seen, a)
    assert all_ < few < 0.5
    for ours, theirs in zip((few, all_), tool.losses(principal(seen), seen, a), strict=True):
        assert ours < 0.8 * theirs


def test_a_basis_of_other_tokens_is_told_from_the_shipped_one(tool, a, tmp_path, monkeypatch, capsys):
    shipped = tool.fitted(*tool.moments(iter(tokens(0))), a)
    save_file(shipped, tmp_path / "basis.safetensors")
    monkeypatch.setattr(tool, "TOKEN_BASIS", tmp_path / "basis.safetensors")
    turned = {**shipped, "down": -shipped["down"], "up": -shipped["up"]}
    assert tool.compared(turned, tokens(0)[:5], a), "a sign means nothing"
    assert f"other signs: {KEPT} of {KEPT} rows" in capsys.readouterr().out
    assert not tool.compared(tool.fitted(*tool.moments(iter(tokens(1))), a), tokens(0)[:5], a)
    assert not tool.compared({**shipped, "up": np.float16(1.3) * shipped["up"]}, tokens(0)[:5], a)
