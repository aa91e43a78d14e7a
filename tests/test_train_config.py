"""The settings of a training run: one flat commented file, presets, overrides, and no unknown key."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saec.errors import BadInput
from saec.train.config import TrainSettings, first_difference, load_train_settings, presets, to_toml
from saec.train.schedule import rate, steps_of

REFERENCE = "saec-qwen2.5-vl-7b"


def test_the_reference_preset_is_the_recipe_of_saec_section_4():
    s = load_train_settings(preset=REFERENCE)
    assert (s.four_bit, s.dtype) == (True, "bfloat16")
    assert (s.lora_rank, s.lora_alpha, s.lora_dropout) == (8, 16, 0.05)
    assert (s.epochs, s.batch_size, s.accumulation) == (3, 2, 8)
    assert (s.lr, s.schedule, s.warmup, s.gradient_checkpointing) == (2e-4, "cosine", 0.03, True)
    assert not s.train_projector
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        assert f"{name}_proj" in s.lora_targets


def test_there_are_a_preset_for_the_shipped_model_and_a_tiny_one():
    assert presets() == ["loupe", REFERENCE, "tiny"]
    loupe = load_train_settings(preset="loupe")
    assert (loupe.model, loupe.train_projector, loupe.projector_lr, loupe.lr) == ("loupe", True, 1e-3, 3e-4)


@pytest.mark.parametrize("name", ["loupe", REFERENCE, "tiny"])
def test_the_shown_file_documents_every_setting_and_reads_back_the_same(name: str, tmp_path: Path):
    given_settings = load_train_settings(preset=name)
    file = tmp_path / "run.toml"
    file.write_text(to_toml(given_settings))
    assert load_train_settings(file) == given_settings
    lines = file.read_text().splitlines()
    for key in TrainSettings.model_fields:
        at = next(i for i, line in enumerate(lines) if line.removeprefix("# ").startswith(f"{key} ="))
        assert lines[at - 1].startswith("# ")


def test_overrides_win_over_the_preset_and_need_no_quotes():
    changes = ["epochs=1", "lr=1e-5", "model=my/folder", 'augment=["hflip"]', "train_projector=true", "threads="]
    s = load_train_settings(preset="tiny", overrides=changes)
    assert (s.epochs, s.lr, s.model, s.augment, s.train_projector) == (1, 1e-5, "my/folder", ("hflip",), True)
    assert s.threads is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epoch=1"], "unknown setting: tiny, epoch"),
        (["epochs=0"], "greater than or equal to 1.*tiny, epochs"),
        (["dtype=float16"], "tiny, dtype"),
        (["epochs"], "not a setting: epochs"),
    ],
)
def test_a_wrong_setting_is_named(overrides: list[str], message: str):
    with pytest.raises(BadInput, match=message):
        load_train_settings(preset="tiny", overrides=overrides)


def test_a_settings_file_that_cannot_be_used_is_named(tmp_path: Path):
    broken = tmp_path / "broken.toml"
    broken.write_text("epochs = ")
    for arguments in ({"file": broken}, {"file": tmp_path / "none.toml"}, {"preset": "huge"}, {}):
        with pytest.raises(BadInput):
            load_train_settings(**arguments)


def test_the_first_setting_that_differs_is_told():
    one = load_train_settings(preset="tiny")
    assert first_difference(one, one) is None
    other = load_train_settings(preset="tiny", overrides=["lr=1.0", "threads=3"])
    assert first_difference(one, other) == "lr"
    assert first_difference(one, other, free=("lr", "threads")) is None


# -- schedule


def test_the_rate_rises_over_the_warm_up_and_falls_along_half_a_cosine():
    s = load_train_settings(preset="tiny", overrides=["warmup=0.1"])
    rates = [rate(step, 100, s) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))  # half of the way down
    assert rates[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.floats(0, 0.99), st.sampled_from(["cosine", "constant"]))
def test_every_step_has_a_rate_above_0_and_at_most_1(total: int, warmup: float, schedule: str):
    s = load_train_settings(preset="tiny", overrides=[f"warmup={warmup}", f"schedule={schedule}"])
    rates = [rate(step, total, s) for step in range(total)]
    assert all(0 < r <= 1 for r in rates)


def test_an_epoch_has_as_many_steps_as_full_or_begun_accumulations():
    s = load_train_settings(preset="tiny", overrides=["batch_size=2", "accumulation=8"])
    assert [steps_of(n, s) for n in (1, 16, 17, 32, 33)] == [1, 1, 2, 2, 3]
