"""Refit the basis that Loupe's tokens are described in, and compare it with the shipped file.

    pip install -c constraints.txt -e ".[elpv,export]"
    saec models pull loupe
    saec data elpv runs/elpv --uncertain train
    python tools/build_token_basis.py runs/elpv

A token x, standardised as the projector does it, matters to the projector as A x, A its first linear layer times its
norm's scale. With C the covariance of tokens, the basis is

    down [K, W] = U^T A                U: the first K eigenvectors of A C A^T, the principal components of A x
    up   [K, W] = down C / variance    the linear regression of tokens on their coordinates

so that the first D coordinates lose least of what the projector makes of tokens, for every D. They are fitted to 300 of
the cells that Loupe has learnt from, the tower in float32 with its adapter merged.

Which sign an eigenvector has is the linear algebra library's choice and means nothing, and a tower rounds differently
in another runtime (PyTorch's made the shipped basis). So the file is compared by what it does; 95 % of its numbers came
out bit for bit. One core takes three minutes.

A written basis has a hash of its own, and with it the tower another name: services refuse tokens in a basis that is not
theirs. Raise ``EXPORTER`` (saec/vlm/export/source.py) with it, so that bundles with the old one are made again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from saec.data.dataset import Dataset
from saec.data.decode import read_with_hash
from saec.data.manifest import write_atomic
from saec.data.readers import read_dataset
from saec.types import Image
from saec.vlm.contract.bundle import LOWER, UPPER
from saec.vlm.edge.pixels import pixel_values
from saec.vlm.edge.session import open_graph
from saec.vlm.export.lora import read_adapter
from saec.vlm.export.source import find_source
from saec.vlm.export.tower import export_tower
from saec.vlm.loupe import TOKEN_BASIS
from saec.vlm.tokens.codec import standardised
from saec.vlm.trained import LOUPE, SHIPPED

COORDINATES = 64
IMAGES, HELD_OUT = 300, 60
SEED = 0
SHOWN = (16, 32, 64)
"""Coordinates at which the loss is told."""

SUBSPACE_LIMIT, LOSS_LIMIT = 0.01, 0.01
"""A refit is the shipped basis if no direction of the one is further than this (sine) from the other's, and it loses at
most this much more, relatively, of tokens that neither has seen."""

Floats = NDArray[np.float64]
Basis = dict[str, NDArray[np.float16]]


def drawn(data: Dataset, split: str, count: int) -> Iterator[Image]:
    """Return ``count`` images of a split, drawn by lot, the same ones every time."""
    parts = data.select(split=split).parts
    for index in np.random.default_rng(SEED).permutation(len(parts))[:count]:
        yield read_with_hash(parts[index].path)[1]


def tokens_of(images: Iterator[Image], threads: int) -> Iterator[NDArray[np.float32]]:
    """Return the standardised tokens [L, W] of each image, as Loupe's tower makes them in float32.

    They are rounded to half precision, as those were that the shipped basis was fitted to.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tower"
        tower = export_tower(find_source(LOUPE), folder, precision="float32")
        lower, upper = (open_graph(folder / file, threads=threads) for file in (LOWER, UPPER))
        ones = np.ones([int(size) for size in tower.masks.shape], np.float32)
        for image in images:
            (state,) = lower.run(None, {"pixel_values": pixel_values(image, tower.preprocess)})
            (tokens,) = upper.run(None, {"state": state, "masks": ones})
            yield standardised(tokens[0].astype(np.float16).astype(np.float32))


def what_matters() -> Floats:
    """Return A [H, W], with which the projector multiplies a standardised token, but for constants."""
    saved = read_adapter(SHIPPED).saved
    return np.asarray(saved["projector.visual.weight"] * saved["projector.norm.weight"], np.float64)


def moments(tokens: Iterator[NDArray[np.float32]]) -> tuple[Floats, Floats]:
    """Return mean [W] and covariance [W, W] of tokens that come a few at a time."""
    count, total, squares = 0, np.zeros(0), np.zeros((0, 0))
    for each in tokens:
        x = each.astype(np.float64)
        if not count:
            total, squares = np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
        count, total = count + len(x), total + x.sum(axis=0)
        squares += x.T @ x
    mean = total / count
    return mean, squares / count - np.outer(mean, mean)


