"""What changed between two states, small (DWC of CD-CCA): select, quantise, encode sparsely; decoding is bit-exact.

Each tensor goes one of these ways, whichever fits first:

* *same*: nothing is sent;
* *rows*: rows of the base, perhaps some dropped, and new rows after them, as a memory bank grows: tables of floats at
  8 bits a value with a scale for each column (columns of pooled features differ in size by orders of magnitude, and a
  scale for each row loses the small ones), all else exact;
* *sparse*: floats of the same shape, where a share to keep is given: the chosen changes of all such tensors together;
* *dense*: exact, for whatever is new, small, or of another shape.

What a sparse delta leaves out is not lost: whoever goes on training from the exact state and compresses against what
the device has sends it when it has grown (error feedback, Karimireddy et al., ICML 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saec.learn.rows import kept_rows, require_finite, scaled
from saec.learn.sparse import Floats, Positions, changes_of, packed, quantised, unpacked, unzipped, zipped
from saec.learn.state import State, Tensors

SMALL = 256
"""Tensors of fewer values are sent exact."""

KEEPS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 1.0)
"""Shares that :func:`fit_keep` tries, from the smallest on."""

_POSITIONS, _CODES, _SCALES = "sparse/positions", "sparse/codes", "sparse/scales"


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """``header`` is JSON: ``ways`` (dense, rows or gone, by tensor), ``document`` (JSON files that changed or went),
    ``sparse`` (entries, way of the positions, gain, left_out, norm), ``error``; ``arrays`` hold the rest."""

    header: Mapping[str, Any]
    arrays: Tensors

    @property
    def error(self) -> float:
        """The largest difference of any value that was sent from the value that was meant."""
        return float(self.header["error"])

    def apply(self, base: State) -> State:
        """Return the new state. The same bytes on every machine.

        Raises:
            ValueError: it does not fit the base, or is damaged.
        """
        ways: Mapping[str, str] = self.header["ways"]
        tensors = {name: value for name, value in base.tensors.items() if ways.get(name) != "gone"}
        try:
            tensors |= {name: self.arrays[name] for name, way in ways.items() if way == "dense"}
            tensors |= {name: self._rows(name, base.tensors[name]) for name, way in ways.items() if way == "rows"}
            if self.header["sparse"] is not None:
                tensors |= self._sparse(base.tensors, *self._entries(base.tensors))
            document = {
                key: value for key, value in base.document.items() if key not in self.header["document"]["gone"]
            }
            return State(tensors, document | dict(self.header["document"]["set"]))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"the change does not fit its base ({type(error).__name__}: {error})") from None

    def _rows(self, name: str, base: NDArray[Any]) -> NDArray[Any]:
        kept = np.delete(base, self.arrays[f"{name}/dropped"], axis=0)
        added = self.arrays[f"{name}/rows"]
        scale = self.arrays.get(f"{name}/scale")
        for found in (added.shape[1:], *([] if scale is None else [scale.shape])):  # else they would be broadcast
            if found != base.shape[1:]:
                raise ValueError(f"rows of another shape than those of {name}")
        if scale is not None:
            added = added.astype(np.float32) * scale
        return np.concatenate([kept, added.astype(base.dtype)])

    def _entries(self, base: Tensors) -> tuple[list[str], Positions]:
        """Return the tensors that sparse changes may be in, and where in all of them together the changes are."""
        names = _sparse_names(base, self.header["ways"])
        total = sum(base[name].size for name in names)
        sparse = self.header["sparse"]
        return names, unpacked(sparse["way"], self.arrays[_POSITIONS], sparse["entries"], total)

    def _sparse(self, base: Tensors, names: Sequence[str], positions: Positions) -> dict[str, NDArray[Any]]:
        codes, scales = unzipped(self.arrays[_CODES], len(positions)), iter(self.arrays[_SCALES])
        if len(codes) != len(positions):
            raise ValueError("fewer changes than positions")
        if self.arrays[_SCALES].shape != (sum(1 for _ in _by_tensor(base, names, positions)), 2):
            raise ValueError("not one scale for each tensor that changed")
        changed = {}
        for name, inside, at in _by_tensor(base, names, positions):
            value = base[name].astype(np.float32).ravel()
            value[inside] += changes_of(codes[at], next(scales))
            changed[name] = value.astype(base[name].dtype).reshape(base[name].shape)
        return changed


def compress(
    base: State,
    new: State,
    *,
    keep: float | None = None,
    threshold: float = 0.0,
    bits: int = 8,
    gain: float = 1.0,
    sensitivity: Tensors | None = None,
) -> Delta:
    """Return the change from ``base`` to ``new``.

    Args:
        base: what the device has, bit for bit.
        new: what it should have.
        keep: share (0, 1] of the changed weights that is sent, the most important ones; ``None``: tensors that
            changed are sent whole and exact.
        threshold: importance below which a change is left out as well.
        bits: of a sparse change, 2 to 8.
        gain: what sparse changes are multiplied by, in place of those that are left out; see :mod:`saec.learn.gain`.
        sensitivity: importance is |change|, times these weights [same shape] where a tensor has some.

    Raises:
        BadInput: a value of ``new`` that would be quantised is not finite.
    """
    ways: dict[str, str] = dict.fromkeys(base.tensors.keys() - new.tensors.keys(), "gone")
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in new.tensors.items():
        way, parts = _whole(base.tensors.get(name), value, sparse=keep is not None)
        arrays |= {name + key: array for key, array in parts.items()}
        ways |= {name: way} if way else {}
    document = {
        "set": {key: value for key, value in new.document.items() if base.document.get(key) != value},
        "gone": sorted(base.document.keys() - new.document.keys()),
    }
    sparse = None
    if keep is not None:
        names = _sparse_names(base.tensors, ways)
        entries, chosen = _chosen(base.tensors, new.tensors, names, keep, threshold, bits, gain, sensitivity or {})
        arrays |= chosen
        sparse = entries
    delta = Delta({"ways": ways, "document": document, "sparse": sparse, "error": 0.0}, arrays)
    return replace(delta, header={**delta.header, **_figures(delta, base, new)})


def fit_keep(
    base: State,
    new: State,
    make: Callable[[float], Delta],
    loss_of: Callable[[State], float],
    *,
    most: float,
    keeps: Iterable[float] = KEEPS,
) -> tuple[float, Delta]:
    """Return the smallest share whose decoded state loses at most ``most`` against ``new``, and the delta.

    ``make`` compresses to a share; ``loss_of`` gives a state's loss, such as the share of wrong answers on the
    validation set. The last of ``keeps`` is taken where none is good enough.
    """
    limit = loss_of(new) + most
    for keep in keeps:
        delta = make(keep)
        if loss_of(delta.apply(base)) <= limit:
            break
    return keep, delta


# -- one tensor


def _whole(base: NDArray[Any] | None, new: NDArray[Any], *, sparse: bool) -> tuple[str, dict[str, NDArray[Any]]]:
    """Return the way of a tensor that is not left to the sparse changes, and what is sent; no way: nothing is."""
    if base is not None and base.dtype == new.dtype and base.shape == new.shape and base.tobytes() == new.tobytes():
        return "", {}
    if base is not None and sparse and base.shape == new.shape and _is_sparse(base):
        return "", {}
    if base is not None and base.dtype == new.dtype and base.ndim and base.shape[1:] == new.shape[1:]:
        kept = kept_rows(base, new)
        if len(kept):
            dropped = np.setdiff1d(np.arange(len(base)), kept)
            return "rows", {"/dropped": dropped.astype(np.int32), **scaled(new[len(kept) :])}
    return "dense", {"": new}


# -- all sparse tensors together


def _is_sparse(value: NDArray[Any]) -> bool:
    return value.dtype.kind == "f" and value.size >= SMALL


def _sparse_names(base: Tensors, ways: Mapping[str, str]) -> list[str]:
    return [name for name in sorted(base) if name not in ways and _is_sparse(base[name])]


def _by_tensor(base: Tensors, names: Sequence[str], positions: Positions) -> Iterable[tuple[str, Positions, slice]]:
    """Yield each tensor that has entries, their places inside it, and which of ``positions`` they are."""
    ends = np.cumsum([base[name].size for name in names])
    bounds = np.concatenate([[0], np.searchsorted(positions, ends)])
    for number, name in enumerate(names):
        at = slice(int(bounds[number]), int(bounds[number + 1]))
        if at.start < at.stop:
            yield name, positions[at] - (ends[number] - base[name].size), at


def _difference(base: NDArray[Any], new: NDArray[Any]) -> Floats:
    return (new.astype(np.float32) - base.astype(np.float32)).ravel()


def _chosen(
    base: Tensors,
    new: Tensors,
    names: Sequence[str],
    keep: float,
    threshold: float,
    bits: int,
    gain: float,
    sensitivity: Tensors,
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return entries and way of the positions, and the arrays: the most important changes of all these tensors."""
    changes = np.concatenate([np.zeros(0, np.float32), *(_difference(base[name], new[name]) for name in names)])
    require_finite(changes)
    weights = [
        np.abs(_difference(base[name], new[name])) * np.asarray(sensitivity.get(name, 1.0), dtype=np.float32).ravel()
        for name in names
    ]
    importance = np.concatenate([np.zeros(0, np.float32), *weights])
    importance[changes == 0] = 0
    wanted = min(int(np.ceil(keep * np.count_nonzero(changes))), int(np.count_nonzero(importance > threshold)))
    positions = np.sort(np.argsort(-importance, kind="stable")[:wanted])
    louder = changes * np.float32(gain)
    coded = [quantised(louder[positions[at]], bits) for _, _, at in _by_tensor(base, names, positions)]
    way, places = packed(positions, len(changes))
    arrays: dict[str, NDArray[Any]] = {
        _POSITIONS: places,
        _CODES: zipped(np.concatenate([np.zeros(0, np.uint8), *(codes for codes, _ in coded)])),
        _SCALES: np.array([scale for _, scale in coded], dtype=np.float32).reshape(-1, 2),
    }
    return {"entries": wanted, "way": way, "gain": gain}, arrays


