"""A tower on the edge: from an image to the few tokens of it that go up. ONNX Runtime and NumPy alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from saec.config import Settings, TokenSettings
from saec.types import Image, Tokens
from saec.vlm.contract.bundle import BASIS, LOWER, UPPER, Tower, read_tower
from saec.vlm.edge.pixels import pixel_values
from saec.vlm.edge.session import open_graph
from saec.vlm.export.ready import ready_tower
from saec.vlm.tokens.codec import Array, Basis, quantised
from saec.vlm.tokens.uncertainty import dispersion, dropout_masks, grey_entropy, most_uncertain


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """What the lower half saw in one image: ``state`` [1, P, C], ``pixels`` [1, 3, S, S], and their hash."""

    pixels: Array
    state: Array
    seed: bytes


class TowerTokeniser:
    """Makes tokens of images; see :class:`saec.types.Tokeniser`. Thread-safe.

    Nothing depends on what else is under way: dropout is seeded by each image's own pixels.
    """

    def __init__(
        self, record: Tower, lower: ort.InferenceSession, upper: ort.InferenceSession, basis: Basis, how: TokenSettings
    ) -> None:
        self.model_id, self.record, self.basis = record.model_id, record, basis
        self._lower, self._upper, self._how = lower, upper, how
        self._ones: Array = np.ones([int(size) for size in record.masks.shape], np.float32)

    @classmethod
    def load(cls, settings: Settings) -> Self:
        """Load the tower of ``settings.tokens``, exported at its first use.

        Raises:
            BadInput: no such model, one that is not pulled or has no tower to take apart, or damaged files.
        """
        how, threads = settings.tokens, settings.edge.threads
        folder = ready_tower(how.model, how.adapter)
        record = read_tower(folder)
        lower, upper = (open_graph(folder / file, threads=threads) for file in (LOWER, UPPER))
        return cls(record, lower, upper, Basis.load(folder / BASIS), how)

    def choosing(self, how: TokenSettings) -> Self:
        """Return the same tower under other settings."""
        twin = copy(self)
        twin._how = how
        return twin

    def tokens(self, image: Image) -> Tokens:
        """Return the most uncertain tokens of an image [H, W, 3] BGR of any size."""
        sight = self.see(image)
        tokens = self.plain(sight)
        # Where all of them go, nothing has to be chosen.
        return self.chosen(tokens, np.zeros(len(tokens)) if self._how.ratio == 1 else self.uncertainty(sight))

    def see(self, image: Image) -> Sight:
        """Look at an image with the lower half."""
        pixels = pixel_values(image, self.record.preprocess)
        (state,) = self._lower.run(None, {"pixel_values": pixels})
        return Sight(pixels, state, hashlib.sha256(pixels.tobytes()).digest())

    def plain(self, sight: Sight, masks: Array | None = None) -> Array:
        """Return all tokens [L, W], as the whole tower makes them where there are no masks."""
        (found,) = self._upper.run(None, {"state": sight.state, "masks": self._ones if masks is None else masks})
        return np.asarray(found[0])

    def passes(self, sight: Sight) -> Iterator[Array]:
        """Return the tokens [L, W] of each pass with dropout."""
        for number in range(self._how.passes):
            seed = sight.seed + number.to_bytes(4, "big")
            yield self.plain(sight, dropout_masks(self._ones.shape, self._how.dropout, seed))

    def uncertainty(self, sight: Sight) -> NDArray[np.float64]:
        """Return how unsure the tower is of each token [L]; only their order means something."""
        if self._how.choose == "dropout":
            return dispersion(self.passes(sight))
        how = self.record.preprocess
        colours = np.array(how.std)[:, None, None] * sight.pixels[0] + np.array(how.mean)[:, None, None]
        return grey_entropy(colours.mean(axis=0), round(int(self.record.tokens.shape[1]) ** 0.5))

    def chosen(self, tokens: Array, uncertainty: NDArray[np.float64]) -> Tokens:
        """Return the most uncertain of tokens [L, W], as they go up."""
        how = self._how
        indices = most_uncertain(uncertainty, how.ratio)
        levels, scale = quantised(self.basis.coordinates(tokens[indices], how.dims), how.bits)
        return Tokens(levels, scale, indices, len(tokens), self.model_id)
