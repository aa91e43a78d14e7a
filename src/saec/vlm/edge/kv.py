"""The KV cache of one conversation: buffers that the graph reads where they lie, and saved beginnings of them.

New keys and values are written into the buffers in place (columns of the transposed keys, rows of the values), so that
a step copies what is new and never the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saec.vlm.contract.signature import Signature

States = NDArray[Any]
"""Keys [layers, 1, KV, D, tokens] or values [layers, 1, KV, tokens, D], float32 or float16 as the signature says."""

GRAIN = 128
"""A free graph's cache grows by this many tokens at a time: attention costs what is there, and copies are few."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Keys and values of the first tokens of a conversation, read-only: any number of others may continue from it."""

    keys: States
    values: States

    def __post_init__(self) -> None:
        self.keys.flags.writeable = self.values.flags.writeable = False

    @property
    def length(self) -> int:
        """Tokens."""
        return int(self.values.shape[3])


class Cache:
    """Room for keys and values, of which the first ``length`` tokens are filled in.

    A fixed graph's cache has all its room from the beginning, a free graph's grows. What is not filled in is zero: it
    is masked, but must be a number.
    """

    def __init__(self, signature: Signature, prefix: Prefix | None = None, length: int | None = None) -> None:
        """Begin with a copy of the first ``length`` tokens of ``prefix``, all of them unless told otherwise."""
        self._signature = signature
        self._most = signature.cache
        self.length = 0
        self._make(0 if signature.n is None else self._most)
        if prefix is not None:
            kept = prefix.length if length is None else length
            self.append(prefix.keys[..., :kept], prefix.values[..., :kept, :])

    @property
    def room(self) -> int:
        """Tokens that fit in now."""
        return int(self.values.shape[3])

    def append(self, keys: States, values: States) -> None:
        """Write the states of new tokens behind the others; those beyond the last place are lost."""
        end = min(self.length + values.shape[3], self._most)
        if end > self.room:
            self._grow(end)
        new = max(0, end - self.length)
        self.keys[..., self.length : end] = keys[..., :new]
        self.values[..., self.length : end, :] = values[..., :new, :]
        self.length += values.shape[3]

    def prefix(self, length: int) -> Prefix:
        """Return a copy of the first ``length`` tokens.

        Raises:
            ValueError: there are not as many.
        """
        if not 0 < length <= min(self.length, self.room):
            raise ValueError(f"{length} of {min(self.length, self.room)} tokens cannot be kept")
        return Prefix(self.keys[..., :length].copy(), self.values[..., :length, :].copy())

    def fork(self, length: int) -> Cache:
        """Return another cache with the same first ``length`` tokens, as a copy."""
        return Cache(self._signature, Prefix(self.keys[..., :length], self.values[..., :length, :]))

    def _grow(self, tokens: int) -> None:
        old = self.keys, self.values
        self._make(min(-(-tokens // GRAIN) * GRAIN, self._most))
        self.keys[..., : self.length], self.values[..., : self.length, :] = (
            old[0][..., : self.length],
            old[1][..., : self.length, :],
        )

    def _make(self, room: int) -> None:
        shape, dtype = self._signature.shape, self._signature.dtype
        self.keys: States = np.zeros((shape.layers, 1, shape.kv_heads, shape.head_dim, room), dtype)
        self.values: States = np.zeros((shape.layers, 1, shape.kv_heads, room, shape.head_dim), dtype)
