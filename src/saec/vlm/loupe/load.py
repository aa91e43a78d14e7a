"""Loading Loupe's pulled parts as the torch model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from saec.config import MllmSettings
from saec.data.hashing import sha256_json
from saec.errors import BadInput
from saec.vlm.gguf import LlamaGguf
from saec.vlm.loupe import LANGUAGE_FILE, TOWER_FILE
from saec.vlm.loupe.encode import LoupeEncoder
from saec.vlm.loupe.parts import assemble
from saec.vlm.registry import ModelFiles, entry

if TYPE_CHECKING:
    from saec.vlm.load import Vlm


def load_loupe(found: ModelFiles, settings: MllmSettings) -> Vlm:
    """Return Loupe without an adapter: its projector is untrained, it can be fine-tuned but not asked.

    Raises:
        BadInput: damaged files, or settings that this model does not have (4 bit, a GPU that is not there).
    """
    # vlm.load takes this room's families from here.
    from saec.vlm.load import Vlm, pick_device

    if settings.four_bit:
        raise BadInput("loupe is not loaded in 4 bit", where="mllm.four_bit", fix="set it to false: it is 0.6 GB")
    device = pick_device(settings.device)
    dtype = torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    tower, language = found.files[TOWER_FILE], found.files[LANGUAGE_FILE]
    gguf = LlamaGguf(language)
    model = assemble(tower, gguf, dtype=dtype, attention=settings.attention).to(device)
    parts = {file.path: file.sha256 for file in entry("loupe").files}
    return Vlm(model, LoupeEncoder(gguf.tokenizer(), model.config), "loupe", fingerprint=sha256_json(parts))
