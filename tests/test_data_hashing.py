"""Copies of a picture are recognised, different parts are not, however alike."""

from __future__ import annotations

import hashlib
import os
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_trees import picture, put
from saec.config import DataSettings
from saec.data import decode, hashing
from saec.data.decode import UnreadableImage
from saec.data.hashing import (
    Fingerprint,
    difference_hash,
    fingerprint,
    fingerprint_image,
    fingerprints,
    group_near_duplicates,
    near_duplicate_pairs,
    sha256_file,
)
from saec.data.readers import read_dataset


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


COPIES = {
    "JPEG quality 75": lambda image: jpeg(image, 75),
    "half size": lambda image: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "three quarters": lambda image: cv2.resize(image, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA),
    "brighter by 8": lambda image: cv2.add(image, (8, 8, 8, 0)),
    "darker by 8": lambda image: cv2.subtract(image, (8, 8, 8, 0)),
    "gain 0.9, JPEG quality 60": lambda image: jpeg(cv2.convertScaleAbs(image, alpha=0.9), 60),
}


def part(number: int, *, ground: int = 250) -> np.ndarray:
    """An aligned part: the same ring on the same bright ground, with a texture and a small mark of its own."""
    rng = np.random.default_rng(number)
    image = np.full((256, 256), ground, np.uint8)
    cv2.circle(image, (128, 128), 100, 60, -1)
    cv2.circle(image, (128, 128), 70, 110, -1)
    texture = cv2.resize(rng.normal(0, 7, (32, 32)), (256, 256), interpolation=cv2.INTER_CUBIC)
    inside = image < 200
    image[inside] = np.clip(image[inside] + texture[inside], 0, 255)
    cv2.circle(image, tuple(int(v) for v in rng.integers(80, 176, 2)), 5, 20, -1)
    return np.repeat(image[..., None], 3, axis=2)


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("number", range(3))
def test_a_copy_of_a_part_is_a_near_duplicate(name: str, number: int) -> None:
    image = part(number)
    copy = COPIES[name](image)
    assert near_duplicate_pairs([fingerprint_image("a", image)], [fingerprint_image("b", copy)]) == [(0, 0)]


def test_aligned_parts_that_differ_only_in_texture_are_kept_apart() -> None:
    prints = [fingerprint_image(str(number), part(number)) for number in range(20)]
    close = [(a.difference ^ b.difference).bit_count() <= 24 for a, b in combinations(prints, 2)]
    assert any(close)  # the hash alone would take some of them for one image
    assert group_near_duplicates(prints) == [(i,) for i in range(20)]


def test_blank_images_are_one_group_only_when_their_bytes_agree() -> None:
    def blank(sha256: str, level: int) -> Fingerprint:
        return fingerprint_image(sha256, np.full((50, 50, 3), level, np.uint8))

    assert group_near_duplicates([blank("a", 90), blank("b", 90), blank("a", 90)]) == [(0, 2), (1,)]


def test_byte_identical_files_are_one_group_under_any_name(tmp_path: Path) -> None:
    first = put(tmp_path / "a.png", 1)
    other = put(tmp_path / "b.png", 2)
    copy = tmp_path / "deep" / "c.png"
    copy.parent.mkdir()
    copy.write_bytes(first.read_bytes())
    assert group_near_duplicates(fingerprints([first, other, copy]), bits=0) == [(0, 2), (1,)]


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 64))
@settings(deadline=None, max_examples=30)
def test_groups_partition_the_images(numbers: list[int], bits: int) -> None:
    prints = [fingerprint_image(str(number), picture(number)) for number in numbers]
    groups = group_near_duplicates(prints, bits=bits)
    assert sorted(i for group in groups for i in group) == list(range(len(numbers)))
    assert len(groups) == len(set(numbers))
    assert groups == sorted(groups)


def test_pairs_within_and_across_agree() -> None:
    images = [picture(1), jpeg(picture(1), 90), picture(2), jpeg(picture(2), 90), picture(3)]
    prints = [fingerprint_image(str(i), image) for i, image in enumerate(images)]
    assert near_duplicate_pairs(prints) == [(0, 1), (2, 3)]
    across = near_duplicate_pairs(prints[:2], prints[2:])
    assert across == []
    assert near_duplicate_pairs(prints, prints[1:2]) == [(0, 0), (1, 0)]
    assert near_duplicate_pairs([], prints) == near_duplicate_pairs(prints, []) == near_duplicate_pairs([]) == []


def test_the_difference_hash_has_256_bits_and_follows_the_gradient() -> None:
    rising = np.tile(np.linspace(0, 255, 170, dtype=np.uint8), (160, 1))
    image = np.repeat(rising[..., None], 3, axis=2)
    assert difference_hash(image) == 2**256 - 1
    assert difference_hash(image[:, ::-1]) == 0


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(os.urandom(300_000))
    assert sha256_file(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_an_unreadable_file_has_no_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(UnreadableImage):
        fingerprint(tmp_path / "x.png")


def test_the_settings_and_the_room_have_the_same_defaults() -> None:
    assert DataSettings().near_duplicate_bits == hashing.NEAR_DUPLICATE_BITS
    assert DataSettings().max_pixels == decode.MAX_PIXELS


SHARED = os.environ.get("SAEC_SHARED_DATA")
KSDD_COPIES = 16 + 2  # kos01 = kos26 and kos27 = kos34 byte for byte; kos38 and kos39 are two scans of one item


@pytest.mark.skipif(not SHARED, reason="SAEC_SHARED_DATA is not set")
@pytest.mark.parametrize(
    ("folder", "groups"),
    [("mvtec_ad/bottle", 0), ("mvtec_ad/screw", 1), ("circuit_board", 0), ("KolektorSDD", KSDD_COPIES)],
)
def test_real_sets_have_few_groups_of_more_than_one_image(folder: str, groups: int) -> None:
    prints = fingerprints(part.path for part in read_dataset(Path(str(SHARED)) / folder))
    assert sum(len(group) > 1 for group in group_near_duplicates(prints)) == groups
