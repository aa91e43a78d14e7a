"""An exported adapter computes what PEFT computes with it, merged or beside; what is not exported is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="the cloud extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

import torch
from gguf import GGMLQuantizationType
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

from export_tiny import Runner, export, logits, tiny
from saec.errors import BadInput
from saec.vlm.contract.signature import Signature
from saec.vlm.export.linear import dense
from saec.vlm.export.lora import beside, decoder_modules, merged, read_adapter
from saec.vlm.export.weights import open_decoder
from saec.vlm.trained import CONFIG, SHIPPED, WEIGHTS
from tiny_loupe import write_gguf

PROMPT = [5, 17, 300, 8, 8, 41, 2, 119, 64]
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def adapted(base: Any, folder: Path, **options: Any) -> Any:
    """Save an adapter with random weights as PEFT does, and return the model with it."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 24, "target_modules": TARGETS, **options})
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
        torch.manual_seed(3)
        model = get_peft_model(base, config).eval()
        for name, values in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                torch.nn.init.normal_(values, std=0.05)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["k_proj", "gate_proj"]}], ids=str)
@pytest.mark.parametrize("kind", ["llama, biases, wide heads, untied", "qwen2, grouped queries, tied"])
def test_merged_and_beside_compute_what_peft_computes(kind: str, options: dict[str, Any], tmp_path: Path):
    base = tiny(kind)
    base.save_pretrained(tmp_path)
    plain = logits(base, PROMPT)
    wanted = logits(adapted(base, tmp_path / "adapter", **options), PROMPT)
    assert np.abs(wanted - plain).max() > 0.1
    shape, weights = open_decoder(tmp_path)
    adapter = read_adapter(tmp_path / "adapter")
    adapter.require(decoder_modules(shape, "model."))
    signature = Signature(shape=shape, cache=16, n=None)
    for attached in (merged, beside):
        file = export(tmp_path / "decoder.onnx", signature, attached(weights, adapter, "model."))
        found = Runner(file, signature, weights.array("model.embed_tokens.weight")).feed(PROMPT)
        assert np.abs(found - wanted).max() <= 1e-4


def test_beside_leaves_the_stored_blocks_and_merging_replaces_those_it_changes(tmp_path: Path):
    base = write_gguf(tmp_path / "base.gguf", packed=GGMLQuantizationType.Q4_1)
    adapted(base, tmp_path / "adapter", target_modules=["q_proj"])
    _, weights = open_decoder(tmp_path / "base.gguf")
    adapter = read_adapter(tmp_path / "adapter")
    query, key = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    at_side, inside = beside(weights, adapter, "model."), merged(weights, adapter, "model.")
    stored, kept = weights.blocks(query), at_side.blocks(query)
    assert stored is not None
    assert kept is not None
    assert np.array_equal(stored.quants, kept.quants)
    assert inside.blocks(query) is None
    assert inside.side(query) is None
    assert inside.blocks(key) is not None
    assert at_side.side(key) is None
    side = at_side.side(query)
    assert side is not None
    assert np.allclose(inside.array(query), dense(stored) + (side.a @ side.b).T, atol=1e-6)


def test_modules_that_were_saved_whole_are_returned_by_their_full_names(tmp_path: Path):
    model = adapted(tiny(), tmp_path, modules_to_save=["model.norm"])
    saved = read_adapter(tmp_path).saved
    assert list(saved) == ["model.norm.weight"]
    wanted = model.base_model.model.model.norm.modules_to_save["default"].weight
    assert np.array_equal(saved["model.norm.weight"], wanted.detach().numpy())


def test_what_the_exported_model_does_not_have_is_refused_and_not_left_out(tmp_path: Path):
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    shape, _ = open_decoder(tmp_path / "base")
    adapted(base, tmp_path / "adapter", modules_to_save=["model.norm"])
    adapter = read_adapter(tmp_path / "adapter")
    adapter.require({*decoder_modules(shape, "model."), "model.norm"})
    with pytest.raises(BadInput, match=r"changes model\.norm\.weight"):
        adapter.require(decoder_modules(shape, "model."))
    shorter = shape.model_copy(update={"layers": 1})
    with pytest.raises(BadInput, match=r"changes model\.layers\.1\.mlp\.down_proj.*adapter"):
        adapter.require({*decoder_modules(shorter, "model."), "model.norm"})


def test_an_adapter_for_another_size_is_refused_by_module(tmp_path: Path):
    adapted(tiny(hidden_size=120), tmp_path / "adapter")
    with pytest.raises(BadInput, match=r"LoRA of model\.layers\.0\.self_attn\.q_proj is for a matrix \[120, 120\]"):
        read_adapter(tmp_path / "adapter").merged("model.layers.0.self_attn.q_proj", np.zeros((96, 96), np.float32))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("r", None),
        ("r", 5),
        ("lora_alpha", "much"),
    ],
)
def test_an_adapter_that_means_something_else_is_refused_by_name(key: str, value: object, tmp_path: Path):
    adapted(tiny(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {key: value}))
    with pytest.raises(BadInput, match={"r": "rank", "lora_alpha": "alpha"}.get(key, key)):
        read_adapter(tmp_path)


def test_a_lora_with_one_half_missing_is_refused(tmp_path: Path):
    adapted(tiny(), tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    name = next(name for name in state if name.endswith("lora_B.weight"))
    del state[name]
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(BadInput, match=r"lack .*lora_B"):
        read_adapter(tmp_path)


def test_the_shipped_adapter_is_read_whole():
    adapter = read_adapter(SHIPPED)
    assert {path.partition(".")[0] for path in adapter.sides} == {"language_model", "vision_tower"}
    assert {name.partition(".")[0] for name in adapter.saved} == {"projector"}
