"""An update is bound to its base and to its key: whatever is not what was made is refused, and says why."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from learn_states import KEY, MOST, STRANGE, adapter, naming, taught, update
from saec.fleet.frame import Frame, decode_frame, encode_frame
from saec.learn.delta import Delta, compress
from saec.learn.state import State, adapter_state
from saec.learn.update import ADAPTER, Refused, Update, decode_update, encode_update, product_of, product_target


@pytest.fixture
def root(tmp_path):
    return adapter(tmp_path / "adapter")


def changed(data: bytes, key: str, value: object) -> bytes:
    """The update with another header, whole as a frame, its HMAC as it was."""
    frame = decode_frame(data, kinds=("update",), most=MOST)
    return encode_frame(Frame("update", {**frame.header, key: value}, frame.arrays))


def test_an_update_arrives_as_it_was_sent_and_makes_the_state_that_it_names(root):
    data, new = update(root, 3, previous=2)
    found = decode_update(data, KEY, MOST)
    assert (found.target, found.version, found.previous) == (ADAPTER, 3, 2)
    assert (found.figures, found.provenance) == ({"accuracy": 0.9}, {"by": "test"})
    assert found.apply(adapter_state(root)).sha256 == found.new_sha256 == new.sha256


def test_it_is_much_smaller_than_what_it_changes(root):
    base = adapter_state(root)
    data, _ = update(root, 1)
    assert len(data) < 0.5 * sum(value.nbytes for value in base.tensors.values())


def test_a_changed_byte_anywhere_is_refused(root):
    data, _ = update(root, 1)
    for at in np.random.default_rng(0).integers(0, len(data), 60):
        with pytest.raises(Refused):
            decode_update(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], KEY, MOST)


@pytest.mark.parametrize("length", [0, 10, 45, -1])
def test_a_truncated_update_is_refused(root, length):
    data, _ = update(root, 1)
    with pytest.raises(Refused, match="no update"):
        decode_update(data[:length], KEY, MOST)


@pytest.mark.parametrize("key", ["version", "previous", "base_sha256", "new_sha256", "target", "figures", "delta"])
def test_a_header_that_was_changed_by_someone_without_the_key_is_refused(root, key):
    data, _ = update(root, 1)
    other = {"version": 9, "previous": 8, "figures": {}, "delta": {}}.get(key, "other")
    with pytest.raises(Refused, match="not made with this key"):
        decode_update(changed(data, key, other), KEY, MOST)


def test_an_array_that_was_changed_by_someone_without_the_key_is_refused(root):
    data, _ = update(root, 1)
    frame = decode_frame(data, kinds=("update",), most=MOST)
    arrays = {**frame.arrays, "sparse/scales": frame.arrays["sparse/scales"] * 2}
    with pytest.raises(Refused, match="not made with this key"):
        decode_update(encode_frame(Frame("update", frame.header, arrays)), KEY, MOST)


@pytest.mark.parametrize(
    ("made_with", "read_with", "why"),
    [(KEY, b"other", "not made with this key"), (None, KEY, "not authenticated"), (KEY, None, "no key")],
)
def test_the_key_must_be_the_same_on_both_sides(root, made_with, read_with, why):
    with pytest.raises(Refused, match=why):
        decode_update(update(root, 1, key=made_with)[0], read_with, MOST)


def test_without_a_token_anywhere_an_update_needs_no_key(root):
    assert decode_update(update(root, 1, key=None)[0], None, MOST).version == 1


def test_one_that_unpacks_to_more_than_allowed_is_refused(root):
    with pytest.raises(Refused, match="larger than 1000 bytes"):
        decode_update(update(root, 1)[0], KEY, 1000)


def test_other_frames_and_pickles_are_refused(root):
    with pytest.raises(Refused, match="no update"):
        decode_update(encode_frame(Frame("sample")), KEY, MOST)
    with pytest.raises(Refused, match="no update"):
        decode_update(pickle.dumps({"a": 1}), KEY, MOST)
    with pytest.raises(Refused, match="other fields"):
        decode_update(encode_frame(Frame("update", {"target": "adapter"})), None, MOST)


def test_another_base_is_refused(root, tmp_path):
    data, _ = update(root, 1)
    other = adapter_state(adapter(tmp_path / "other", seed=5))
    with pytest.raises(Refused, match="made for another base"):
        decode_update(data, KEY, MOST).apply(other)


def test_one_that_does_not_make_the_state_that_it_names_is_refused(root):
    base = adapter_state(root)
    delta = compress(base, taught(base), keep=0.1, bits=4)
    lie = Update(ADAPTER, base.sha256, "0" * 64, 1, 0, delta)
    with pytest.raises(Refused, match="does not make the state"):
        decode_update(encode_update(lie, KEY), KEY, MOST).apply(base)
    lacking = replace(delta, arrays={n: v for n, v in delta.arrays.items() if n != "sparse/codes"})
    with pytest.raises(Refused, match="damaged"):
        decode_update(encode_update(replace(lie, delta=lacking), KEY), KEY, MOST).apply(base)


@pytest.mark.parametrize(
    "scales", [np.zeros((0, 2)), np.zeros((1, 2)), np.zeros((2, 1)), np.zeros(2), np.zeros((9, 2))]
)
def test_scales_that_are_not_one_for_each_tensor_are_damage(root, scales):
    base = adapter_state(root)
    delta = compress(base, taught(base), keep=0.1, bits=4)
    wrong = replace(delta, arrays={**delta.arrays, "sparse/scales": scales.astype(np.float32)})
    with pytest.raises(Refused, match="damaged"):
        Update(ADAPTER, base.sha256, "0" * 64, 1, 0, wrong).apply(base)


def test_rows_are_not_broadcast_to_more_than_was_sent():
    base = State({"0.bank": np.zeros((3, 4), np.float32)}, {})
    many = np.zeros((100_000, 1), np.int8)
    for rows, scale in ((many, np.ones(1_000_000, np.float32)), (np.zeros((5, 4), np.int8), np.ones(1, np.float32))):
        arrays = {"0.bank/dropped": np.zeros(0, np.int32), "0.bank/rows": rows, "0.bank/scale": scale}
        header = {"ways": {"0.bank": "rows"}, "document": {"set": {}, "gone": []}, "sparse": None, "error": 0.0}
        with pytest.raises(Refused, match="rows of another shape"):
            Update(product_target("x"), base.sha256, "0" * 64, 1, 0, Delta(header, arrays)).apply(base)


def test_the_same_update_is_the_same_bytes(root):
    assert update(root, 1)[0] == update(root, 1)[0]


def test_targets_name_adapter_or_product_and_nothing_else():
    assert product_of(ADAPTER) is None
    assert product_of(product_target("a:b")) == "a:b"
    for odd in ("", "product:", "bank", "bank:a"):
        with pytest.raises(Refused):
            product_of(odd)


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("target", [ADAPTER, product_target("plate")])
def test_a_name_that_would_become_a_file_of_somebody_else_is_refused(root, name, target):
    base = adapter_state(root)
    made = [naming(base, target, document=name), naming(base, target, tensor=f"{name}/x")]
    for data in made:
        with pytest.raises(Refused, match="must not be applied"):
            decode_update(data, None, MOST)


@pytest.mark.parametrize("name", ["a\0b", "a b", "", "replay/", "x" * 300, "memory/0.bank", "adapter_model/x"])
def test_a_tensor_by_a_name_that_none_has_is_refused(root, name):
    with pytest.raises(Refused, match="must not be applied"):
        decode_update(naming(adapter_state(root), ADAPTER, tensor=name), None, MOST)


@pytest.mark.parametrize(
    "delta",
    [
        None,
        [],
        {},
        {"ways": []},
        {"ways": {"a": "away"}, "document": {"set": {}, "gone": []}, "sparse": None, "error": 0},
    ],
)
def test_a_change_that_is_built_otherwise_is_refused(root, delta):
    data, _ = update(root, 1, key=None)
    with pytest.raises(Refused, match="no update"):
        decode_update(changed(data, "delta", delta), None, MOST)
