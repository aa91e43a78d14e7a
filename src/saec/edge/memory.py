"""The memory bank: what good parts look like, patch by patch, and how far a new part is from it.

PatchCore (Roth et al., CVPR 2022) with four changes that let a light backbone keep up:

* features are whitened (PCA with a ridge), because defects show in directions in which good parts hardly vary;
* the bank is a greedy k-centre coreset taken in the *whitened* space; random sampling loses 0.1-0.3 AUROC on parts with
  a lot of background, such as screws;
* a distance is divided by the root of the local spacing of the bank, so that a sparse corner of normality is not an
  alarm and a dense one not a blind spot (half of PatchCore's and of LOF's correction: the whole of it loses screws);
* the image score is the mean over the worst 5 % of the patches: a single worst patch is noise, the mean is blind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saec.edge.backbone import Features
from saec.types import Heatmap

Floats = NDArray[np.float32]

RIDGE = 0.1
"""Added to each eigenvalue, as a share of their mean, before whitening."""

WORST_SHARE = 0.05
BANK_SIZE = 3000
CANDIDATES = 200_000
"""The coreset is chosen among this many patches, drawn at random."""

SKETCH = 48
"""Dimensions of the random projection in which the coreset is chosen (Johnson-Lindenstrauss)."""

SPACING_NEIGHBOURS = 3
"""Bank vectors that tell how densely the bank is filled around one of them."""

_BLOCK = 512  # rows of the distance matrix that are held at once


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """A fitted bank, all float32.

    ``mean`` [C] and ``projection`` [C, C] whiten; ``bank`` [M, C] is whitened; ``weight`` [M] multiplies the distance
    to each bank vector (1 / sqrt of its spacing, with mean 1).
    """

    mean: Floats
    projection: Floats
    bank: Floats
    weight: Floats

    def distances(self, features: Features) -> Heatmap:
        """Return the weighted distance of each patch to its nearest bank vector, [rows, columns] float32."""
        rows, columns, channels = features.shape
        patches = ((features.reshape(-1, channels) - self.mean) @ self.projection).astype(np.float32, copy=False)
        squared, index = nearest(patches, self.bank)
        return np.asarray((np.sqrt(squared) * self.weight[index]).reshape(rows, columns), dtype=np.float32)

    def tensors(self) -> dict[str, Floats]:
        """Return the arrays by name, for saving."""
        return {"mean": self.mean, "projection": self.projection, "bank": self.bank, "weight": self.weight}


def image_score(distances: Heatmap) -> float:
    """Return the anomaly score of an image: the mean of the worst :data:`WORST_SHARE` of its patches, at least one."""
    flat = distances.ravel()
    count = max(1, round(WORST_SHARE * flat.size))
    return float(np.partition(flat, flat.size - count)[flat.size - count :].mean(dtype=np.float64))


def fit_memory(
    patches: Floats, *, seed: int = 0, size: int = BANK_SIZE, progress: Callable[[float], None] | None = None
) -> Memory:
    """Fit whitening and bank to patches of good parts.

    Args:
        patches: [P, C] float32 (or float16), P >= 1.
        seed: of the random draws; the same patches and seed give the same memory.
        size: patches in the bank.
        progress: called with the share of the coreset that is done.
    """
    rng = np.random.default_rng(seed)
    mean, projection = _whitening(patches)
    drawn = patches if len(patches) <= CANDIDATES else patches[np.sort(rng.permutation(len(patches))[:CANDIDATES])]
    candidates = ((drawn.astype(np.float32) - mean) @ projection).astype(np.float32, copy=False)
    bank = np.ascontiguousarray(candidates[_coreset(candidates, size, rng, progress)])
    return Memory(mean, projection, bank, _weights(bank))


def extend_memory(memory: Memory, patches: Floats, *, rows: int, most: int, seed: int, scale: float = 1.0) -> Memory:
    """Add patches of further good parts to a bank; whitening and the weights of its rows stay as they are.

    The patches are drawn at random: k-centre would take the odd ones first, and those are what a mislabelled defect
    brings. The weights of the new rows are in the units of the old, times ``scale``. Where the bank is full, random
    rows beyond the first :data:`BANK_SIZE`, which fitting filled, give way.

    Args:
        memory: is not changed.
        patches: [P, C] raw features.
        rows: added at most.
        most: rows of the whole bank at most; one that has more already keeps them.
        seed: of the draws.
        scale: below 1 where the new kind varies more than the old, so that one threshold serves both.
    """
    rng = np.random.default_rng(seed)
    size = len(memory.bank)
    kept_first = min(size, BANK_SIZE)
    count = min(rows, len(patches), max(most - kept_first, 0))
    chosen = np.sort(rng.permutation(len(patches))[:count])
    new = ((patches[chosen].astype(np.float32) - memory.mean) @ memory.projection).astype(np.float32, copy=False)
    added = min(count, max(most - size, 0))
    gone = kept_first + rng.permutation(size - kept_first)[: count - added]
    # What stays keeps its order and what is new comes last: so an update sends nothing but the new rows.
    bank = np.concatenate([np.delete(memory.bank, gone, axis=0), new[: added + len(gone)]])
    fresh = np.arange(size - len(gone), len(bank))
    weight = np.concatenate([np.delete(memory.weight, gone), np.empty(len(fresh), dtype=np.float32)])
    some = rng.permutation(size)[:_BLOCK]
    unit = np.median(memory.weight[some] / _raw_weights(memory.bank, some))
    weight[fresh] = scale * unit * _raw_weights(bank, fresh)
    return Memory(memory.mean, memory.projection, bank, weight)


def nearest(patches: Floats, bank: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """Return the squared distance of each of ``patches`` [P, C] to the nearest of ``bank`` [M, C], and its index."""
    norms = np.einsum("ij,ij->i", bank, bank)
    squared, index = np.empty(len(patches), dtype=np.float32), np.empty(len(patches), dtype=np.intp)
    for start in range(0, len(patches), _BLOCK):
        block = patches[start : start + _BLOCK]
        products = block @ bank.T
        products *= -2
        products += norms
        index[start : start + _BLOCK] = best = products.argmin(axis=1)
        squared[start : start + _BLOCK] = products[np.arange(len(block)), best] + np.einsum("ij,ij->i", block, block)
    return np.maximum(squared, 0), index


def _weights(bank: Floats) -> Floats:
    """Return 1 / sqrt of the mean distance of each bank vector to its nearest others, scaled to mean 1."""
    weight = _raw_weights(bank, np.arange(len(bank)))
    return np.asarray(weight / weight.mean(), dtype=np.float32)


def _raw_weights(bank: Floats, rows: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return 1 / sqrt of the spacing of some rows of a bank."""
    if len(bank) <= SPACING_NEIGHBOURS or not len(rows):
        return np.ones(len(rows))
    norms = np.einsum("ij,ij->i", bank, bank)
    spacing = np.empty(len(rows), dtype=np.float64)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        squared = norms[block, None] + norms - 2 * bank[block] @ bank.T
        closest = np.partition(squared, SPACING_NEIGHBOURS, axis=1)[:, : SPACING_NEIGHBOURS + 1]
        # The smallest is the vector itself.
        spacing[start : start + _BLOCK] = (closest.sum(axis=1) - closest.min(axis=1)) / SPACING_NEIGHBOURS
    spacing = np.sqrt(np.maximum(spacing, 0))
    # Copies of one patch (a flat background) have no spacing: they are held at a tenth of the typical one.
    floor = 0.1 * max(float(np.median(spacing)), 1e-6)
    return np.asarray(1 / np.sqrt(np.maximum(spacing, floor)))


