"""Loading a multimodal LLM from a checkpoint folder: weights, number format, 4 bit, adapter, encoder.

Nothing is swallowed: weights that are missing, an adapter for another base or a 4-bit load that fails are errors
(SAEC §7 lists what comes of the opposite).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from saec.config import MllmSettings
from saec.errors import BadInput
from saec.vlm.encode import Encoder, ProcessorEncoder
from saec.vlm.fingerprint import fingerprint
from saec.vlm.processors import load_processor, model_type
from saec.vlm.prompt import VERSION
from saec.vlm.registry import resolve

LOADING = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError)
"""What loading a damaged or unfit model ends in: the libraries have no error of their own for it."""


@dataclass(slots=True, eq=False)
class Vlm:
    """A model that can be asked. ``model`` is in evaluation mode; ``fingerprint`` tells base checkpoints apart.

    ``adapter_id`` is ``adapter:`` and the beginning of the SHA-256 of the adapter's weights, or ``None``; ``base`` is
    then the model without the adapter, where it shares its weights with this one.
    """

    model: Any
    encoder: Encoder
    base_id: str
    adapter_id: str | None = None
    fingerprint: str = ""
    base: Vlm | None = None

    @property
    def model_id(self) -> str:
        """Name base, adapter and prompt, such as ``qwen2.5-vl-7b+adapter:1a2b3c4d+p2``."""
        return "+".join(filter(None, (self.base_id, self.adapter_id, VERSION)))

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return torch.device(next(self.model.parameters()).device)


def load_vlm(settings: MllmSettings, *, base: Vlm | None = None) -> Vlm:
    """Return the model that the settings name, with their adapter.

    ``base`` is the same model without an adapter, if it is loaded already: its weights are then shared, and it stays
    usable as it is.

    Raises:
        BadInput: no such model, one that does not load as asked, or an adapter that was made for another base.
    """
    from saec.vlm.adapter import with_adapter

    bare = base or _bare(settings)
    return bare if settings.adapter is None else with_adapter(bare, settings.adapter)


def _bare(settings: MllmSettings) -> Vlm:
    files = resolve(settings.model)
    if files.family == "loupe":
        from saec.vlm.loupe.load import load_loupe

        return load_loupe(files, settings)
    return _load_base(files.folder, settings)


def _load_base(folder: Path, settings: MllmSettings) -> Vlm:
    encoder = ProcessorEncoder(load_processor(folder))
    model = _load_model(folder, settings)
    name = folder.resolve().name + ("@nf4" if settings.four_bit else "")
    return Vlm(model, encoder, name, fingerprint=fingerprint(folder))


def _load_model(folder: Path, settings: MllmSettings) -> Any:
    device = pick_device(settings.device)
    how: dict[str, Any] = {"attn_implementation": settings.attention, "dtype": _dtype(settings, device)}
    if settings.four_bit:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if settings.four_bit or device.type != "cpu":
        how["device_map"] = {"": device}
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **how
        )
    except LOADING as error:
        in_4_bit = " in 4 bit" if settings.four_bit else ""
        what = f"the {model_type(folder)} model cannot be loaded{in_4_bit} ({_brief(error)})"
        raise BadInput(what, where=folder, fix="check the checkpoint's files and the settings of mllm") from error
    lacking = [*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])]
    if lacking:
        what = f"the checkpoint lacks {len(lacking)} of the model's weights, such as {sorted(lacking)[0]}"
        raise BadInput(what, where=folder)
    if settings.four_bit:
        _keep_nf4_layout(model)
    return model.eval()


def pick_device(wanted: str) -> torch.device:
    """Return the device that ``mllm.device`` means.

    Raises:
        BadInput: a GPU is wanted and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise BadInput("there is no GPU that PyTorch can use", where="mllm.device", fix="set it to auto or cpu")
    return torch.device("cuda" if has_gpu and wanted != "cpu" else "cpu")


def _dtype(settings: MllmSettings, device: torch.device) -> str:
    if settings.dtype != "auto":
        return settings.dtype
    if settings.four_bit:
        return "bfloat16"
    return "float32" if device.type == "cpu" else "auto"


def _keep_nf4_layout(model: Any) -> None:
    # On CPUs with AVX512-BF16 bitsandbytes re-packs the weights at the first forward in evaluation mode. Such weights
    # can no longer be trained, nor shared with a second adapter.
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
