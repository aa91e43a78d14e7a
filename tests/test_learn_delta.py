"""A change between two states: small, within its stated error, bit-exact when decoded, and refused where it is odd."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from learn_states import learnt
from saec.errors import BadInput
from saec.learn.delta import Delta, compress, fit_keep
from saec.learn.gain import fit_gain
from saec.learn.sensitivity import training_sensitivity
from saec.learn.sparse import changes_of, packed, quantised, unpacked, unzipped, zipped
from saec.learn.state import State

SHAPES = {"a": (8, 100), "b": (100, 8), "scale": ()}


def state(seed: int = 0, *, dtype: type = np.float16) -> State:
    rng = np.random.default_rng(seed)
    return State({name: np.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}, {"x.json": [1]})


def moved(base: State, seed: int = 1, by: float = 0.01) -> State:
    rng = np.random.default_rng(seed)
    new = {n: np.asarray(v + rng.standard_t(3, size=v.shape) * by, v.dtype) for n, v in base.tensors.items()}
    return State(new, {"x.json": [1, 2]})


def wire(delta: Delta) -> Delta:
    """As it arrives: its header has been JSON."""
    return replace(delta, header=json.loads(json.dumps(delta.header)))


def distance(one: State, other: State) -> float:
    return max(float(np.abs(one.tensors[n].astype(float) - other.tensors[n].astype(float)).max()) for n in one.tensors)


# -- codecs


@given(st.integers(1, 5000).flatmap(lambda total: st.tuples(st.just(total), st.sets(st.integers(0, total - 1)))))
def test_positions_come_back_whichever_way_they_go(case):
    total, chosen = case
    positions = np.array(sorted(chosen), dtype=np.int64)
    way, data = packed(positions, total)
    assert np.array_equal(unpacked(way, data, len(positions), total), positions)


def test_positions_far_apart_come_back_as_gaps():
    positions = np.array([0, 127, 128, 16_511, 16_512, 3_000_000], dtype=np.int64)
    way, data = packed(positions, 4_000_000)
    assert way == "gaps"
    assert np.array_equal(unpacked(way, data, 6, 4_000_000), positions)


def test_dense_positions_go_as_a_bitmap():
    assert packed(np.arange(0, 10_000, 2), 10_000)[0] == "bitmap"


@pytest.mark.parametrize(
    ("gaps", "count", "total"),
    [([5], 1, 5), ([5], 2, 100), ([5, 5], 1, 100), ([0x80], 1, 100), ([0x80] * 5 + [1], 1, 2**40), ([], 1, 9)],
)
def test_positions_that_do_not_fit_are_refused(gaps, count, total):
    with pytest.raises(ValueError, match=r"positions|gaps|larger"):
        unpacked("gaps", zipped(np.array(gaps, np.uint8)), count, total)


def test_a_stream_that_unpacks_to_more_than_it_may_is_refused():
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        unzipped(zipped(np.zeros(1000, np.uint8)), 10)


@given(
    st.lists(st.floats(-100, 100, width=32).filter(bool), min_size=1, max_size=200),
    st.integers(2, 8),
)
def test_a_quantised_change_is_at_most_half_a_step_off_and_keeps_its_sign(values, bits):
    changes = np.array(values, np.float32)
    codes, scale = quantised(changes, bits)
    decoded = changes_of(codes, scale)
    assert codes.max() < 2**bits
    assert np.all(np.abs(decoded - changes) <= scale[1] / 2 + 1e-5 * np.abs(changes).max())
    assert np.all(np.sign(decoded) == np.sign(changes))


# -- deltas


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_was_sent_is_within_the_stated_error_and_what_was_not_is_as_before(dtype, bits):
    base = state(dtype=dtype)
    new = moved(base)
    delta = wire(compress(base, new, keep=0.1, bits=bits))
    decoded = delta.apply(base)
    off = {n: np.abs(decoded.tensors[n].astype(float) - new.tensors[n].astype(float)) for n in ("a", "b")}
    sent = {n: decoded.tensors[n] != base.tensors[n] for n in off}
    changed = sum(np.count_nonzero(new.tensors[n] != base.tensors[n]) for n in off)
    assert delta.header["sparse"]["entries"] == -(-changed // 10)
    assert max(off[n][sent[n]].max() for n in off) <= delta.error
    assert max(off[n][~sent[n]].max() for n in off) <= max(delta.header["sparse"]["left_out"], delta.error)
    assert decoded.tensors["scale"] == new.tensors["scale"]
    assert decoded.document == {"x.json": [1, 2]}


def test_more_bits_and_more_weights_bring_the_state_nearer():
    base = state()
    new = moved(base)
    errors = [compress(base, new, keep=0.2, bits=bits).error for bits in (2, 4, 8)]
    norms = [compress(base, new, keep=keep, bits=8).header["sparse"]["norm"] for keep in (0.05, 0.2, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert norms == sorted(norms)
    assert norms[-1] > 0.999


def test_the_largest_changes_are_chosen_and_sensitivity_chooses_others():
    base = state()
    new = moved(base)
    change = np.abs(new.tensors["a"].astype(np.float32) - base.tensors["a"].astype(np.float32))
    plain = compress(base, new, keep=0.05, bits=8).apply(base).tensors["a"] != base.tensors["a"]
    assert change[plain].min() >= change[~plain].max()
    only_b = compress(base, new, keep=0.05, bits=8, sensitivity={"a": np.zeros((8, 100))}).apply(base)
    assert np.array_equal(only_b.tensors["a"], base.tensors["a"])
    assert not np.array_equal(only_b.tensors["b"], base.tensors["b"])


def test_changes_below_the_threshold_are_left_out():
    base = state()
    new = moved(base)
    delta = compress(base, new, keep=1.0, bits=8, threshold=0.02)
    changes = [np.abs(new.tensors[n].astype(np.float32) - base.tensors[n].astype(np.float32)) for n in ("a", "b")]
    assert delta.header["sparse"]["entries"] == sum(int((change > 0.02).sum()) for change in changes)


def test_the_same_state_is_an_update_of_nothing():
    base = state()
    delta = compress(base, base, keep=0.1, bits=4)
    assert delta.apply(base).sha256 == base.sha256
    assert delta.error == 0


def test_what_was_left_out_goes_with_later_updates():
    base = state(dtype=np.float32)
    new = moved(base)
    first = distance(compress(base, new, keep=0.2, bits=4).apply(base), new)
    for _ in range(40):
        base = compress(base, new, keep=0.2, bits=4).apply(base)
    assert distance(base, new) < first / 100


def test_rows_that_are_added_to_a_table_go_in_eight_bits_and_those_that_stay_are_exact():
    rng = np.random.default_rng(0)
    bank, weight = rng.normal(size=(50, 8)).astype(np.float32), rng.normal(size=50).astype(np.float32)
    base = State({"bank": bank, "weight": weight, "sha256": learnt("a", "b")}, {})
    more = rng.normal(size=(5, 8)).astype(np.float32) * [1, 1, 1, 1, 1, 1, 1, 1000]
    grown = {
        "bank": np.concatenate([np.delete(bank, [3, 9], axis=0), more.astype(np.float32)]),
        "weight": np.concatenate([np.delete(weight, [3, 9]), np.array([np.nan, 1, 2, 3, 4], np.float32)]),
        "sha256": learnt("b", "c"),
    }
    delta = wire(compress(base, State(grown, {})))
    decoded = delta.apply(base).tensors
    assert delta.arrays["bank/rows"].dtype == np.int8
    assert np.array_equal(decoded["bank"][:48], grown["bank"][:48])
    assert np.all(np.abs(decoded["bank"][48:] - more) <= np.abs(more).max(axis=0) / 254 * 1.001)
    assert np.array_equal(decoded["weight"], grown["weight"], equal_nan=True)
    assert np.array_equal(decoded["sha256"], grown["sha256"])


def test_new_tensors_go_whole_and_those_that_are_gone_go():
    base = State({"old": np.arange(3), "kept": np.arange(4)}, {"gone.json": 1})
    new = State({"kept": np.arange(4), "head": np.linspace(0, 1, 9)}, {"new.json": 2})
    assert wire(compress(base, new)).apply(base).sha256 == new.sha256


def test_without_a_share_to_keep_a_changed_tensor_goes_exact():
    base = state(dtype=np.float32)
    new = moved(base)
    assert compress(base, new).apply(base).sha256 == new.sha256


def test_weights_that_are_no_numbers_are_refused():
    base = state()
    broken = State({**base.tensors, "a": np.full((8, 100), np.nan, np.float16)}, {})
    with pytest.raises(BadInput, match="no numbers"):
        compress(base, broken, keep=0.1, bits=4)


@pytest.mark.parametrize("lost", ["sparse/positions", "sparse/codes", "sparse/scales"])
def test_a_change_that_lacks_a_piece_or_meets_another_base_is_refused(lost):
    base = state()
    delta = compress(base, moved(base), keep=0.1, bits=4)
    with pytest.raises(ValueError, match="does not fit"):
        replace(delta, arrays={n: v for n, v in delta.arrays.items() if n != lost}).apply(base)
    with pytest.raises(ValueError):
        delta.apply(State({"a": np.zeros(300, np.float16)}, {}))


def test_the_smallest_share_that_loses_no_more_than_stated_is_found():
    base = state(dtype=np.float32)
    new = moved(base)

    def loss_of(tried: State) -> float:
        return distance(tried, new)

    def make(keep: float) -> Delta:
        return compress(base, new, keep=keep, bits=8)

    keep, delta = fit_keep(base, new, make, loss_of, most=0.01, keeps=(0.01, 0.1, 0.3, 1.0))
    assert loss_of(delta.apply(base)) <= 0.01
    assert loss_of(compress(base, new, keep=0.1 if keep == 0.3 else 0.01, bits=8).apply(base)) > 0.01


def test_weights_matter_as_their_gradients_did_in_the_last_checkpoint_of_their_training(tmp_path):
    name = "base.lora_A.default.weight|exp_avg_sq"
    for step, value in ((50, 1.0), (60, 4.0)):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        moments = {name: np.full((2, 3), value, np.float32), "base.lora_A.default.weight|step": np.zeros(1)}
        save_file(moments, folder / "optimizer.safetensors")
    found = training_sensitivity(tmp_path / "run" / "last")
    assert list(found) == ["base.lora_A.weight"]
    assert np.all(found["base.lora_A.weight"] == 2)
    assert training_sensitivity(tmp_path / "elsewhere" / "adapter") == {}
    (folder / "optimizer.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(BadInput, match="checkpoint is damaged"):
        training_sensitivity(tmp_path / "run" / "last")


# -- amplified


def test_a_gain_multiplies_what_is_sent_and_costs_no_bytes():
    base = state(dtype=np.float32)
    new = moved(base)
    plain, louder = (compress(base, new, keep=0.1, bits=8, gain=gain) for gain in (1.0, 2.5))
    assert sum(a.nbytes for a in louder.arrays.values()) == sum(a.nbytes for a in plain.arrays.values())
    one, other = plain.apply(base), wire(louder).apply(base)
    for name in ("a", "b"):
        sent = one.tensors[name] - base.tensors[name]
        np.testing.assert_allclose(other.tensors[name] - base.tensors[name], 2.5 * sent, atol=1e-5)
    assert louder.header["sparse"]["norm"] == pytest.approx(plain.header["sparse"]["norm"])
    assert louder.error == pytest.approx(2.5 * plain.error, rel=0.01, abs=1e-6)


@pytest.mark.parametrize("way", [-1, 1])
def test_the_gain_brings_answers_closer_where_small_changes_pull_together(way):
    """A logit that sums all weights: what is left out shifts it one way, and what is sent makes up for that."""
    base = State({"a": np.zeros((20, 100), np.float32)}, {})
    rng = np.random.default_rng(3)
    new = State({"a": np.asarray(way * np.abs(rng.standard_t(3, size=(20, 100))), np.float32)}, {})
    parts = rng.uniform(0.5, 1.5, size=(50, 2000))

    def p_of(tried: State) -> np.ndarray:
        return 1 / (1 + np.exp(-(parts @ tried.tensors["a"].ravel()) / 1000))

    def make(gain: float) -> Delta:
        return compress(base, new, keep=0.2, bits=4, gain=gain)

    gain, delta = fit_gain(base, new, make, p_of)
    assert 1.5 <= gain <= 3
    left, left_plain = (np.abs(p_of(d.apply(base)) - p_of(new)).mean() for d in (delta, make(1.0)))
    assert left < 0.25 * left_plain


def test_an_update_that_answers_as_it_should_is_not_amplified():
    base = state(dtype=np.float32)
    new = moved(base)

    def p_of(tried: State) -> np.ndarray:
        return np.abs(tried.tensors["a"] - new.tensors["a"]).clip(0, 1).ravel()

    assert fit_gain(base, new, lambda gain: compress(base, new, keep=1.0, bits=8, gain=gain), p_of)[0] == 1.0


def test_all_gains_are_tried_for_answers_may_get_worse_before_they_get_better():
    base = State({"a": np.zeros((20, 100), np.float32)}, {})
    new = State({"a": np.ones((20, 100), np.float32)}, {})

    def p_of(tried: State) -> np.ndarray:
        return np.interp([tried.tensors["a"].mean()], [0.5, 0.63, 0.75, 1.0], [0.6, 0.5, 0.4, 0.9])

    assert fit_gain(base, new, lambda gain: compress(base, new, keep=0.5, bits=8, gain=gain), p_of)[0] == 2.0
