"""How an adapter wants to be served: as it was trained. Read from the record that lies with it; no torch.

``saec train`` writes ``run.json``, and at its end ``train.json``, into the run's folder, and a release holds a copy
beside its adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saec.config import MllmSettings
from saec.data.hashing import sha256_file
from saec.errors import BadInput
from saec.fleet.slots import current_folder
from saec.vlm.prompt import VERSION

LOUPE = "loupe"
"""Name of the model whose adapter ships with this package."""

SHIPPED = Path(__file__).parent / "loupe" / "adapter"
"""Loupe's released adapter: LoRA on the language model, the projector, parity record, and model card."""

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""What every adapter's folder holds; PEFT's names."""

ORIGIN = "saec.json"
"""Beside them in adapters of our own: base, its fingerprint, and the prompt's version."""

RUN, BEGUN = "train.json", "run.json"
"""Records of a training run, finished and begun; both hold its ``settings``."""

TRAINED_ON = "trained_on.txt"
"""Beside them: the SHA-256 of every image that trained."""

_SIZES = ("max_side", "side_multiple")


def check_adapter(folder: Path) -> None:
    """Refuse a folder that holds no adapter.

    Raises:
        BadInput: a file is missing.
    """
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise BadInput("no adapter here", where=folder, fix=f"it must hold {CONFIG} and {WEIGHTS}")


def check_origin(folder: Path, *, base: str, fingerprint: str, made_of: str) -> None:
    """Compare with what PEFT, and for adapters of our own also we, wrote about the base beside the weights.

    Args:
        folder: of the adapter.
        base: the base's name, for messages.
        fingerprint: of the base.
        made_of: name of the base's class.

    Raises:
        BadInput: made for another base, or trained with another prompt.
    """
    try:
        made_for = (read_record(folder / CONFIG).get("auto_mapping") or {}).get("base_model_class")
        own = (folder / ORIGIN).is_file()
        origin = read_record(folder / ORIGIN) if own else {}
        theirs, prompt = (origin["fingerprint"], origin["prompt"]) if own else (fingerprint, VERSION)
    except (AttributeError, KeyError) as error:
        raise BadInput(f"the adapter is damaged ({error})", where=folder) from None
    if theirs != fingerprint or made_for not in (None, made_of):
        what = f"the adapter was made for another base ({origin.get('base', made_for)}), not for this {base}"
        raise BadInput(what, where=folder, fix="use it with the checkpoint it was trained on")
    if prompt != VERSION:
        what = f"the adapter was trained with prompt {prompt}, this version asks {VERSION}"
        raise BadInput(what, where=folder, fix="train it again")


def adapter_id(folder: Path) -> str:
    """Return how an adapter is called in model ids: ``adapter:`` and the beginning of its weights' SHA-256."""
    return f"adapter:{sha256_file(folder / WEIGHTS)[:8]}"


def as_trained(settings: MllmSettings) -> MllmSettings:
    """Return the settings with what they leave open filled in: Loupe's adapter, the version of an adapter that counts,
    and the image sizes of the training.

    Raises:
        BadInput: the record beside the adapter, or its versions, are damaged.
    """
    if settings.adapter is None and settings.model == LOUPE:
        settings = settings.model_copy(update={"adapter": SHIPPED})
    if settings.adapter is not None:
        settings = settings.model_copy(update={"adapter": current_folder(settings.adapter)})
    record = None if settings.adapter is None else run_record(settings.adapter)
    if record is None:
        return settings
    trained: Mapping[str, Any] = read_record(record).get("settings", {})
    left_open = {key: trained[key] for key in _SIZES if key in trained and key not in settings.model_fields_set}
    return settings.model_copy(update=left_open)


def run_record(adapter: Path) -> Path | None:
    """Return the record of the run that wrote the adapter: beside it in a release, above it in a run's folder.

    Of a run that is not finished, or never will be, it is the one of its beginning.
    """
    places = (folder / name for folder in (adapter, adapter.parent) for name in (RUN, BEGUN))
    return next((path for path in places if path.is_file()), None)


def read_record(file: Path) -> dict[str, Any]:
    """Return a JSON record.

    Raises:
        BadInput: it cannot be read, or is no JSON object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BadInput(f"damaged record ({error})", where=file) from None
    if not isinstance(found, dict):
        raise BadInput("not a record", where=file)
    return found
