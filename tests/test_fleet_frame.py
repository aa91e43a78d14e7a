"""Frames carry what was put in, the same bytes everywhere; whatever else arrives is refused with one clear error."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from saec.fleet import frame as frame_module
from saec.fleet.frame import BadFrame, Frame, decode_frame, encode_frame, frame_id

HEAD = struct.Struct(">4sBQ32s")
MOST = 1_000_000
SAMPLE = Frame("sample", {"part_id": "a/1", "p": 0.25, "human": None}, {"map": np.arange(12, dtype=np.uint8)})
DTYPES = ["<f4", "<f8", "<f2", ">f4", "<i8", "<u2", "|u1", "|i1", "|b1", "<c8"]

names = st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: stn.arrays(np.dtype(dtype), stn.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)


def decode(data: bytes, most: int = MOST) -> Frame:
    return decode_frame(data, kinds=("sample",), most=most)


def framed(body: bytes, version: int = 1) -> bytes:
    return HEAD.pack(b"SAEC", version, len(body), hashlib.sha256(body).digest()) + body


def packed(plain: bytes) -> bytes:
    return framed(zstandard.ZstdCompressor().compress(plain))


def tensors(words: object, data: bytes = b"") -> bytes:
    text = words if isinstance(words, bytes) else json.dumps(words).encode()
    return packed(len(text).to_bytes(8, "little") + text + data)


def worded(frame: object) -> dict[str, object]:
    return {"__metadata__": {"frame": frame if isinstance(frame, str) else json.dumps(frame)}}


@given(
    kind=st.just("sample"),
    header=st.dictionaries(st.text(), json_values, max_size=4),
    content=st.dictionaries(names, arrays, max_size=3),
)
def test_what_goes_in_comes_out(kind, header, content):
    found = decode(encode_frame(Frame(kind, header, content)))
    assert (found.kind, found.header, set(found.arrays)) == (kind, header, set(content))
    for name, array in content.items():
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].dtype == array.dtype.newbyteorder("<")
        np.testing.assert_array_equal(found.arrays[name], array)


def test_views_of_any_stride_come_out_as_they_look():
    base = np.arange(24.0).reshape(4, 6)
    odd = {"turned": base.T, "every second": base[:, ::2], "backwards": base[::-1], "fortran": np.asfortranarray(base)}
    found = decode(encode_frame(Frame("sample", {}, odd))).arrays
    for name, view in odd.items():
        np.testing.assert_array_equal(found[name], view)


MAKE = """
import sys
import numpy as np
from saec.fleet.frame import Frame, encode_frame, frame_id
arrays = {name: np.arange(9.0) for name in sys.argv[1]}
print(frame_id(encode_frame(Frame("sample", {name: 1 for name in sys.argv[1]}, arrays))))
"""


def test_the_bytes_are_the_same_in_every_process_and_order():
    made = {
        subprocess.run([sys.executable, "-c", MAKE, order], capture_output=True, text=True, check=True).stdout
        for order in ("abcd", "dcba", "cadb", "abcd", "bdac", "abcd")
    }
    assert len(made) == 1


def test_a_frame_cut_off_anywhere_is_refused():
    data = encode_frame(SAMPLE)
    for length in range(len(data)):
        with pytest.raises(BadFrame):
            decode(data[:length])
    with pytest.raises(BadFrame):
        decode(data + b"\0")


def test_a_frame_with_any_bit_flipped_is_refused():
    data = encode_frame(SAMPLE)
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(BadFrame):
                decode(bytes(flipped))


@given(st.binary(max_size=300))
def test_noise_with_a_right_hash_is_refused_at_every_layer(noise):
    for data in (noise, framed(noise), packed(noise), tensors(noise), tensors(worded(noise.decode("latin-1")))):
        with pytest.raises(BadFrame):
            decode(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (framed(b"", version=2), "version 2, not 1"),
        (encode_frame(Frame("update")), "kind 'update', not sample"),
        (encode_frame(Frame("x" * 1000)), "kind 'xxx"),
        (tensors({}), "__metadata__"),
        (tensors(worded(["sample"])), "not enough values"),
        (tensors(worded(["sample", []])), "no object"),
        (tensors(worded([1, {}])), "no object"),
        (tensors(worded('["sample", {"p": NaN}]')), "JSON compliant"),
        (tensors(worded('["sample", {"p": -Infinity}]')), "JSON compliant"),
        (tensors(worded('["sample", {"p": 1e999}]')), "JSON compliant"),
        (tensors(worded("[" * 100_000)), "not a frame"),
        (tensors(b'{"a":' * 100_000), "not a frame"),
    ],
)  # fmt: skip
def test_a_frame_that_breaks_the_contract_is_refused_and_told_why(data, why):
    with pytest.raises(BadFrame, match=why):
        decode(data)


@pytest.mark.parametrize(
    ("arrays", "data"),
    [
        ({"a": ("BF16", [1], [0, 2])}, b"xy"),
        ({"a": ("U8", [2], [0, 9])}, b"xy"),
        ({"a": ("U8", [3], [0, 2])}, b"xy"),
        ({"a": ("U8", [1 << 60], [0, 2])}, b"xy"),
        ({"a": ("U8", [0, 1 << 63], [0, 0])}, b""),
        ({"a": ("U8", [1] * 70, [0, 1])}, b"x"),
        ({"a": ("U8", [2], [0, 2]), "b": ("U8", [2], [0, 2])}, b"xy"),
        ({"a": ("U8", [1], [0, 1]), "b": ("U8", [1], [2, 3])}, b"xyz"),
        ({}, b"nobody's"),
    ],
    ids=["dtype", "beyond", "shape", "huge", "huge nothing", "too deep", "shared", "a hole", "nobody's"],
)
def test_arrays_that_do_not_fit_their_bytes_are_refused(arrays, data):
    words = {name: dict(zip(("dtype", "shape", "data_offsets"), each, strict=True)) for name, each in arrays.items()}
    with pytest.raises(BadFrame, match="not a frame"):
        decode(tensors(worded(["sample", {}]) | words, data))


def bomb(size: int) -> bytes:
    return packed(bytes(size))


def says(size: int, window: int = 0) -> bytes:
    """A zstd frame that announces ``size`` bytes, or a window of ``2 ** (10 + window)``, and holds next to nothing."""
    if window:
        return framed(b"\x28\xb5\x2f\xfd\x00" + bytes([window << 3]) + b"\x01\x00\x00")
    return framed(b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + b"\x01\x00\x00")


@pytest.mark.parametrize(
    "data",
    [bomb(50_000_000), says(1 << 40), says(1 << 62), says((1 << 64) - 1), says(0, window=17), says(0, window=31)],
    ids=["unpacks to 50 MB", "1 TB", "4 EB", "most of all", "window of 128 MB", "window of 2 TB"],
)
def test_a_bomb_is_refused_before_it_takes_memory(data):
    tracemalloc.start()
    with pytest.raises(BadFrame):
        decode(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MOST


def test_a_frame_that_unpacks_to_exactly_the_limit_is_taken_and_one_byte_more_is_not():
    frame = Frame("sample", {}, {"a": np.zeros(50_000, np.uint8)})
    size = zstandard.frame_content_size(encode_frame(frame)[HEAD.size :])
    assert decode(encode_frame(frame), most=size).arrays["a"].size == 50_000
    with pytest.raises(BadFrame, match=f"larger than {size - 1} bytes"):
        decode(encode_frame(frame), most=size - 1)


def test_two_packed_bodies_in_one_frame_are_refused():
    body = encode_frame(SAMPLE)[HEAD.size :]
    with pytest.raises(BadFrame):
        decode(framed(body + body))


def test_a_long_header_is_refused_on_both_sides_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr(frame_module, "_MOST_WORDS", 1000)
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        encode_frame(Frame("sample", {"text": "x" * 1000}))
    with pytest.raises(BadFrame, match="more than 1000 bytes"):
        decode(tensors(worded(["sample", {"text": "x" * 1000}])))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), [float("nan")]])
def test_a_header_that_json_does_not_have_is_not_encoded(value):
    with pytest.raises(ValueError, match="JSON"):
        encode_frame(Frame("sample", {"p": value}))


@pytest.mark.parametrize(
    "array", [np.array(["text"]), np.array([object()]), np.array(["2020"], "M8[Y]"), np.zeros(2, "f4,i4")]
)
def test_arrays_that_are_no_numbers_are_not_encoded(array):
    with pytest.raises(ValueError, match="do not go into a frame"):
        encode_frame(Frame("sample", {}, {"a": array}))


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_a_malicious_pickle_is_refused_at_every_layer_and_never_run(tmp_path):
    trace = tmp_path / "was here"
    poison = pickle.dumps(Malicious(trace))
    as_bytes = encode_frame(Frame("sample", {}, {"a": np.frombuffer(poison, np.uint8)}))
    npy = b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128) + poison
    for data in (poison, framed(poison), packed(poison), tensors(poison), tensors({}, poison), packed(npy)):
        with pytest.raises(BadFrame):
            decode(data)
    assert decode(as_bytes).arrays["a"].tobytes() == poison
    assert not trace.exists()
    pickle.loads(poison)
    assert trace.exists(), "the file would have done harm"


def test_a_frame_is_named_by_all_of_its_bytes():
    data = encode_frame(SAMPLE)
    assert frame_id(data) == hashlib.sha256(data).hexdigest()
