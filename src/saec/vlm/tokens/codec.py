"""From a tower's tokens to a few bytes, and back: a basis, one step size, a frame.

A token is standardised as the projector's layer normalisation does (mean 0, variance 1), so that its length says
nothing, and described by its first coordinates in a :class:`Basis`. All coordinates of an image share one step size:
those of small variance then take few of zstd's bits, which is what rate-distortion theory asks for (reverse
water-filling), and dropping more of them saves next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from saec.data.hashing import sha256_file
from saec.errors import BadInput
from saec.fleet.frame import BadFrame, Frame, decode_frame, encode_frame
from saec.types import Tokens

KIND = "tokens"

Array = NDArray[np.float32]

_EPS = 1e-5
"""The projector's, of its layer normalisation."""

_MOST_BYTES = 4_000_000
_MOST_TOKENS = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """Coordinates of standardised tokens x [W]: c = down (x - mean) [K], and back, x = mean + up^T c.

    ``down`` and ``up`` [K, W]. The coordinates are uncorrelated and come by importance, so that the first D are the
    best D: principal components of what the projector's linear layer makes of tokens, and the tokens' linear regression
    on them.
    """

    mean: Array
    down: Array
    up: Array
    sha256: str

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read a basis.

        Raises:
            BadInput: missing or damaged.
        """
        try:
            found = {name: values.astype(np.float32) for name, values in load_file(file).items()}
            basis = cls(found["mean"], found["down"], found["up"], sha256_file(file))
        except (OSError, SafetensorError, KeyError) as error:
            raise BadInput(f"not a basis of tokens ({error})", where=file) from None
        if basis.down.shape != basis.up.shape or basis.down.shape[1:] != basis.mean.shape:
            raise BadInput("not a basis of tokens: its shapes differ", where=file)
        return basis

    def coordinates(self, tokens: Array, dims: int) -> Array:
        """Return the first ``dims`` coordinates [L, D] of tokens [L, W] as the tower makes them."""
        return np.asarray((standardised(tokens) - self.mean) @ self.down[:dims].T)

    def expand(self, tokens: Tokens) -> Array:
        """Return all standardised tokens [L, W]; in the places of those that were not sent stands the mean token.

        Raises:
            BadInput: more coordinates than this basis has.
        """
        if tokens.levels.shape[1] > len(self.up):
            what = f"tokens with {tokens.levels.shape[1]} coordinates, and the basis has {len(self.up)}"
            raise BadInput(what, where=tokens.model_id)
        found = np.zeros((tokens.total, tokens.levels.shape[1]), np.float32)
        found[tokens.indices] = tokens.levels * np.float32(tokens.scale)
        return np.asarray(self.mean + found @ self.up[: found.shape[1]])


def standardised(tokens: Array) -> Array:
    """Return tokens [L, W] with mean 0 and variance 1 each."""
    centred = tokens - tokens.mean(axis=1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + np.float32(_EPS)))


def quantised(coordinates: Array, bits: int) -> tuple[NDArray[np.int8], float]:
    """Return levels [k, D] from -(2^(bits-1) - 1) to 2^(bits-1) - 1, and what they are to be multiplied with."""
    most = 2 ** (bits - 1) - 1
    scale = max(float(np.abs(coordinates).max()), 1e-8) / most
    return np.rint(coordinates / np.float32(scale)).astype(np.int8), scale


def pack_tokens(tokens: Tokens) -> bytes:
    """Return the frame of some tokens."""
    header = {"model": tokens.model_id, "total": tokens.total, "scale": tokens.scale}
    # One coordinate after the other: neighbours then have one variance, and pack better.
    arrays: dict[str, NDArray[Any]] = {"levels": tokens.levels.T, "indices": tokens.indices.astype(np.uint16)}
    return encode_frame(Frame(KIND, header, arrays))


def unpack_tokens(data: bytes) -> Tokens:
    """Return the tokens in a frame.

    Raises:
        BadFrame: not a frame of tokens, or one that breaks their contract.
    """
    frame = decode_frame(data, kinds=(KIND,), most=_MOST_BYTES)
    try:
        head, levels, indices = frame.header, frame.arrays["levels"], frame.arrays["indices"]
        if indices.dtype != np.uint16:
            raise ValueError("its indices")
        tokens = Tokens(levels.T, head["scale"], indices.astype(np.int32), head["total"], head["model"])
        return check_tokens(tokens)
    except (KeyError, ValueError, TypeError) as error:
        raise BadFrame(f"not tokens: {error}") from None


def check_tokens(tokens: Tokens) -> Tokens:
    """Return tokens that keep the contract.

    Raises:
        ValueError: they do not; the message says how.
    """
    levels, indices, total, scale = tokens.levels, tokens.indices, tokens.total, tokens.scale
    if not isinstance(tokens.model_id, str) or type(total) is not int or not 0 < total <= _MOST_TOKENS:
        raise ValueError("its model or number of tokens")
    if type(scale) is not float or not 0 < scale < float("inf"):
        raise ValueError("its scale")
    if levels.dtype != np.int8 or levels.ndim != 2 or not levels.size or indices.shape != levels.shape[:1]:
        raise ValueError("its tokens do not fit their indices")
    if indices.dtype != np.int32 or (np.diff(indices) <= 0).any() or not 0 <= indices[0] <= indices[-1] < total:
        raise ValueError("its indices")
    return tokens
