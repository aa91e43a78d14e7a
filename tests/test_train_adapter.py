"""What is trained is the language model's LoRA and, if wanted, the projector; what is saved is served the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the train extra is not installed")

import torch

from saec.config import MllmSettings
from saec.errors import BadInput
from saec.train import adapter
from saec.train.config import TrainSettings, load_train_settings
from saec.train.evaluation import p_defects
from saec.train.loop import train
from saec.train.rows import read_rows
from saec.vlm.adapter import with_adapter
from saec.vlm.load import Vlm, load_vlm
from tiny_vlms import FAMILIES, save_tiny
from train_rows import make_files
from train_tiny import TinyModel, load_tiny, settings_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and a tiny model of every family."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("models")
    make_files(place, n_train=8, n_val=4)
    for family in FAMILIES:
        save_tiny(family, place / family)
    return place


def tuned(folder: Path, out: Path, family: str, *overrides: str) -> tuple[TrainSettings, Path]:
    """Train a family for two epochs and return the settings and the release."""
    given = (f"model={folder / family}", "threads=1", "lr=0.02", "gradient_checkpointing=true", *overrides)
    settings = load_train_settings(preset="tiny", overrides=given)
    return settings, train(settings, folder / "train.jsonl", folder / "val.jsonl", out).release


def first_and_last(out: Path) -> tuple[float, float]:
    found = [json.loads(line)["loss"] for line in (out / "train.log.jsonl").read_text().splitlines()]
    return sum(found[:4]), sum(found[-4:])


# -- which modules


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_adapts_every_layer_of_the_language_model_and_nothing_of_the_vision_tower(family: str, folder: Path):
    model = load_vlm(MllmSettings(model=str(folder / family), dtype="float32")).model
    names = adapter.lora_modules(model, TrainSettings.model_fields["lora_targets"].default)
    assert len(names) == 2 * 7  # two layers: q, k, v, o, gate, up, down
    assert all("language_model" in name or "text_model" in name for name in names)
    projector = adapter.projector_module(model, TrainSettings.model_fields["projector"].default)
    assert projector.rpartition(".")[2] in ("merger", "multi_modal_projector", "connector")


def test_a_pattern_that_would_lose_weights_when_served_is_refused():
    model = TinyModel()
    for pattern, message in (
        (r".*q_proj", r"reaches into the vision tower: vision_tower\.q_proj"),
        (r".*w_proj", "no module of TinyModel matches"),
        (r".*(", "not a regular expression"),
        (r"language_model\..*", "more than linear layers"),
    ):
        with pytest.raises(BadInput, match=message):
            adapter.lora_modules(model, pattern)
    with pytest.raises(BadInput, match=r"several modules match the projector: vision_tower\.q_proj, projector"):
        adapter.projector_module(model, r"projector|vision_tower\.q_proj")


def test_only_lora_and_the_projector_learn_each_at_its_own_rate():
    settings = settings_for("lr=1e-4", "projector_lr=1e-2")
    vlm = adapter.add_adapter(load_tiny(settings), settings)
    learning = adapter.trainable(vlm.model)
    assert all(".lora_" in name or ".projector." in name for name in learning)
    lora, projector = adapter.parameter_groups(vlm.model, settings)
    assert (lora["lr"], projector["lr"]) == (1e-4, 1e-2)
    assert sum(weight.numel() for weight in projector["params"]) == 16 * 32 + 32
    assert len(lora["params"]) + len(projector["params"]) == len(learning)


# -- saved and served


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tuned_adapter_with_its_projector_is_served_with_the_very_same_answers(
    family: str, folder: Path, tmp_path: Path
):
    kept: list[Vlm] = []

    def load(settings: TrainSettings) -> Vlm:
        kept.append(load_vlm(MllmSettings(model=settings.model, dtype="float32")))
        return kept[0]

    given = (f"model={folder / family}", "threads=1", "lr=0.02", "train_projector=true", "keep=last")
    settings = load_train_settings(preset="tiny", overrides=given)
    result = train(settings, folder / "train.jsonl", folder / "val.jsonl", tmp_path / "run", load=load)
    rows, prompt = read_rows(folder / "val.jsonl"), settings.prompt
    served = load_vlm(MllmSettings(model=settings.model, dtype="float32", adapter=result.release))
    assert json.loads((result.release / "adapter_config.json").read_text())["base_model_name_or_path"] == family
    p = p_defects(served, rows, prompt, batch=4)
    bare = p_defects(load_vlm(MllmSettings(model=settings.model, dtype="float32")), rows, prompt, batch=4)
    assert p == pytest.approx(p_defects(kept[0], rows, prompt, batch=4), abs=1e-6)
    assert max(abs(a - b) for a, b in zip(p, bare, strict=True)) > 1e-3


def test_nf4_trains_on_a_cpu_through_the_evaluations_between_its_epochs_and_is_served(folder: Path, tmp_path: Path):
    settings, release = tuned(folder, tmp_path / "run", "qwen2.5-vl", "four_bit=true", "dtype=bfloat16")
    before, after = first_and_last(tmp_path / "run")
    assert after < 0.7 * before
    served = load_vlm(MllmSettings(model=settings.model, dtype="bfloat16", four_bit=True, adapter=release))
    assert any(type(module).__name__ == "Linear4bit" for module in served.model.modules())
    summary = json.loads((tmp_path / "run" / "train.json").read_text())
    assert summary["model"].endswith("@nf4")
    rows = read_rows(folder / "val.jsonl")
    again = p_defects(served, rows, settings.prompt, batch=4)
    truth = [row.label for row in rows]
    best = summary["epochs"][summary["best_epoch"]]
    assert sum((p >= 0.5) == (label == 1) for p, label in zip(again, truth, strict=True)) / 4 == best["accuracy"]


def test_a_quantised_projector_cannot_be_trained(folder: Path, tmp_path: Path):
    with pytest.raises(BadInput, match=r"the projector is quantised.*four_bit=false"):
        tuned(folder, tmp_path / "run", "llava", "four_bit=true", "dtype=bfloat16", "train_projector=true")


def test_the_projector_learns_in_float32_inside_a_bfloat16_model(folder: Path):
    overrides = [f"model={folder / 'llava'}", "dtype=bfloat16", "train_projector=true"]
    settings = load_train_settings(preset="tiny", overrides=overrides)
    vlm = adapter.add_adapter(load_vlm(MllmSettings(model=settings.model, dtype="bfloat16")), settings)
    assert {weight.dtype for weight in adapter.trainable(vlm.model).values()} == {torch.float32}


# -- going on from an adapter


def test_training_goes_on_from_an_adapter(folder: Path, tmp_path: Path):
    _, first = tuned(folder, tmp_path / "first", "llava", "epochs=4")
    tuned(folder, tmp_path / "more", "llava", f"adapter={first}")
    assert first_and_last(tmp_path / "more")[0] < 0.7 * first_and_last(tmp_path / "first")[0]
    with pytest.raises(BadInput, match="does not fit the settings"):
        tuned(folder, tmp_path / "other", "llava", f"adapter={first}", "lora_rank=2")
    with pytest.raises(BadInput):
        tuned(folder, tmp_path / "none", "llava", f"adapter={tmp_path}")


def test_a_saved_adapter_is_replaced_whole(tmp_path: Path):
    settings = settings_for()
    vlm = adapter.add_adapter(load_tiny(settings), settings)
    for _ in range(2):
        adapter.save_release(vlm, tmp_path / "best")
    names = ["adapter_config.json", "adapter_model.safetensors", "saec.json"]
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    with_adapter(load_tiny(settings), tmp_path / "best")
