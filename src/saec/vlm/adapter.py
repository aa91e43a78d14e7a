"""LoRA adapters: attaching one to a loaded base, and saving one so that it only ever meets the base it was made for.

ADAPTER/adapter_config.json, adapter_model.safetensors     as PEFT writes them
        saec.json                                          base, its fingerprint, and the prompt's version
"""

from __future__ import annotations

import copy
import json
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from saec.data.hashing import sha256_file
from saec.data.manifest import write_atomic
from saec.errors import BadInput
from saec.vlm.load import LOADING, Vlm
from saec.vlm.prompt import VERSION
from saec.vlm.trained import CONFIG, WEIGHTS, check_adapter, read_record

ORIGIN = "saec.json"


def with_adapter(base: Vlm, folder: Path) -> Vlm:
    """Return the base with an adapter, sharing its weights; ``base`` itself stays as it is and usable meanwhile.

    Raises:
        BadInput: no adapter there, or one whose weights do not fit the base one by one.
    """
    check_adapter(folder)
    _check_origin(base, folder)
    try:
        with warnings.catch_warnings():
            # PEFT only warns of weights that are missing; all of them are compared below.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
            model = PeftModel.from_pretrained(_sharing_weights(base.model), folder, autocast_adapter_dtype=False)
        saved = load_file(folder / WEIGHTS)
    except LOADING as error:
        what = f"the adapter does not fit {base.base_id} ({' '.join(str(error).split())[:300]})"
        raise BadInput(what, where=folder, fix="use the adapter with the base it was trained on") from error
    _check_weights(model, saved, base, folder)
    adapter_id = f"adapter:{sha256_file(folder / WEIGHTS)[:8]}"
    return Vlm(model.eval(), base.encoder, base.base_id, adapter_id, base.fingerprint, base)


def save_adapter(model: Any, folder: Path, base: Vlm) -> None:
    """Write a trained :class:`peft.PeftModel` so that :func:`with_adapter` finds it again.

    Raises:
        OSError: the folder cannot be written.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = base.base_id  # the base's own path says nothing elsewhere
    model.save_pretrained(folder, save_embedding_layers=False)
    origin = {"base": base.base_id, "fingerprint": base.fingerprint, "prompt": VERSION}
    write_atomic(folder / ORIGIN, json.dumps(origin, indent=1) + "\n")


def _check_origin(base: Vlm, folder: Path) -> None:
    """Compare with what PEFT, and for adapters of our own also we, wrote about the base beside the weights."""
    try:
        made_for = (read_record(folder / CONFIG).get("auto_mapping") or {}).get("base_model_class")
        own = (folder / ORIGIN).is_file()
        origin = read_record(folder / ORIGIN) if own else {}
        theirs, prompt = (origin["fingerprint"], origin["prompt"]) if own else (base.fingerprint, VERSION)
    except (AttributeError, KeyError) as error:
        raise BadInput(f"the adapter is damaged ({error})", where=folder) from None
    if theirs != base.fingerprint or made_for not in (None, type(base.model).__name__):
        what = f"the adapter was made for another base ({origin.get('base', made_for)}), not for this {base.base_id}"
        raise BadInput(what, where=folder, fix="use it with the checkpoint it was trained on")
    if prompt != VERSION:
        what = f"the adapter was trained with prompt {prompt}, this version asks {VERSION}"
        raise BadInput(what, where=folder, fix="train it again")


def _check_weights(model: Any, saved: dict[str, torch.Tensor], base: Vlm, folder: Path) -> None:
    wanted = {
        name: tuple(value.shape)
        for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    found = {name: tuple(value.shape) for name, value in saved.items()}
    if wanted != found:
        odd = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        what = f"the adapter was made for another base than {base.base_id}: {len(odd)} weights differ, such as {odd[0]}"
        raise BadInput(what, where=folder, fix="use the adapter with the base it was trained on")


def _sharing_weights(model: Any) -> Any:
    """Return a copy of the modules around the very same tensors: PEFT then wraps the copy's modules only."""
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, tensors)