def _figures(delta: Delta, base: State, new: State) -> dict[str, Any]:
    """Return the header's figures, measured on the decoded state.

    ``error`` is over all values that were sent, from what was meant: the change, times the gain. Of the sparse tensors,
    ``left_out`` is the largest change that was not sent, and ``norm`` the share of the change's squared norm that was.
    """
    decoded = delta.apply(base)
    grown = (name for name, way in delta.header["ways"].items() if way == "rows")
    error = max((float(np.nanmax(_apart(decoded, new, name), initial=0)) for name in grown), default=0.0)
    if delta.header["sparse"] is None:
        return {"error": error}
    names, positions = delta._entries(base.tensors)
    gain = delta.header["sparse"]["gain"]
    left_out = wanted = missing = 0.0
    inside = {name: at for name, at, _ in _by_tensor(base.tensors, names, positions)}
    for name in names:
        change, sent = _change(base, new, name), _change(base, decoded, name)
        at = inside.get(name, np.zeros(0, dtype=np.int64))
        wanted += float(np.square(change).sum())
        error = max(error, float(np.abs(sent - gain * change)[at].max(initial=0)))
        change[at] = 0
        missing += float(np.square(change).sum())
        left_out = max(left_out, float(np.abs(change).max(initial=0)))
    norm = 1 - missing / wanted if wanted else 1.0
    return {"error": error, "sparse": {**delta.header["sparse"], "left_out": left_out, "norm": norm}}


def _apart(one: State, other: State, name: str) -> NDArray[np.float64]:
    return np.abs(_change(one, other, name))


def _change(one: State, other: State, name: str) -> NDArray[np.float64]:
    difference = other.tensors[name].astype(np.float64) - one.tensors[name].astype(np.float64)
    return np.asarray(difference.ravel(), dtype=np.float64)
