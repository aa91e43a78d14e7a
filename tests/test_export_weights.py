"""A decoder's weights come out of its files exactly, or not at all: what is damaged or does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the cloud extra is not installed")
pytest.importorskip("gguf", reason="the export extra is not installed")

import torch
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file, save_file

from export_tiny import tiny
from saec.errors import BadInput
from saec.vlm.contract.signature import Signature
from saec.vlm.export.decoder import build_decoder
from saec.vlm.export.linear import dense
from saec.vlm.export.weights import Tensors, open_decoder, weight_shapes
from saec.vlm.gguf import LlamaGguf
from tiny_loupe import write_gguf
from tiny_vlms import save_tiny

WEIGHTS = "model.safetensors"


def saved(folder: Path, kind: str = "qwen2, grouped queries, tied", **how: Any) -> Path:
    tiny(kind).save_pretrained(folder, **how)
    return folder


def test_the_names_and_shapes_are_those_of_hugging_face():
    for kind in ("llama, biases, wide heads, untied", "qwen2, grouped queries, tied"):
        model = tiny(kind)
        state = {name: tuple(values.shape) for name, values in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        assert weight_shapes(shape_of(model)) == state


def shape_of(model: Any) -> Any:
    from saec.vlm.contract.shape import read_shape

    return read_shape(model.config.to_dict(), where="config.json")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_a_configuration_leaves_out_is_its_classs_default(family: str):
    """LLaVA-1.5's text_config names neither sizes nor heads."""
    from transformers import LlamaConfig, Qwen2Config

    from saec.vlm.contract.shape import read_shape

    whole = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]().to_dict()
    sparse = {"text_config": {"model_type": family, "num_key_value_heads": whole["num_key_value_heads"]}}
    assert read_shape(sparse, where="") == read_shape(whole, where="")


