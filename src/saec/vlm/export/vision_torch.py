"""FastVLM's vision graph. Its tower, FastViTHD, is timm's: traced with PyTorch, where both are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from saec.config import MllmSettings
from saec.errors import BadInput
from saec.vlm.contract.bundle import Precision, Vision
from saec.vlm.contract.signature import TensorSpec
from saec.vlm.export.graph import OPSET
from saec.vlm.export.hf_files import read_preprocess

_NEEDED = ("torch", "transformers", "peft", "timm", "torchvision")
_OPSET = min(OPSET, 20)  # the newest that PyTorch's tracing exporter knows


def fastvlm_vision(folder: Path, adapter: Path | None, precision: Precision, file: Path) -> Vision:
    """Write the graph from ``pixel_values`` [1, 3, S, S] to ``image_embeds`` [1, T, H], in float32 for all precisions.

    Raises:
        BadInput: a package is missing, or the model does not load.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        what = f"FastVLM's vision tower is exported with {', '.join(missing)}, not installed here"
        raise BadInput(what, where=folder, fix=f"pip install 'saec[cloud]' {' '.join(missing)}, or leave out vision")
    import torch

    from saec.vlm.load import load_vlm
    from saec.vlm.processors import load_processor
    from saec.vlm.run import bare

    settings = MllmSettings(model=str(folder), adapter=adapter, dtype="float32", device="cpu")
    model = bare(load_vlm(settings).model).model

    class Seeing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model.get_image_features(pixel_values=pixel_values).pooler_output
            return found

    side = int(load_processor(folder).image_processor.crop_size["height"])
    pixels = torch.zeros(1, 3, side, side)
    seeing = Seeing().eval()
    with torch.inference_mode():
        tokens = int(seeing(pixels).shape[1])
    names = {"input_names": ["pixel_values"], "output_names": ["image_embeds"]}
    torch.onnx.export(seeing, (pixels,), file, opset_version=_OPSET, dynamo=False, **names)
    spec = TensorSpec(name="pixel_values", shape=(1, 3, side, side), dtype="float32")
    return Vision(inputs=(spec,), tokens=tokens, preprocess=read_preprocess(folder, side))
