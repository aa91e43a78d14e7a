"""Width projector: the tokens of one tower as those that another model's projector takes.

A linear map from the device's coordinates to the cloud's tokens, fitted by ridge regression to what both towers see in
the same images. Towers may differ in width, in family, and in how many tokens they make of an image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from saec.data.manifest import write_atomic
from saec.errors import BadInput
from saec.fleet.frame import BadFrame, Frame, decode_frame, encode_frame
from saec.types import Tokens
from saec.vlm.tokens.codec import Array

KIND = "width"

FEWEST = 30
"""Images from which on a projector can be expected to hold for others."""

HELD_OUT = 5
"""Every so manieth image is held out to say how well a projector does."""

_MOST_BYTES = 1 << 28


@dataclass(frozen=True, slots=True, eq=False)
class WidthProjector:
    """``source`` tokens in D coordinates become ``target`` tokens: x = weight c + bias, on a grid of ``side`` x
    ``side``; ``weight`` [W, D], ``bias`` [W] float32."""

    source: str
    target: str
    side: int
    weight: Array
    bias: Array

    def expand(self, tokens: Tokens) -> Array:
        """Return all tokens [side^2, W] of an image of which some came.

        Raises:
            BadInput: tokens of another tower, or with another number of coordinates.
        """
        if tokens.model_id != self.source or tokens.levels.shape[1] != self.weight.shape[1]:
            what = f"these are {tokens.levels.shape[1]} coordinates of {tokens.model_id}"
            fix = f"the width projector takes {self.weight.shape[1]} of {self.source}"
            raise BadInput(what, where=tokens.model_id, fix=fix)
        found = np.zeros((tokens.total, tokens.levels.shape[1]), np.float32)
        found[tokens.indices] = tokens.levels * np.float32(tokens.scale)
        return self.across(found)

    def across(self, coordinates: Array) -> Array:
        """Return the tokens [side^2, W] that coordinates [L, D] become."""
        return np.asarray(regridded(coordinates, self.side) @ self.weight.T + self.bias)

    def save(self, file: Path) -> None:
        """Write it.

        Raises:
            OSError: the file cannot be written.
        """
        header = {"source": self.source, "target": self.target, "side": self.side}
        write_atomic(file, encode_frame(Frame(KIND, header, {"weight": self.weight, "bias": self.bias})))

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read one.

        Raises:
            BadInput: missing or damaged.
        """
        try:
            frame = decode_frame(file.read_bytes(), kinds=(KIND,), most=_MOST_BYTES)
            head, weight, bias = frame.header, frame.arrays["weight"], frame.arrays["bias"]
            found = cls(str(head["source"]), str(head["target"]), int(head["side"]), weight, bias)
        except (OSError, BadFrame, KeyError, TypeError, ValueError) as error:
            fix = "make one with saec vlm width"
            raise BadInput(f"not a width projector ({error})", where=file, fix=fix) from None
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or weight.dtype != np.float32 or bias.dtype != np.float32:
            raise BadInput("not a width projector: its shapes differ", where=file)
        return found


def fit_width(device: Array, cloud: Array, *, source: str, target: str, ridge: float = 1.0) -> WidthProjector:
    """Fit a projector to what both towers see in the same images.

    Args:
        device: coordinates [N, L, D] of all tokens of N images, as the device would send them.
        cloud: standardised tokens [N, M, W] of the same images.
        source: the device's tower.
        target: the cloud's.
        ridge: weight of the penalty, in tokens, on coordinates of unit variance.

    Raises:
        BadInput: different numbers of images, or tokens that are no square grid.
    """
    if len(device) != len(cloud) or not len(device):
        raise BadInput("both towers must see the same images", where=f"{len(device)} and {len(cloud)}")
    side = _side(cloud.shape[1])
    x = np.concatenate([regridded(each, side) for each in device]).astype(np.float64)
    y = cloud.reshape(len(x), -1).astype(np.float64)
    middle, scale, mean = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-8), y.mean(axis=0)
    x = (x - middle) / scale
    solved = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ (y - mean))
    weight = (solved / scale[:, None]).T
    bias = mean - weight @ middle
    return WidthProjector(source, target, side, weight.astype(np.float32), bias.astype(np.float32))


def held_out_r2(device: Array, cloud: Array, *, ridge: float = 1.0) -> float | None:
    """Return R^2 of a projector on every fifth image, fitted to the others: 1 gives all of the variance of the cloud's
    tokens back, 0 none. ``None`` where there are too few images to hold one out.

    Args:
        device, cloud, ridge: as in :func:`fit_width`.
    """
    unseen = np.arange(len(device)) % HELD_OUT == HELD_OUT - 1
    if not unseen.any():
        return None
    made = fit_width(device[~unseen], cloud[~unseen], source="", target="", ridge=ridge)
    found, wanted = np.stack([made.across(each) for each in device[unseen]]), cloud[unseen]
    around = wanted - cloud[~unseen].mean(axis=(0, 1))
    return 1 - float(((found - wanted) ** 2).sum() / max(float((around**2).sum()), 1e-12))


def regridded(tokens: Array, side: int) -> Array:
    """Return tokens [L, D] of a square grid on one of ``side`` x ``side``, each the mean of what it covers."""
    rows = _side(len(tokens))
    if rows == side:
        return tokens
    edges, cells = np.arange(rows + 1) / rows, np.arange(side + 1) / side
    ends = np.minimum(cells[1:, None], edges[None, 1:]) - np.maximum(cells[:-1, None], edges[None, :-1])
    covers = np.maximum(ends, 0) * side  # [side, rows]: each row sums to 1
    square = np.einsum("yi,xj,ijd->yxd", covers, covers, tokens.reshape(rows, rows, -1), optimize=True)
    return np.asarray(square.reshape(side * side, -1), np.float32)


def _side(count: int) -> int:
    side = math.isqrt(count)
    if side * side != count:
        raise BadInput(f"{count} tokens are no square grid")
    return side
