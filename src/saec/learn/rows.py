"""Tables that grow and shrink by whole rows, such as a memory bank: which rows stay, and new ones in 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saec.errors import BadInput


def kept_rows(base: NDArray[Any], new: NDArray[Any]) -> NDArray[np.int64]:
    """Return the rows of ``base`` with which ``new`` begins, in their order."""
    places: dict[bytes, list[int]] = {}
    for number in range(len(base) - 1, -1, -1):
        places.setdefault(base[number].tobytes(), []).append(number)
    kept: list[int] = []
    for row in new:
        known = places.get(row.tobytes(), [])
        while known and kept and known[-1] <= kept[-1]:
            known.pop()
        if not known:
            break
        kept.append(known.pop())
    return np.array(kept, dtype=np.int64)


def scaled(rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return what is sent of new rows: tables of floats as codes and scales, all else as it is.

    Raises:
        BadInput: values of a table that are not finite.
    """
    if rows.ndim < 2 or rows.dtype.kind != "f":
        return {"/rows": rows}
    require_finite(rows)
    scale = np.abs(rows.astype(np.float32)).max(axis=0, initial=0) / np.float32(127)
    codes = np.divide(rows.astype(np.float32), scale, out=np.zeros(rows.shape, np.float32), where=scale > 0)
    return {"/rows": np.round(codes).astype(np.int8), "/scale": scale}


def require_finite(values: NDArray[Any]) -> None:
    """Refuse weights that cannot be quantised.

    Raises:
        BadInput: there are some.
    """
    if not np.isfinite(values).all():
        raise BadInput("the taught state has weights that are no numbers", fix="teach again")
