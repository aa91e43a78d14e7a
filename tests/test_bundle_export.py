"""A checkpoint becomes a bundle that says what the torch model says; what cannot be exported leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="the cloud extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

import onnxruntime
import torch
import transformers
from safetensors.torch import load_file, save_file

from saec.config import MllmSettings, PromptSettings
from saec.errors import BadInput
from saec.types import Query
from saec.vlm.contract.bundle import DECODER, EMBEDDING, VISION, Bundle, read_bundle
from saec.vlm.export.bundle import export_bundle
from saec.vlm.export.source import Layout
from saec.vlm.gguf import LlamaGguf
from saec.vlm.load import Vlm, load_vlm
from saec.vlm.loupe.encode import LoupeEncoder
from saec.vlm.prompt import Ask, build_question
from saec.vlm.registry import resolve
from saec.vlm.run import bare, forward
from saec.vlm.trained import SHIPPED, WEIGHTS
from tiny_loupe import write_gguf
from tiny_vlms import TEXT, bpe_tokenizer, save_tiny, save_tiny_adapter

IDS = list(range(20, 40))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints llava, smolvlm, qwen2.5-vl, llama, qwen2, and an adapter for each of the first two.

    LLaVA's also changes the vision tower, and the projector as a whole.
    """
    root = tmp_path_factory.mktemp("tiny")
    for family in ("llava", "smolvlm"):
        save_tiny(family, root / family)
    save_tiny_adapter(root / "smolvlm", root / "smolvlm-adapter")
    whole = {"target_modules": r".*\.(q_proj|v_proj)", "modules_to_save": ["multi_modal_projector"]}
    save_tiny_adapter(root / "llava", root / "llava-adapter", **whole)
    weights = load_file(root / "llava-adapter" / WEIGHTS)
    weights = {name: values * (1.5 if "projector" in name else 1) for name, values in weights.items()}
    save_file(weights, root / "llava-adapter" / WEIGHTS)
    save_tiny("qwen2.5-vl", root / "qwen2.5-vl")
    tokenizer = bpe_tokenizer(("<|endoftext|>", "<|im_end|>"), end="<|im_end|>", pad="<|endoftext|>")
    how: dict[str, Any] = {**TEXT, "vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": None}
    for family, kind, config in (
        ("llama", transformers.LlamaForCausalLM, transformers.LlamaConfig),
        ("qwen2", transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
    ):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            kind(config(**how)).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    return root


def logits_of(folder: Path, ids: list[int], inputs: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """Return the logits [rows, vocabulary] of a bundle of free dimensions after a prompt with one image at most."""
    bundle = read_bundle(folder)
    embeds = run(folder / EMBEDDING, {"input_ids": np.array([ids], np.int32)})[0]
    if inputs is not None:
        places = np.array(ids) == bundle.prompt.image_token
        embeds[0, places] = run(folder / VISION, inputs)[0][0]
    n = len(ids)
    feeds = {
        "inputs_embeds": embeds,
        "attention_mask": np.tril(np.ones((1, 1, n, n), embeds.dtype)),
        "position_ids": np.arange(n, dtype=np.int32)[None],
    }
    feeds |= {
        spec.name: np.zeros([0 if size == "cache" else size for size in spec.shape], embeds.dtype)
        for spec in bundle.signature.past
    }
    return run(folder / DECODER, feeds)[0][0]


def run(file: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(file)).run(None, feeds)


def question() -> Any:
    image = np.random.default_rng(5).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    query = Query("p", "plate", image, (56, 56), anomaly_map=np.linspace(0.2, 3, 64, dtype=np.float32).reshape(8, 8))
    return build_question(query, Ask.LABEL, PromptSettings(max_side=56, side_multiple=1))


def torch_logits(vlm: Vlm, encoded: Any) -> np.ndarray:
    with torch.inference_mode():
        return forward(vlm, vlm.encoder.collate([encoded])).logits[0, -1].float().numpy()


# -- what it says


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_vlm_says_what_the_torch_model_says(tiny: Path, tmp_path: Path, family: str, adapted: bool):
    adapter = tiny / f"{family}-adapter" if adapted else None
    bundle = export_bundle(str(tiny / family), tmp_path / "out", precision="float32", adapter=adapter)
    vlm = load_vlm(MllmSettings(model=str(tiny / family), adapter=adapter, dtype="float32"))
    encoded = vlm.encoder.prepare(one_picture())
    pixels = encoded.pictures[0]["pixel_values"].numpy().reshape(1, 3, 56, 56)
    found = logits_of(tmp_path / "out", encoded.ids.tolist(), {"pixel_values": pixels})
    assert found.shape[0] == 1  # of a prompt only the last row is wanted
    assert np.abs(found[0] - torch_logits(vlm, encoded)).max() < 1e-3
    assert bundle.model_id == "+".join(filter(None, (f"{family}@float32", vlm.adapter_id, "p2")))
    assert bundle.prompt.labels == vlm.encoder.label_tokens
    assert bundle.prompt.image_token == vlm.encoder.image_token
    assert set(bundle.prompt.ends) >= {vlm.encoder.tokenizer.eos_token_id}
    assert bundle.prompt.template == vlm.encoder._template


def one_picture() -> Any:
    """The question without its close-up: prompts of these tests have one image."""
    asked = question()
    return replace(asked, content=(asked.content[0], *asked.content[-3:]))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_language_model_says_what_the_torch_model_says(tiny: Path, tmp_path: Path, family: str):
    bundle = export_bundle(str(tiny / family), tmp_path / "out", precision="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny / family).eval()
    with torch.inference_mode():
        wanted = model(torch.tensor([IDS])).logits[0, -1].numpy()
    assert np.abs(logits_of(tmp_path / "out", IDS)[0] - wanted).max() < 1e-3
    assert (bundle.family, bundle.vision, bundle.prompt.ends) == ("text", None, (1,))


def test_a_gguf_file_says_what_its_weights_say_and_brings_its_tokenizer(tmp_path: Path):
    model = write_gguf(tmp_path / "tiny.gguf")
    bundle = export_bundle(str(tmp_path / "tiny.gguf"), tmp_path / "out", precision="float32", context=128)
    with torch.inference_mode():
        wanted = model(torch.tensor([IDS])).logits[0, -1].numpy()
    assert np.abs(logits_of(tmp_path / "out", IDS)[0] - wanted).max() < 1e-3
    assert bundle.name == "tiny" and bundle.signature.context == 128
    assert bundle.prompt.ends == (LlamaGguf(tmp_path / "tiny.gguf").end,)


@pytest.mark.parametrize(("precision", "smaller"), [("float16", 1.8), ("int8", 3), ("int4", 3.2)])
def test_fewer_bits_make_a_smaller_bundle_that_still_says_about_the_same(tiny, tmp_path: Path, precision, smaller):
    def size(bundle: Bundle) -> int:
        return sum(file.size for name, file in bundle.files.items() if name.endswith(".bin"))

    whole = export_bundle(str(tiny / "llama"), tmp_path / "float32", precision="float32", context=64)
    made = export_bundle(str(tiny / "llama"), tmp_path / precision, precision=precision, context=64)
    assert size(whole) > smaller * size(made)
    wanted, found = (logits_of(tmp_path / name, IDS)[0] for name in ("float32", precision))
    assert np.corrcoef(wanted, found)[0, 1] > 0.95


# -- as asked


def test_a_fixed_graph_has_the_names_and_sizes_that_were_asked_for(tiny: Path, tmp_path: Path):
    layout = Layout(style="genie", rope="inputs", embeddings="inside", embedded=True)
    out = tmp_path / "out"
    bundle = export_bundle(str(tiny / "llama"), out, precision="float16", context=128, n=4, layout=layout)
    session = onnxruntime.InferenceSession(str(out / DECODER))
    given = {each.name: tuple(each.shape) for each in (*session.get_inputs(), *session.get_outputs())}
    assert given == {spec.name: spec.shape for spec in (*bundle.signature.inputs, *bundle.signature.outputs)}
    assert given["past_key_0_in"] == (1, 2, 16, 124) and given["logits"][1] == 4
    assert sorted(bundle.files) == [DECODER, "tokenizer.json"]  # one file with weights and embeddings in it


def test_only_the_parts_that_were_asked_for_are_written(tiny: Path, tmp_path: Path):
    bundle = export_bundle(str(tiny / "llava"), tmp_path / "out", parts=["vision"])
    assert set(bundle.files) == {VISION, "vision.bin", "tokenizer.json"}
    assert bundle.vision is not None and bundle.vision.tokens == 16


def test_the_fingerprint_changes_with_whatever_changes_the_bundle(tiny: Path, tmp_path: Path):
    ways: list[dict[str, Any]] = [{}, {"context": 300}, {"precision": "int4"}, {"adapter": tiny / "llava-adapter"}]
    prints = [export_bundle(str(tiny / "llava"), tmp_path / str(at), **way).fingerprint for at, way in enumerate(ways)]
    assert len(set(prints)) == len(ways)
    assert export_bundle(str(tiny / "llava"), tmp_path / "again").fingerprint == prints[0]


# -- what is refused


def refused(match: str, model: Path, out: Path, **how: Any) -> None:
    """Export, and see one line of text and nothing on the disk."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(BadInput, match=match) as caught:
        export_bundle(str(model), out, **how)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before


def test_an_architecture_that_is_not_known_is_refused(tiny: Path, tmp_path: Path):
    refused("unknown architecture qwen2_5_vl", tiny / "qwen2.5-vl", tmp_path / "out")


def test_a_context_must_hold_the_image_and_be_one_the_model_knows(tiny: Path, tmp_path: Path):
    refused("too small.* need 80", tiny / "llava", tmp_path / "out", context=79)
    refused("too large.* 4096", tiny / "llava", tmp_path / "out", context=5000)
    assert export_bundle(str(tiny / "llava"), tmp_path / "out", context=80).signature.context == 80


def test_an_adapter_of_another_model_is_refused(tiny: Path, tmp_path: Path):
    refused("made for another base", tiny / "llava", tmp_path / "out", adapter=tiny / "smolvlm-adapter")
    foreign = shutil.copytree(tiny / "smolvlm-adapter", tmp_path / "foreign")
    (foreign / "saec.json").unlink()  # as from elsewhere: only the names of its weights can tell
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "auto_mapping": None}))
    refused("the adapter changes model.text_model", tiny / "llava", tmp_path / "out", adapter=foreign)


def test_damaged_files_are_refused_by_name(tiny: Path, tmp_path: Path):
    copy = shutil.copytree(tiny / "llava", tmp_path / "copy")
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused("cut off", copy, tmp_path / "out")
    weights.write_bytes(whole)
    (copy / "tokenizer.json").write_text("{")
    refused("tokenizer cannot be read", copy, tmp_path / "out")
    (copy / "tokenizer.json").unlink()
    refused("no tokenizer.json", copy, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("config.json", {"image_token_id": None, "image_token_index": None}, "which token stands for an image"),
        ("config.json", {"image_token_id": 99_999, "image_token_index": None}, "has token 99999"),
        ("config.json", {"text_config": "x"}, "text_config is no object"),
        ("config.json", {"vision_feature_layer": 9}, "layer 9 of 2"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "three numbers"),
        ("preprocessor_config.json", {"image_mean": "x"}, "three numbers"),
    ],
)
def test_a_figure_that_cannot_be_is_refused(tiny: Path, tmp_path: Path, file: str, change: dict[str, Any], match: str):
    copy = shutil.copytree(tiny / "llava", tmp_path / "copy")
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **change}))
    refused(match, copy, tmp_path / "out")


def test_a_tokenizer_of_another_checkpoint_is_refused(tiny: Path, tmp_path: Path):
    copy = shutil.copytree(tiny / "qwen2", tmp_path / "copy")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["one more"] = 5000
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("has token 5000", copy, tmp_path / "out")


def test_a_folder_in_use_is_left_as_it_is(tiny: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused("in use", tiny / "llava", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_fastvlm_s_tower_names_the_packages_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    from saec.vlm.export.vision_torch import fastvlm_vision

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else there(name))
    with pytest.raises(BadInput, match="timm"):
        fastvlm_vision(tmp_path, None, "float32", tmp_path / "vision.onnx")


# -- the real parts


def pulled() -> bool:
    try:
        return bool(resolve("loupe"))
    except BadInput:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not pulled(), reason="saec models pull loupe")
def test_the_real_loupe_says_what_the_torch_model_says(tmp_path: Path):
    bundle = export_bundle("loupe", tmp_path / "out", precision="float32")
    vlm = load_vlm(MllmSettings(dtype="float32", adapter=SHIPPED))
    assert isinstance(vlm.encoder, LoupeEncoder) and bundle.prompt.labels == vlm.encoder.label_tokens
    encoded = vlm.encoder.prepare(question())
    picture = {name: values.numpy() for name, values in encoded.pictures[0].items()}
    found = logits_of(tmp_path / "out", encoded.ids.tolist(), picture)[0]
    assert np.abs(found - torch_logits(vlm, encoded)).max() < 2e-3
    seen = run(tmp_path / "out" / VISION, picture)[0]
    with torch.inference_mode():
        wanted = bare(vlm.model).see(*(torch.from_numpy(values) for values in picture.values())).numpy()
    assert np.abs(seen - wanted).max() < 1e-4
