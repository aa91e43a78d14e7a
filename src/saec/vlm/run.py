"""One forward pass of a multimodal LLM, on its own device and in its own number format."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from saec.vlm.load import Vlm


def forward(vlm: Vlm, batch: Mapping[str, torch.Tensor], *, use_cache: bool = False, **more: Any) -> Any:
    """Run the model; where its class allows, only the logits of the last position are computed."""
    if _takes_logits_to_keep(vlm.model):
        more["logits_to_keep"] = 1
    return vlm.model(**on_device(vlm, batch), use_cache=use_cache, **more)


def on_device(vlm: Vlm, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the batch where the model is, pixels in the model's number format."""
    device, dtype = vlm.device, vlm.model.dtype
    return {
        name: value.to(device, dtype if name == "pixel_values" else None, non_blocking=True)
        for name, value in batch.items()
    }


def bare(model: Any) -> Any:
    """Return the Hugging Face model inside whatever PEFT put around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _takes_logits_to_keep(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(bare(model).forward).parameters
