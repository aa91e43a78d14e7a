"""Loading a multimodal LLM: what is asked for or one clear error; adapters only on the base they were made for."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from cloud_fakes import query  # noqa: E402
from saec.config import MllmSettings  # noqa: E402
from saec.errors import BadInput  # noqa: E402
from saec.vlm.adapter import ORIGIN, WEIGHTS  # noqa: E402
from saec.vlm.decide import p_defect  # noqa: E402
from saec.vlm.load import Vlm, load_vlm, pick_device  # noqa: E402
from saec.vlm.prompt import VERSION, Ask, build_question  # noqa: E402
from tiny_vlms import FAMILIES, NEEDS_TIMM, save_tiny, save_tiny_adapter  # noqa: E402

CPU = {"device": "cpu", "max_side": 112}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / f"tiny-{family}") for family in FAMILIES}


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {family: save_tiny_adapter(folder, root / family) for family, folder in folders.items()}


def load(folder: Path, **more: object) -> Vlm:
    return load_vlm(MllmSettings(model=str(folder), **CPU, **more))  # type: ignore[arg-type]


def p_of(vlm: Vlm) -> float:
    image = np.random.default_rng(7).integers(0, 256, (84, 112, 3), np.uint8)
    asked = query(image=image, original_size=(112, 84))
    return p_defect(vlm, [build_question(asked, Ask.LABEL, MllmSettings(**CPU))])[0].p_defect  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_class_loads_with_its_adapter_and_says_who_it_is(folders, adapters, family):
    bare = load(folders[family])
    tuned = load(folders[family], adapter=adapters[family])
    assert bare.model_id == f"tiny-{family}+{VERSION}"
    assert tuned.adapter_id is not None
    assert tuned.adapter_id.startswith("adapter:")
    assert tuned.model_id == f"tiny-{family}+{tuned.adapter_id}+{VERSION}"
    assert not bare.model.training
    assert not tuned.model.training
    assert abs(p_of(bare) - p_of(tuned)) > 1e-4


@pytest.mark.skip(reason=NEEDS_TIMM)
def test_fastvlm_loads():
    raise AssertionError


def test_an_adapter_shares_the_bases_weights_and_leaves_it_as_it_was(folders, adapters):
    settings = MllmSettings(model=str(folders["llava"]), **CPU)
    base = load_vlm(settings)
    before = p_of(base)
    tuned = load_vlm(settings.model_copy(update={"adapter": adapters["llava"]}), base=base)
    assert tuned.base is base
    shared = {values.data_ptr() for values in base.model.parameters()}
    own = [name for name, values in tuned.model.named_parameters() if values.data_ptr() not in shared]
    assert own
    assert all("lora" in name for name in own)
    assert p_of(base) == before
    assert p_of(tuned) == p_of(load(folders["llava"], adapter=adapters["llava"]))


def test_what_ships_with_an_adapter_names_no_folder_of_this_machine(adapters):
    for file in adapters["llava"].iterdir():
        assert str(file.parent.parent).encode() not in file.read_bytes()


def test_an_adapter_for_another_base_is_refused(folders, adapters, tmp_path):
    other = save_tiny("llava", tmp_path / "other", seed=5)
    with pytest.raises(BadInput, match=r"made for another base \(tiny-llava\)"):
        load(other, adapter=adapters["llava"])
    foreign = shutil.copytree(adapters["qwen2.5-vl"], tmp_path / "foreign")
    (foreign / ORIGIN).unlink()  # as from elsewhere: only the weights can tell
    with pytest.raises(BadInput, match=r"another base \(Qwen2_5_VLForConditionalGeneration\)"):
        load(folders["llava"], adapter=foreign)


@pytest.mark.parametrize("change", ["missing", "more", "shape"])
def test_an_adapter_whose_weights_do_not_fit_one_by_one_is_refused(folders, adapters, tmp_path, change):
    broken = shutil.copytree(adapters["llava"], tmp_path / "broken")
    weights = load_file(broken / WEIGHTS)
    name = sorted(weights)[0]
    if change == "missing":
        del weights[name]
    elif change == "more":
        weights[name.replace("layers.0", "layers.7")] = weights[name].clone()
    else:
        weights[name] = torch.zeros(weights[name].shape[0], 128)
    save_file(weights, broken / WEIGHTS)
    with pytest.raises(BadInput, match="adapter"):
        load(folders["llava"], adapter=broken)


def test_an_adapter_of_another_prompt_is_refused(folders, adapters, tmp_path):
    old = shutil.copytree(adapters["llava"], tmp_path / "old")
    origin = json.loads((old / ORIGIN).read_text())
    (old / ORIGIN).write_text(json.dumps({**origin, "prompt": "p0"}))
    with pytest.raises(BadInput, match=f"prompt p0, this version asks {VERSION}"):
        load(folders["llava"], adapter=old)
    (old / ORIGIN).write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        load(folders["llava"], adapter=old)


def test_a_folder_without_an_adapter_is_refused(folders, tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(BadInput, match="no adapter here"):
        load(folders["llava"], adapter=tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused(folders, tmp_path):
    damaged = shutil.copytree(folders["llava"], tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    name = next(name for name in sorted(weights) if "multi_modal_projector" in name)
    del weights[name]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="lacks 1 of the model's weights"):
        load(damaged)
    (damaged / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(BadInput, match="cannot be loaded"):
        load(damaged)


def test_a_family_that_is_not_known_is_refused(folders, tmp_path):
    other = shutil.copytree(folders["llava"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "magic"}))
    with pytest.raises(BadInput, match="a magic model is not supported"):
        load(other)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="there is no GPU"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"


def test_number_format_and_attention_are_as_asked(folders):
    vlm = load(folders["qwen2.5-vl"], dtype="bfloat16", attention="eager")
    assert vlm.model.dtype is torch.bfloat16
    assert vlm.model.config._attn_implementation == "eager"
    assert load(folders["qwen2.5-vl"]).model.dtype is torch.float32
    with pytest.raises(BadInput, match="cannot be loaded"):
        load(folders["qwen2.5-vl"], attention="flash_attention_2")


def test_four_bit_weights_are_nf4_with_double_quantisation_and_take_an_adapter(folders, adapters):
    pytest.importorskip("bitsandbytes")
    vlm = load(folders["qwen2.5-vl"], four_bit=True)
    linear = [module for module in vlm.model.modules() if type(module).__name__ == "Linear4bit"]
    assert linear
    assert {module.compute_dtype for module in linear} == {torch.bfloat16}
    states = [module.weight.quant_state for module in linear]
    assert {state.quant_type for state in states} == {"nf4"}
    assert all(state.nested for state in states)
    assert vlm.model_id == f"tiny-qwen2.5-vl@nf4+{VERSION}"
    before = p_of(vlm)
    assert abs(before - p_of(load(folders["qwen2.5-vl"]))) < 0.3
    settings = MllmSettings(model=str(folders["qwen2.5-vl"]), four_bit=True, adapter=adapters["qwen2.5-vl"], **CPU)
    tuned = load_vlm(settings, base=vlm)
    assert p_of(tuned) != before
    assert p_of(vlm) == before


def test_a_failing_four_bit_load_is_an_error(folders, monkeypatch):
    import transformers.quantizers.quantizer_bnb_4bit as quantizer

    def fail(*args: object, **more: object) -> None:
        raise ImportError("no bitsandbytes here")

    monkeypatch.setattr(quantizer.Bnb4BitHfQuantizer, "validate_environment", fail)
    with pytest.raises(BadInput, match=r"cannot be loaded in 4 bit \(ImportError: no bitsandbytes here\)"):
        load(folders["llava"], four_bit=True)


@pytest.mark.skipif("SAEC_SHARED_MODELS" not in os.environ, reason="SAEC_SHARED_MODELS is not set")
def test_a_folder_without_weights_is_an_error():
    with pytest.raises(BadInput, match="cannot be loaded"):
        load(Path(os.environ["SAEC_SHARED_MODELS"]) / "qwen2.5-vl")
