"""How an adapter wants to be served: as it was trained. Read from the record that lies with it; no torch.

``saec train`` writes ``train.json`` into the run's folder, and a release holds a copy beside its adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from saec.config import MllmSettings
from saec.errors import BadInput

LOUPE = "loupe"
"""Name of the model whose adapter ships with this package."""

SHIPPED = Path(str(files("saec.vlm.loupe"))) / "adapter"
"""Loupe's released adapter: LoRA on the language model, the projector, parity record, and model card."""

RUN = "train.json"
TRAINED_ON = "trained_on.txt"
"""Beside it: the SHA-256 of every image that trained."""

_SIZES = ("max_side", "side_multiple")


def as_trained(settings: MllmSettings) -> MllmSettings:
    """Return the settings with what they leave open filled in: Loupe's adapter, and the image sizes of the training.

    Raises:
        BadInput: the record beside the adapter is damaged.
    """
    if settings.adapter is None and settings.model == LOUPE:
        settings = settings.model_copy(update={"adapter": SHIPPED})
    record = None if settings.adapter is None else run_record(settings.adapter)
    if record is None:
        return settings
    trained: Mapping[str, Any] = read_record(record).get("settings", {})
    left_open = {key: trained[key] for key in _SIZES if key in trained and key not in settings.model_fields_set}
    return settings.model_copy(update=left_open)


def run_record(adapter: Path) -> Path | None:
    """Return ``train.json`` of the run that wrote the adapter: beside it in a release, above it in a run's folder."""
    return next((path for path in (adapter / RUN, adapter.parent / RUN) if path.is_file()), None)


def read_record(file: Path) -> dict[str, Any]:
    """Return a JSON record.

    Raises:
        BadInput: it cannot be read, or is no JSON object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BadInput(f"cannot read the record ({error})", where=file) from None
    if not isinstance(found, dict):
        raise BadInput("not a record", where=file)
    return found