def fitted(mean: Floats, covariance: Floats, a: Floats) -> Basis:
    """Return the basis of tokens with these moments for a projector that multiplies them with ``a``."""
    _, vectors = np.linalg.eigh(a @ covariance @ a.T)
    down = vectors[:, ::-1][:, :COORDINATES].T @ a
    shared = down @ covariance
    up = shared / (shared * down).sum(axis=1, keepdims=True)
    return {"mean": mean.astype(np.float16), "down": down.astype(np.float16), "up": up.astype(np.float16)}


def losses(basis: Basis, tokens: Sequence[NDArray[np.float32]], a: Floats) -> list[float]:
    """Return which share of the variance of A x is lost with the first D coordinates, for each D of ``SHOWN``."""
    x = np.concatenate(tokens).astype(np.float64)
    mean, down, up = (basis[name].astype(np.float64) for name in ("mean", "down", "up"))
    seen = (x - x.mean(axis=0)) @ a.T
    lost = [(x - mean - ((x - mean) @ down[:d].T) @ up[:d]) @ a.T for d in SHOWN]
    return [float((each**2).sum() / (seen**2).sum()) for each in lost]


def apart(one: Basis, other: Basis, name: str) -> float:
    """Return the sine of the largest angle between what two bases' rows span."""
    q, r = (np.linalg.qr(each[name].astype(np.float64).T)[0] for each in (one, other))
    return float(np.linalg.norm(q - r @ (r.T @ q), ord=2))


def products(one: Basis, other: Basis, name: str) -> Floats:
    """Return the product of each row of the one with that of the other: negative where they have other signs."""
    return np.asarray((one[name].astype(np.float64) * other[name]).sum(axis=1))


def rows_apart(one: Basis, other: Basis, name: str) -> Floats:
    """Return for each row by how much it differs, relatively, its sign apart."""
    x, y = one[name].astype(np.float64), other[name].astype(np.float64)
    signs = np.sign(products(one, other, name))[:, None]
    return np.asarray(np.linalg.norm(x - signs * y, axis=1) / np.linalg.norm(y, axis=1))


def compared(found: Basis, held: Sequence[NDArray[np.float32]], a: Floats) -> bool:
    """Print how the refit differs from the shipped basis; return whether it is the same but for rounding."""
    shipped: Basis = load_file(TOKEN_BASIS)
    equal = np.concatenate([(found[name] == shipped[name]).ravel() for name in shipped])
    turned = (products(found, shipped, "down") < 0).sum()
    print(f"equal bit for bit: {equal.mean():.1%} of the numbers; other signs: {turned} of {COORDINATES} rows")
    for name in ("down", "up"):
        rows = rows_apart(found, shipped, name)
        space = apart(found, shipped, name)
        print(f"{name}: subspaces apart by {space:.1e} (sine), rows by {np.median(rows):.1e}, at most {rows.max():.1e}")
    new, old = losses(found, held, a), losses(shipped, held, a)
    for d, ours, theirs in zip(SHOWN, new, old, strict=True):
        print(f"lost of A x with {d} coordinates, {len(held)} test cells: refit {ours:.5f}, shipped {theirs:.5f}")
    same_space = max(apart(found, shipped, name) for name in ("down", "up")) <= SUBSPACE_LIMIT
    return same_space and all(ours <= theirs * (1 + LOSS_LIMIT) for ours, theirs in zip(new, old, strict=True))


def main() -> None:
    """Refit; write the file with ``--write``, else compare, and exit with 1 if it is another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder that saec data elpv --uncertain train made")
    parser.add_argument("--threads", type=int, default=1, help="of the tower (1)")
    parser.add_argument("--write", action="store_true", help="replace the shipped file")
    asked = parser.parse_args()
    data, a = read_dataset(asked.data), what_matters()
    found = fitted(*moments(tokens_of(drawn(data, "train", IMAGES), asked.threads)), a)
    if asked.write:
        write_atomic(TOKEN_BASIS, save(found))
        print(f"wrote {TOKEN_BASIS.name}: {TOKEN_BASIS.stat().st_size:,} bytes")
    elif not compared(found, list(tokens_of(drawn(data, "test", HELD_OUT), asked.threads)), a):
        raise SystemExit("the refitted basis is another than the shipped one")
    else:
        print("the shipped basis, but for rounding")


if __name__ == "__main__":
    main()
