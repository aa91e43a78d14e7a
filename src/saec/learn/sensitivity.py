"""How much each weight of an adapter matters: from the gradients of its own training.

Adam moves all weights by about as much, however little they matter, so the largest changes are not those that count: of
an adapter for ELPV, 79 % of the change's squared norm lay in the projector, and 77 % of its effect on the answers in
the tower's second LoRA halves. The optimiser's second moment is the mean square of a weight's gradient, the diagonal
of the empirical Fisher information, and lies in every checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from saec.errors import BadInput

_MOMENT = "|exp_avg_sq"


def training_sensitivity(adapter: Path) -> dict[str, NDArray[np.float32]]:
    """Return the root mean square gradient of each weight of an adapter in the folder of its training run.

    It is read from the run's last checkpoint; of an adapter that lies elsewhere nothing is known, and nothing returned.

    Raises:
        BadInput: the checkpoint is damaged.
    """
    files = sorted(adapter.resolve().parent.glob("checkpoints/step-*/optimizer.safetensors"))
    if not files:
        return {}
    try:
        moments = load_file(files[-1])
    except (OSError, SafetensorError) as error:
        fix = "remove the run's checkpoints, and the largest changes are sent"
        raise BadInput(f"the checkpoint is damaged ({error})", where=files[-1], fix=fix) from None
    return {_peft(name): np.sqrt(value) for name, value in moments.items() if name.endswith(_MOMENT)}


def _peft(name: str) -> str:
    """Return the name that PEFT saves a weight under."""
    return name.removesuffix(_MOMENT).replace(".default", "").replace(".modules_to_save", "")
