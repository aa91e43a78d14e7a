"""What is trained: LoRA on the language model and, if wanted, the projector; and how both are saved as one adapter."""

from __future__ import annotations

import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from saec.edge.folder import put_folder
from saec.errors import BadInput
from saec.train.config import TrainSettings
from saec.train.files import sync
from saec.vlm.adapter import save_adapter, with_adapter
from saec.vlm.load import Vlm
from saec.vlm.trained import WEIGHTS

_VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|vision_encoder|image_encoder)(\.|$)")
"""Names that the families give their vision towers."""


def add_adapter(base: Vlm, settings: TrainSettings) -> Vlm:
    """Wrap a model so that only LoRA and projector weights learn; they are float32, all else is frozen.

    Raises:
        BadInput: a pattern that matches nothing or touches the vision tower, or an adapter that does not fit.
    """
    model = base.model
    lora_modules(model, settings.lora_targets, tower=settings.adapt_tower)
    projector = projector_module(model, settings.projector) if settings.train_projector else None
    if settings.adapter is not None:
        with_adapter(base, Path(settings.adapter))  # refuses one that was made for another base or prompt
    torch.manual_seed(settings.seed)
    # No task type: the plain PeftModel passes all inputs through, whatever the model's forward takes.
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_targets,
        modules_to_save=projector and [projector],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT still asks for it
        wrapped = get_peft_model(model, config)
    if settings.gradient_checkpointing:
        _checkpoint_activations(model)
    if projector is not None:
        _train_in_float32(model.get_submodule(projector).modules_to_save["default"])
    if settings.adapter is not None:
        _load(wrapped, Path(settings.adapter))
    return replace(base, model=wrapped)


def _checkpoint_activations(model: nn.Module) -> None:
    try:
        # Not re-entrant: that one wants gradients at the input, where nothing learns.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except (AttributeError, ValueError) as error:
        raise BadInput(
            f"{type(model).__name__} cannot compute activations twice ({error})", fix="set gradient_checkpointing=false"
        ) from None


def lora_modules(model: nn.Module, pattern: str, *, tower: bool = False) -> list[str]:
    """Return the names of the modules that LoRA adapts; those of the vision tower only if ``tower`` allows it.

    Raises:
        BadInput: not a regular expression, it matches nothing, or something of the vision tower.
    """
    found = _matching(model, pattern, "lora_targets")
    stray = next((name for name in found if _VISION.search(name)), None)
    if stray is not None and not tower:
        fix = "name the language model in the pattern, or set adapt_tower"
        raise BadInput("lora_targets reaches into the vision tower", where=stray, fix=fix)
    other = next((name for name in found if not isinstance(model.get_submodule(name), nn.Linear)), None)
    if other is not None:
        raise BadInput("lora_targets matches more than linear layers", where=other)
    return found


def projector_module(model: nn.Module, pattern: str) -> str:
    """Return the name of the one module that is the projector.

    Raises:
        BadInput: none or several match, or its weights are quantised.
    """
    found = _matching(model, pattern, "projector")
    top = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(top) > 1:
        raise BadInput("several modules match the projector", where=", ".join(top), fix="make the pattern tell one")
    if not all(weight.is_floating_point() for weight in model.get_submodule(top[0]).parameters()):
        raise BadInput("the projector is quantised and cannot be trained", where=top[0], fix="set four_bit=false")
    return top[0]


def _matching(model: nn.Module, pattern: str, key: str) -> list[str]:
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise BadInput(f"not a regular expression ({error})", where=f"{key}={pattern}") from None
    found = [name for name, _ in model.named_modules() if wanted.fullmatch(name)]
    if not found:
        raise BadInput(f"no module of {type(model).__name__} matches", where=f"{key}={pattern}")
    return found


def _train_in_float32(projector: nn.Module) -> None:
    """Let the projector learn in float32 inside a bfloat16 model: steps of Adam would be lost in eight bits."""
    dtype = next(projector.parameters()).dtype
    if dtype == torch.float32:
        return
    projector.float()

    def cast(values: tuple[Any, ...], to: torch.dtype) -> tuple[Any, ...]:
        return tuple(v.to(to) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values)

    projector.register_forward_pre_hook(lambda _, inputs: cast(inputs, torch.float32))
    projector.register_forward_hook(lambda _, __, output: cast((output,), dtype)[0])


def parameter_groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """Return AdamW's groups: LoRA, and the projector with its own rate. ``peak`` is the rate before the schedule."""
    lora: list[nn.Parameter] = []
    projector: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            (projector if ".modules_to_save." in name else lora).append(weight)
    rates = ((lora, settings.lr), (projector, settings.projector_lr))
    return [{"params": weights, "lr": peak, "peak": peak} for weights, peak in rates if weights]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what learns, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def save_release(vlm: Vlm, folder: Path, *, dtype: Literal["float32", "float16"] = "float32") -> None:
    """Write the adapter folder that :func:`saec.vlm.load.load_vlm` takes, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_adapter(vlm.model, beside, vlm)
    if dtype == "float16":
        halves = {name: weight.half() for name, weight in load_file(beside / WEIGHTS).items()}
        save_file(halves, beside / WEIGHTS, metadata={"format": "pt"})
    (beside / WEIGHTS).chmod(0o644)  # safetensors leaves it to the owner, but a service may run as another user
    (beside / "README.md").unlink(missing_ok=True)  # PEFT's model card, all of whose lines ask for more information
    sync(beside)
    put_folder(beside, folder)


def _load(model: PeftModel, folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    odd = sorted(own.keys() ^ weights.keys()) or [key for key in own if own[key].shape != weights[key].shape]
    if odd:
        raise BadInput(
            f"the adapter does not fit the settings: it differs in {odd[0]}",
            where=folder,
            fix="use the rank, targets and projector it was trained with",
        )
    set_peft_model_state_dict(model, weights)
