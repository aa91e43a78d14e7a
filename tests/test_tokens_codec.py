"""Tokens on their way: what goes in comes out, few bytes, and nothing that is no token gets through."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from saec.errors import BadInput
from saec.fleet.frame import BadFrame, Frame, encode_frame
from saec.types import Tokens
from saec.vlm.tokens.codec import KIND, Basis, check_tokens, pack_tokens, quantised, standardised, unpack_tokens

RNG = np.random.default_rng(0)


def tokens_of(count: int = 8, dims: int = 6, total: int = 16, bits: int = 6) -> Tokens:
    levels, scale = quantised(RNG.standard_normal((count, dims)).astype(np.float32), bits)
    return Tokens(levels, scale, np.arange(count, dtype=np.int32), total, "tower:1")


@pytest.fixture
def basis(tmp_path: Path) -> Basis:
    turned, _ = np.linalg.qr(RNG.standard_normal((24, 24)))
    down = turned[:12].astype(np.float16)
    save_file({"mean": np.full(24, 0.1, np.float16), "down": down, "up": down}, tmp_path / "basis.safetensors")
    return Basis.load(tmp_path / "basis.safetensors")


@settings(deadline=None)
@given(count=st.integers(1, 16), dims=st.integers(1, 12), bits=st.integers(3, 8))
def test_tokens_arrive_as_they_were_sent(count: int, dims: int, bits: int):
    sent = tokens_of(count, dims, bits=bits)
    found = unpack_tokens(pack_tokens(sent))
    np.testing.assert_array_equal(found.levels, sent.levels)
    np.testing.assert_array_equal(found.indices, sent.indices)
    assert (found.scale, found.total, found.model_id) == (sent.scale, sent.total, sent.model_id)
    assert found.indices.dtype == np.int32 and np.abs(found.levels).max() <= 2 ** (bits - 1) - 1


def test_no_coordinate_is_more_than_half_a_step_off():
    values = RNG.standard_normal((5, 7)).astype(np.float32)
    for bits in (3, 6, 8):
        levels, scale = quantised(values, bits)
        assert np.abs(levels * scale - values).max() <= scale / 2 * 1.001


def test_tokens_of_nothing_are_levels_of_nothing():
    levels, scale = quantised(np.zeros((2, 3), np.float32), 8)
    assert not levels.any() and scale > 0


def test_bytes_fall_with_the_number_of_tokens():
    sizes = [len(pack_tokens(tokens_of(count, 64, 64))) for count in (64, 32, 16, 8)]
    empty = 300  # frame and header
    for more, less in pairwise(sizes):
        assert 0.4 < (less - empty) / (more - empty) < 0.6


def test_a_basis_gives_back_what_lies_in_it_and_the_mean_token_where_none_was_sent(basis: Basis):
    coordinates = RNG.standard_normal((4, 12)).astype(np.float32)
    levels, scale = quantised(coordinates, 8)
    found = basis.expand(Tokens(levels, scale, np.array([0, 2, 5, 9], np.int32), 16, "tower:1"))
    assert found.shape == (16, 24)
    np.testing.assert_allclose((found[[0, 2, 5, 9]] - basis.mean) @ basis.down.T, levels * scale, atol=0.02)
    np.testing.assert_allclose(np.delete(found, [0, 2, 5, 9], axis=0), np.tile(basis.mean, (12, 1)))


def test_fewer_coordinates_are_the_first_ones(basis: Basis):
    tokens = RNG.standard_normal((3, 24)).astype(np.float32)
    np.testing.assert_array_equal(basis.coordinates(tokens, 12)[:, :5], basis.coordinates(tokens, 5))


def test_a_token_s_length_and_offset_do_not_go_up(basis: Basis):
    tokens = RNG.standard_normal((3, 24)).astype(np.float32)
    np.testing.assert_allclose(basis.coordinates(7 * tokens + 3, 12), basis.coordinates(tokens, 12), atol=1e-4)
    plain = standardised(tokens)
    np.testing.assert_allclose(plain.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(plain.std(axis=1), 1, atol=1e-4)


def test_more_coordinates_than_the_basis_has_are_refused(basis: Basis):
    with pytest.raises(BadInput, match="13 coordinates"):
        basis.expand(tokens_of(2, 13))


@pytest.mark.parametrize(
    "wrong",
    [
        {"indices": np.array([0, 0, 1, 2, 3, 4, 5, 6], np.int32)},
        {"indices": np.array([1, 0, 2, 3, 4, 5, 6, 7], np.int32)},
        {"indices": np.arange(9, 17, dtype=np.int32)},
        {"indices": np.arange(-1, 7, dtype=np.int32)},
        {"indices": np.arange(7, dtype=np.int32)},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"scale": 0.0},
        {"scale": "1"},
        {"total": 0},
        {"total": True},
        {"total": 10**9},
        {"model_id": 3},
        {"levels": np.zeros((8, 6), np.int16)},
        {"levels": np.zeros((8, 0), np.int8)},
        {"levels": np.zeros(8, np.int8)},
    ],
)
def test_what_breaks_the_contract_is_refused(wrong: dict[str, object]):
    with pytest.raises(ValueError, match="its "):
        check_tokens(replace(tokens_of(), **wrong))


@pytest.mark.parametrize("lacking", ["levels", "indices", "scale", "total", "model"])
def test_a_frame_without_one_of_its_parts_is_refused(lacking: str):
    header = {"model": "m", "total": 4, "scale": 1.0}
    arrays = {"levels": np.zeros((2, 3), np.int8), "indices": np.array([0, 1, 2], np.uint16)}
    whole = encode_frame(Frame(KIND, header, arrays))
    unpack_tokens(whole)
    header.pop(lacking, None)
    arrays.pop(lacking, None)
    with pytest.raises(BadFrame, match="not tokens"):
        unpack_tokens(encode_frame(Frame(KIND, header, arrays)))


def test_indices_that_are_no_whole_numbers_are_refused():
    header = {"model": "m", "total": 4, "scale": 1.0}
    arrays = {"levels": np.zeros((2, 3), np.int8), "indices": np.array([0.5, 1.5, 2.5])}
    with pytest.raises(BadFrame, match="its indices"):
        unpack_tokens(encode_frame(Frame(KIND, header, arrays)))


def test_cut_changed_and_foreign_frames_are_refused():
    data = pack_tokens(tokens_of())
    for wrong in (data[:-1], data[:40], b"", data[:-3] + b"abc", encode_frame(Frame("other")), json.dumps({}).encode()):
        with pytest.raises(BadFrame):
            unpack_tokens(wrong)


def test_a_damaged_basis_is_refused(tmp_path: Path):
    file = tmp_path / "basis.safetensors"
    with pytest.raises(BadInput, match="not a basis"):
        Basis.load(file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(BadInput, match="not a basis"):
        Basis.load(file)
    save_file({"mean": np.zeros(3), "down": np.zeros((2, 3)), "up": np.zeros((2, 4))}, file)
    with pytest.raises(BadInput, match="shapes differ"):
        Basis.load(file)