@pytest.mark.parametrize("kind", ["llama, biases, wide heads, untied", "qwen2, grouped queries, tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", ["5GB", "30KB"])
def test_a_folders_weights_are_exact_in_any_number_format_and_any_number_of_files(
    kind: str, dtype: torch.dtype, shards: str, tmp_path: Path
):
    model = tiny(kind).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "30KB")
    shape, weights = open_decoder(tmp_path)
    assert shape.tied == model.config.tie_word_embeddings
    for name in weight_shapes(shape):
        found = weights.array(name)
        assert found.dtype == np.float32
        assert np.array_equal(found, model.state_dict()[name].float().numpy())


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_the_text_model_of_a_vlm_is_found_whatever_it_is_called(family: str, tmp_path: Path):
    save_tiny(family, tmp_path)
    shape, weights = open_decoder(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    (table,) = (values for name, values in stored.items() if name.endswith("embed_tokens.weight"))
    assert np.array_equal(weights.array("model.embed_tokens.weight"), table)
    assert build_decoder(Signature(shape=shape, cache=8), weights, "float32")


def test_only_what_is_asked_for_is_read(tmp_path: Path):
    # A file of 64 GB, nearly all of it a hole: reading it all would take the memory of this machine.
    size = 2**36
    header = {"small": ("F32", [2], [0, 8]), "huge": ("F32", [size // 4], [8, 8 + size])}
    text = json.dumps({n: dict(zip(("dtype", "shape", "data_offsets"), e, strict=True)) for n, e in header.items()})
    file = tmp_path / WEIGHTS
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text.encode() + np.array([1, 2], np.float32).tobytes())
        out.truncate(out.tell() + size)
    assert Tensors([file]).array("small").tolist() == [1, 2]


# -- damage


def drop(folder: Path) -> str:
    return edit(folder, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))


def reshape(folder: Path) -> str:
    def cut(state: dict[str, np.ndarray]) -> None:
        state["model.layers.0.self_attn.k_proj.weight"] = state["model.layers.0.self_attn.k_proj.weight"][:-1].copy()

    return edit(folder, cut)


def add(folder: Path) -> str:
    return edit(folder, lambda state: state.update({"model.layers.0.self_attn.q_norm.weight": np.ones(16)}))


def integers(folder: Path) -> str:
    return edit(folder, lambda state: state.update({"model.norm.weight": np.ones(96, np.int64)}))


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> str:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)
    return WEIGHTS


def cut(folder: Path) -> str:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    return WEIGHTS


def garbage(folder: Path) -> str:
    (folder / WEIGHTS).write_bytes(b"\x10\0\0\0\0\0\0\0not json, really")
    return WEIGHTS


def empty(folder: Path) -> str:
    (folder / WEIGHTS).write_bytes(b"")
    return WEIGHTS


def gone(folder: Path) -> str:
    (folder / WEIGHTS).unlink()
    return str(folder)


def other(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    return "config.json"


DAMAGE = {
    drop: r"layers\.1\.mlp\.up_proj\.weight is missing",
    reshape: r"layers\.0\.self_attn\.k_proj\.weight has shape \[31, 96\], the configuration says \[32, 96\]",
    add: r"the decoder has model\.layers\.0\.self_attn\.q_norm\.weight",
    integers: r"model\.norm\.weight has the number format I64",
    cut: r"the weight model\.\S+ is cut off",
    garbage: "not a readable safetensors file",
    empty: "not a readable safetensors file",
    gone: "no weights here",
    other: "unknown architecture gpt2",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_checkpoint_that_does_not_fit_is_refused_with_file_and_weight(damage: Callable[[Path], str], tmp_path: Path):
    where = damage(saved(tmp_path))
    with pytest.raises(BadInput, match=DAMAGE[damage]) as refused:
        shape, weights = open_decoder(tmp_path)
        for name in weight_shapes(shape):
            weights.array(name)
    if damage is not drop:  # of a weight that is in no file, the folder is named
        assert where in str(refused.value)


def test_a_missing_shard_is_refused_by_name(tmp_path: Path):
    saved(tmp_path, max_shard_size="30KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BadInput, match=shard.name):
        open_decoder(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match=r"no checkpoint here.*config\.json"):
        open_decoder(tmp_path)


def test_without_an_output_projection_the_embeddings_are_it_unless_the_configuration_denies_it(tmp_path: Path):
    saved(tmp_path, "qwen2, untied")
    edit(tmp_path, lambda state: state.pop("lm_head.weight"))
    with pytest.raises(BadInput, match=r"lm_head\.weight is missing"):
        open_decoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_decoder(tmp_path)[0].tied


# -- GGUF


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1], ids=lambda kind: kind.name)
def test_gguf_blocks_are_the_dequantised_matrices_to_the_bit(kind: GGMLQuantizationType, tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", packed=kind)
    gguf = LlamaGguf(tmp_path / "tiny.gguf")
    matrices = [name for name, sizes in weight_shapes(gguf.shape).items() if len(sizes) == 2]
    for name in matrices:
        blocks = gguf.blocks(name)
        assert blocks is not None
        assert np.array_equal(dense(blocks), gguf.array(name))
    assert gguf.blocks("model.norm.weight") is None


def test_a_block_of_equal_values_is_exact_too(tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", packed=GGMLQuantizationType.Q4_1)
    gguf = LlamaGguf(tmp_path / "tiny.gguf")
    name = "model.layers.0.mlp.up_proj.weight"
    stored = gguf._tensor(name).data.copy()
    for row, minimum in enumerate([0.0, 0.25, -0.25]):
        stored[row, :20] = np.frombuffer(np.array([0, minimum], np.float16).tobytes() + bytes(range(16)), np.uint8)
    gguf._tensors[name] = gguf._tensors[name]._replace(data=stored)
    blocks = gguf.blocks(name)
    assert blocks is not None
    assert np.all(blocks.scale != 0)
    assert np.array_equal(dense(blocks), gguf.array(name))


def test_gguf_blocks_reach_the_graph_as_they_are_stored(tmp_path: Path):
    import onnx

    write_gguf(tmp_path / "tiny.gguf", packed=GGMLQuantizationType.Q4_1)
    shape, weights = open_decoder(tmp_path / "tiny.gguf")
    model = build_decoder(Signature(shape=shape, cache=8), weights, "int4").model()
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    name = "model.layers.1.mlp.down_proj.weight"
    blocks = weights.blocks(name)
    assert blocks is not None
    assert np.array_equal(found[name].reshape(blocks.quants.shape), blocks.quants)


def test_a_gguf_file_without_a_weight_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_gguf(tmp_path / "tiny.gguf")
    shapes = LlamaGguf(tmp_path / "tiny.gguf").shapes
    del shapes["model.norm.weight"]
    monkeypatch.setattr(LlamaGguf, "shapes", shapes)
    with pytest.raises(BadInput, match=r"model\.norm\.weight is missing.*tiny\.gguf"):
        open_decoder(tmp_path / "tiny.gguf")
    with pytest.raises(BadInput, match=r"lacks model\.odd.*tiny\.gguf"):
        LlamaGguf(tmp_path / "tiny.gguf").array("model.odd")


@pytest.mark.parametrize(("field", "value"), [("scaling.type", "yarn"), ("dimension_count", 8)])
def test_gguf_positions_of_another_kind_are_refused(
    field: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_gguf(tmp_path / "tiny.gguf")
    read = LlamaGguf._field
    said = {f"llama.rope.{field}": value}
    monkeypatch.setattr(LlamaGguf, "_field", lambda self, name, *default: said.get(name) or read(self, name, *default))
    with pytest.raises(BadInput, match=rf"rotary positions of .*{value}.*tiny\.gguf"):
        LlamaGguf(tmp_path / "tiny.gguf")
