"""A stream of real parts that changes under the line's hands: another product appears, or the light drifts.

Nobody has learnt from its parts before they come, and none comes twice: contents and near-duplicates are told apart by
:mod:`saec.data.hashing`, and whole groups of them go to one side.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from saec.data.decode import UnreadableImage, read_image
from saec.data.hashing import Fingerprint, fingerprints, group_near_duplicates, sha256_file, sha256_json
from saec.errors import BadInput
from saec.types import Image, Part

HELD_OUT = 1 / 3
"""Share of the unseen parts that are held out to measure on."""


@dataclass(frozen=True, slots=True)
class Stream:
    """``rounds`` of parts in the order in which they come; ``held_out`` has the last round's mix, ``before`` the first
    one's. All have labels, which only the measuring looks at."""

    rounds: tuple[tuple[Part, ...], ...]
    held_out: tuple[Part, ...]
    before: tuple[Part, ...]

    def digest(self) -> str:
        """Return a hash over content, label and place of all parts: the same wherever the images lie."""
        groups = (*self.rounds, self.held_out, self.before)
        return sha256_json([[[sha256_file(part.path), str(part.label)] for part in parts] for parts in groups])


def shift(rounds: int) -> list[float]:
    """Return how far the change has come in each round: none in the first, all of it from the middle one on."""
    return [min(1.0, number / max(1, (rounds - 1) // 2)) for number in range(rounds)]


def build_stream(
    first: Sequence[Part],
    then: Sequence[Part],
    *,
    rounds: int,
    parts: int,
    known: Collection[str] = (),
    product: str,
    seed: int = 0,
) -> Stream:
    """Return ``rounds`` rounds of at most ``parts`` parts, whose share of ``then`` follows :func:`shift`.

    Without ``then`` all are of ``first``, to be relit by :func:`relight`. All parts are called ``product``: the line
    does not know that its product has changed.

    Args:
        first: labelled parts of what the station was fitted to.
        then: labelled parts of what comes after it.
        rounds: at least 2.
        parts: in a round, fewer where there are not enough.
        known: SHA-256 of images that the station or the cloud's model has learnt from: left out.
        product: name of all parts.
        seed: of the order.

    Raises:
        BadInput: too few unseen parts, or one that cannot be read.
    """
    if rounds < 2:
        raise BadInput("a stream that changes has at least 2 rounds", where=rounds)
    rng = random.Random(seed)
    old_held, old = _apart(first, known, rng)
    new_held, new = _apart(then, known, rng) if then else (old_held, [])
    shares = shift(rounds) if then else [0.0] * rounds
    size = _fitting(shares, len(old), len(new), parts)
    if size < 2 or not new_held:
        raise BadInput("too few unseen parts for a stream", where=f"{len(old)} and {len(new)}", fix="take fewer rounds")
    found = []
    for share in shares:
        count = round(share * size)
        mixed = [new.pop() for _ in range(count)] + [old.pop() for _ in range(size - count)]
        rng.shuffle(mixed)
        found.append(tuple(replace(part, product=product) for part in mixed))
    held = (tuple(replace(part, product=product) for part in side) for side in (new_held, old_held))
    return Stream(tuple(found), *held)


def relight(stream: Stream, folder: Path) -> Stream:
    """Return the stream under a light that drifts from round to round, its images written into ``folder``."""
    strengths = shift(len(stream.rounds))
    rounds = tuple(
        tuple(_relit(part, strength, folder / str(number)) for part in parts)
        for number, (parts, strength) in enumerate(zip(stream.rounds, strengths, strict=True))
    )
    held_out = tuple(_relit(part, strengths[-1], folder / "held_out") for part in stream.held_out)
    return Stream(rounds, held_out, stream.before)


def relit(image: Image, strength: float) -> Image:
    """Return an image under a lamp that has aged by ``strength`` in [0, 1]: weaker, dim at the rim, and scattered, so
    that shadows are grey. (A detector hardly minds a light that is weaker alone.)"""
    height, width = image.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    vignette = 1 - 0.8 * strength * (x * x + y * y) / 2
    light = (image / 255.0) ** (1 - 0.5 * strength) * (1 - 0.2 * strength)
    return np.asarray(np.rint(255 * light * vignette[..., None]), dtype=np.uint8)


def _relit(part: Part, strength: float, folder: Path) -> Part:
    if strength == 0:
        return part
    path = folder / Path(part.part_id).with_suffix(".png")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part.png")
        cv2.imwrite(str(partial), relit(read_image(part.path), strength))
        partial.replace(path)
    return replace(part, path=path)


def _apart(parts: Sequence[Part], known: Collection[str], rng: random.Random) -> tuple[list[Part], list[Part]]:
    """Return (held out, for the stream): unseen parts, each content once, near-duplicates on one side."""
    prints = _fingerprints(parts)
    groups = [[at for at in group if prints[at].sha256 not in known] for group in group_near_duplicates(prints)]
    groups = [list(_once(group, prints)) for group in groups if group]
    rng.shuffle(groups)
    held: list[Part] = []
    rest: list[Part] = []
    share = HELD_OUT * sum(map(len, groups))
    for group in groups:
        (held if len(held) < share else rest).extend(parts[at] for at in group)
    return held, rest


def _once(group: Sequence[int], prints: Sequence[Fingerprint]) -> Iterator[int]:
    seen: set[str] = set()
    for at in group:
        if prints[at].sha256 not in seen:
            seen.add(prints[at].sha256)
            yield at


def _fingerprints(parts: Sequence[Part]) -> list[Fingerprint]:
    try:
        return fingerprints([part.path for part in parts])
    except UnreadableImage as error:
        raise BadInput("a part of the stream cannot be read", where=error, fix="leave it out") from None


def _fitting(shares: Sequence[float], old: int, new: int, most: int) -> int:
    """Return the largest round size, ``most`` at most, for which there are enough parts of both kinds."""
    for size in range(most, 1, -1):
        wanted = sum(round(share * size) for share in shares)
        if wanted <= new and size * len(shares) - wanted <= old:
            return size
    return 0
