"""Vision graphs without torch: the same visual tokens as the torch models make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="the cloud extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

import onnxruntime
import torch
import transformers

import tiny_vlms
from saec.errors import BadInput
from saec.vlm.contract.bundle import Precision, Preprocess, Vision
from saec.vlm.export.graph import Graph
from saec.vlm.export.vision_clip import llava_vision, smolvlm_vision
from saec.vlm.export.vision_dinov2 import loupe_vision
from saec.vlm.export.vision_layers import Weights, resized_positions
from tiny_loupe import tiny_loupe


def how(side: int) -> Preprocess:
    return Preprocess(side=side, place="corner", fill=(0, 0, 0), mean=(0, 0, 0), std=(1, 1, 1))


RNG = np.random.default_rng(0)
PIXELS = RNG.standard_normal((1, 3, 56, 56)).astype(np.float32)
MAP = np.exp(RNG.normal(-0.35, 0.3, (1, 4, 4))).astype(np.float32)
MAP[0, 0] = (0.0, 1e-4, 1e-3, 9.0)  # below what the logarithm is taken of, and far above good parts


def run(graph: Graph, file: Path, **inputs: np.ndarray) -> np.ndarray:
    graph.save(file)
    session = onnxruntime.InferenceSession(str(file))
    assert {each.name for each in session.get_inputs()} == set(inputs)
    return session.run(["image_embeds"], inputs)[0]


def shaken(model: Any) -> Any:
    """Give every weight a random part: fresh norms and layer scales are ones, which no mistake would show in."""
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def weights_of(module: Any) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in module.state_dict().items()}


# -- Loupe


@pytest.fixture(scope="module")
def loupe() -> Any:
    return shaken(tiny_loupe().model)


def loupe_graph(model: Any, precision: Precision) -> tuple[Graph, Vision]:
    tower, projector = weights_of(model.vision_tower), weights_of(model.projector)
    return loupe_vision(tower, projector, precision, heads=2, sizes=model.config.sizes)


@pytest.mark.parametrize(("precision", "allowed"), [("float32", 1e-4), ("float16", 2e-2), ("int8", 0.1)])
def test_loupe_s_graph_sees_what_the_torch_model_sees(loupe, tmp_path: Path, precision: Precision, allowed: float):
    with torch.inference_mode():
        wanted = loupe.see(torch.from_numpy(PIXELS), torch.from_numpy(MAP)).numpy()
    graph, vision = loupe_graph(loupe, precision)
    found = run(graph, tmp_path / "vision.onnx", pixel_values=PIXELS, anomaly_map=MAP)
    assert found.shape == wanted.shape == (1, vision.tokens, 64) and found.dtype == np.float32
    assert np.abs(found - wanted).max() < allowed * np.abs(wanted).max()


def test_blocks_behind_the_last_one_looked_at_are_not_computed(loupe):
    def products(layers: tuple[int, ...]) -> int:
        loupe.config.tower_layers, kept = layers, loupe.config.tower_layers
        weights = weights_of(loupe.projector)
        width = 4 * 32 * len(layers)
        weights |= {"norm.weight": np.ones(width), "norm.bias": np.ones(width), "visual.weight": np.ones((64, width))}
        weights = {name: np.asarray(values, np.float32) for name, values in weights.items()}
        graph = loupe_vision(weights_of(loupe.vision_tower), weights, "float32", heads=2, sizes=loupe.config.sizes)[0]
        loupe.config.tower_layers = kept
        return sum(node.op_type == "MatMul" for node in graph.model().graph.node)

    assert products((1,)) < products((1, 2)) == products((2,))


@pytest.mark.parametrize(("old", "new"), [(37, 16), (4, 9), (5, 5)])
def test_position_embeddings_are_resized_as_pytorch_does_it(old: int, new: int):
    grid = np.random.default_rng(1).standard_normal((old * old, 6)).astype(np.float32)
    square = torch.from_numpy(grid).reshape(1, old, old, 6).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
    wanted = theirs.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    assert np.abs(resized_positions(grid, new) - wanted).max() < 1e-5


# -- LLaVA and SmolVLM


def llava(**changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_vlms._llava()[0].config
        for name, value in changes.items():
            setattr(config, name, value)
        return shaken(transformers.LlavaForConditionalGeneration(config))


def siglip(**changes: Any) -> Any:
    figures = {**tiny_vlms.VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    tower = transformers.SiglipVisionConfig(**figures, vision_use_head=False)
    return llava(vision_config=tower, vision_feature_select_strategy="full", **changes)


MODELS: dict[str, Callable[[], Any]] = {
    "CLIP, the layer before the last": llava,
    "CLIP, the last layer": lambda: llava(vision_feature_layer=-1),
    "CLIP, a layer from the front": lambda: llava(vision_feature_layer=1),
    "CLIP, with its class token": lambda: llava(vision_feature_select_strategy="full", image_seq_length=17),
    "SigLIP": siglip,
}


def towers(model: Any) -> tuple[dict[str, Any], Weights, Weights]:
    inner = model.model
    connector = inner.multi_modal_projector if hasattr(inner, "multi_modal_projector") else inner.connector
    tower = inner.vision_tower if hasattr(inner, "vision_tower") else inner.vision_model
    return model.config.to_dict(), weights_of(tower), weights_of(connector)


@pytest.mark.parametrize("model", MODELS)
def test_llava_s_graph_sees_what_the_torch_model_sees(tmp_path: Path, model: str):
    made = MODELS[model]()
    with torch.inference_mode():
        wanted = made.model.get_image_features(pixel_values=torch.from_numpy(PIXELS)).pooler_output[0].numpy()
    graph, vision = llava_vision(*towers(made), "float32", how)
    found = run(graph, tmp_path / "vision.onnx", pixel_values=PIXELS)[0]
    assert found.shape == wanted.shape == (vision.tokens, 64)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_smolvlm_s_graph_sees_what_the_torch_model_sees(tmp_path: Path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = shaken(tiny_vlms._smolvlm()[0])
    with torch.inference_mode():
        wanted = made.model.get_image_features(pixel_values=torch.from_numpy(PIXELS[None])).pooler_output[0].numpy()
    graph, vision = smolvlm_vision(*towers(made), "float32", how)
    found = run(graph, tmp_path / "vision.onnx", pixel_values=PIXELS)[0]
    assert found.shape == wanted.shape == (vision.tokens, 64) and vision.tokens == 4
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("silent", ["num_hidden_layers", "image_size", "patch_size", "hidden_size"])
def test_sizes_that_the_configuration_does_not_state_are_those_of_the_weights(tmp_path: Path, silent: str):
    config, tower, connector = towers(llava())
    del config["vision_config"][silent]
    graph, vision = llava_vision(config, tower, connector, "float32", how)
    assert run(graph, tmp_path / "vision.onnx", pixel_values=PIXELS).shape == (1, vision.tokens, 64)
    assert vision.preprocess.side == 56


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vision_config": {"model_type": "pixtral"}}, "pixtral"),
        ({"vision_feature_layer": [-2, -1]}, "features of layer"),
        ({"projector_hidden_act": "relu6"}, "relu6"),
    ],
)
def test_what_a_graph_would_get_wrong_is_refused_by_name(change: dict[str, Any], named: str):
    config, tower, connector = towers(llava())
    with pytest.raises(BadInput, match=named):
        llava_vision({**config, **change}, tower, connector, "float32", how)
