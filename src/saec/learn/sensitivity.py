"""How much a weight of an adapter matters, known without data: from the other half of its LoRA."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saec.learn.state import Tensors

_A, _B = ".lora_A.", ".lora_B."


def lora_sensitivity(tensors: Tensors) -> dict[str, NDArray[np.float32]]:
    """Return for each weight of a LoRA [its tensor's shape] how far a unit of its change moves the product B·A.

    A change of A[r, j] moves it by the norm of B's column r, one of B[i, r] by that of A's row r. Weights of no LoRA,
    such as a projector's, have no entry: they count as they are.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for name, a in tensors.items():
        if _A not in name or (b := tensors.get(other := name.replace(_A, _B))) is None:
            continue
        rows, columns = np.linalg.norm(a.astype(np.float32), axis=1), np.linalg.norm(b.astype(np.float32), axis=0)
        found[name] = np.broadcast_to(columns[:, None], a.shape)
        found[other] = np.broadcast_to(rows[None, :], b.shape)
    return found
