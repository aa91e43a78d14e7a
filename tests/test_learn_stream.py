"""A stream of real parts that changes, from which nothing leaks."""

from __future__ import annotations

from collections import Counter

import cv2
import numpy as np
import pytest

from edge_parts import blotted, parts, plate, put
from saec.data.decode import read_image
from saec.data.hashing import sha256_file
from saec.errors import BadInput
from saec.learn.stream import build_stream, relight, relit, shift
from saec.types import Label


@pytest.fixture
def first(tmp_path):
    return parts(tmp_path / "first", [plate(number) for number in range(30)], label=Label.GOOD)


@pytest.fixture
def then(tmp_path):
    return parts(tmp_path / "then", [blotted(number) for number in range(30)], label=Label.DEFECT, product="other")


def content(stream):
    groups = [*stream.rounds, stream.held_out, stream.before]
    return [sha256_file(part.path) for group in groups for part in group]


def test_the_change_begins_after_the_first_round_and_is_whole_from_the_middle_on():
    assert shift(5) == [0, 0.5, 1, 1, 1]
    assert shift(2) == [0, 1]


def test_no_content_comes_twice_anywhere(first, then):
    stream = build_stream(first, then, rounds=3, parts=10, product="plate")
    assert max(Counter(content(stream)).values()) == 1


def test_the_mix_shifts_and_all_parts_bear_one_name(first, then):
    stream = build_stream(first, then, rounds=5, parts=4, product="line")
    assert [sum(part.label is Label.DEFECT for part in round_) for round_ in stream.rounds] == [0, 2, 4, 4, 4]
    assert {part.label for part in stream.held_out} == {Label.DEFECT}
    assert {part.label for part in stream.before} == {Label.GOOD}
    assert {part.product for round_ in stream.rounds for part in round_} == {"line"}


def test_what_somebody_has_learnt_from_is_left_out(first, then):
    known = {sha256_file(part.path) for part in [*first[:12], *then[:12]]}
    stream = build_stream(first, then, rounds=2, parts=20, known=known, product="plate")
    assert not known & set(content(stream))
    with pytest.raises(BadInput, match="too few unseen parts"):
        build_stream(first, then, rounds=2, parts=20, known={sha256_file(part.path) for part in then}, product="plate")


def test_a_re_encoded_copy_is_on_the_same_side_as_its_original(tmp_path, first, then):
    copies = [cv2.imdecode(cv2.imencode(".jpg", plate(n), [1, 90])[1], 1) for n in range(30)]
    both = [*first, *parts(tmp_path / "copies", copies, label=Label.GOOD)]
    stream = build_stream(both, then, rounds=2, parts=8, product="plate")
    number_of = {part.path: at % 30 for at, part in enumerate(both)}
    held = {number_of[part.path] for part in stream.before}
    assert not held & {number_of[part.path] for part in stream.rounds[0]}


def test_the_same_seed_gives_the_same_stream(first, then):
    one, same, other = (build_stream(first, then, rounds=2, parts=8, product="p", seed=seed) for seed in (1, 1, 2))
    assert one == same != other


def test_light_drifts_from_round_to_round_and_is_written_as_files(tmp_path, first):
    stream = relight(build_stream(first, (), rounds=3, parts=4, product="plate"), tmp_path / "relit")
    rims = [np.mean([read_image(part.path)[:9, :9].mean() for part in round_]) for round_ in stream.rounds]
    assert rims[0] > rims[1] + 20
    assert stream.rounds[0][0].path.parent == first[0].path.parent
    assert all(part.path.is_relative_to(tmp_path / "relit") for part in (*stream.rounds[1], *stream.held_out))
    again = relight(build_stream(first, (), rounds=3, parts=4, product="plate"), tmp_path / "relit")
    assert again == stream


def test_no_drift_changes_no_pixel():
    np.testing.assert_array_equal(relit(plate(1), 0.0), plate(1))


def test_a_part_that_cannot_be_read_is_named(tmp_path, first, then):
    broken = put(tmp_path / "broken.png", plate(0))
    broken.write_bytes(b"no image")
    bad = [*first, type(first[0])("broken", "plate", broken, Label.GOOD)]
    with pytest.raises(BadInput, match=r"broken\.png"):
        build_stream(bad, then, rounds=2, parts=8, product="plate")