def _whitening(patches: Floats) -> tuple[Floats, Floats]:
    """Return mean [C] and projection [C, C]: standardise each channel, then PCA, each axis divided by its spread."""
    wide = patches.astype(np.float64)
    mean, spread = wide.mean(axis=0), wide.std(axis=0) + 1e-6
    wide -= mean
    wide /= spread
    values, vectors = np.linalg.eigh(wide.T @ wide / len(wide))
    scale = 1 / np.sqrt(np.maximum(values, 0) + RIDGE * max(float(values.mean()), 1e-6))
    return mean.astype(np.float32), ((vectors * scale) / spread[:, None]).astype(np.float32)


def _coreset(
    points: Floats, size: int, rng: np.random.Generator, progress: Callable[[float], None] | None
) -> NDArray[np.intp]:
    """Return the rows of a greedy k-centre coreset (Gonzalez): each next point is the farthest from those chosen."""
    if len(points) <= size:
        return np.arange(len(points))
    directions = rng.standard_normal((points.shape[1], SKETCH)) / np.sqrt(SKETCH)
    sketch = points @ directions.astype(np.float32)
    norms = np.einsum("ij,ij->i", sketch, sketch)
    farthest = int(rng.integers(len(points)))
    distance = np.full(len(points), np.inf, dtype=np.float32)
    chosen = np.empty(size, dtype=np.intp)
    for number in range(size):
        chosen[number] = farthest
        to_last = sketch @ sketch[farthest]
        to_last *= -2
        to_last += norms
        to_last += norms[farthest]
        np.minimum(distance, to_last, out=distance)
        farthest = int(distance.argmax())
        if progress is not None and number % 100 == 99:
            progress((number + 1) / size)
    return chosen
