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

from saec.data.manifest import write_atomic
from saec.errors import BadInput
from saec.vlm.load import LOADING, Vlm
from saec.vlm.prompt import VERSION
from saec.vlm.trained import ORIGIN, WEIGHTS, adapter_id, check_adapter, check_origin


def with_adapter(base: Vlm, folder: Path) -> Vlm:
    """Return the base with an adapter, sharing its weights; ``base`` itself stays as it is and usable meanwhile.

    Raises:
        BadInput: no adapter there, or one whose weights do not fit the base one by one.
    """
    check_adapter(folder)
    check_origin(folder, base=base.base_id, fingerprint=base.fingerprint, made_of=type(base.model).__name__)
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
    return Vlm(model.eval(), base.encoder, base.base_id, adapter_id(folder), base.fingerprint, base)


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
