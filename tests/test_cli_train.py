"""``saec train``: from rows to an adapter that can be served, in one command that can be given again."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from cli_run import saec
from saec.train.config import TrainSettings
from train_rows import make_files


def test_show_prints_the_settings_as_a_file_that_can_be_given_back(tmp_path: Path):
    shown = saec("train", "--preset", "saec-qwen2.5-vl-7b", "--set", "epochs=5", "--show")
    assert shown.code == 0
    assert tomllib.loads(shown.out)["epochs"] == 5
    file = tmp_path / "mine.toml"
    file.write_text(shown.out)
    assert saec("train", file, "--show").out == shown.out
    assert all(field.description for field in TrainSettings.model_fields.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "pass a settings file or --preset (presets: loupe, saec-qwen2.5-vl-7b, tiny)"),
        (("--preset", "tiny"), "--train, --val and --out are needed"),
        (("--preset", "huge", "--show"), "no such preset: huge"),
        (("--preset", "tiny", "--set", "epoch=1", "--show"), "unknown setting: tiny, epoch"),
    ],
)
def test_what_is_missing_or_unknown_is_told_in_one_line(arguments: tuple[str, ...], message: str):
    assert message in saec("train", *arguments).error()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft", reason="the train extra is not installed")
    from tiny_vlms import save_tiny

    place = tmp_path_factory.mktemp("cli-train")
    make_files(place, n_train=8, n_val=4)
    save_tiny("llava", place / "tiny-llava")
    return place


def command(folder: Path, out: str, *more: str) -> list[str]:
    files = ("--train", str(folder / "train.jsonl"), "--val", str(folder / "val.jsonl"), "--out", str(folder / out))
    return ["train", "--preset", "tiny", "--set", f"model={folder / 'tiny-llava'}", *files, *more]


def test_a_run_tells_its_figures_and_given_again_does_nothing(folder: Path):
    first = saec(*command(folder, "run", "--set", "threads=1"))
    assert first.code == 0
    assert "Fine-tuned tiny-llava" in first.out
    assert "MB resident" in first.out
    assert f"Release (best) {folder / 'run' / 'best'}" in first.out
    assert "checking 8 training and 4 validation images for leaks" in first.err
    assert "step 10/10  loss" in first.err
    again = saec(*command(folder, "run", "--json", "--set", "threads=1"))
    told = json.loads(again.out)
    assert told["release_folder"] == str(folder / "run" / "best")
    assert told["steps"] == 10
    assert "This run is finished; nothing was done." in saec(*command(folder, "run", "--set", "threads=1")).out
    assert "begun with epochs=2" in saec(*command(folder, "run", "--set", "epochs=3")).error()


def test_an_interrupted_run_says_that_the_same_command_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from saec.train import loop

    def stop(*_: object, **__: object) -> None:
        raise loop.Interrupted(3, 10)

    monkeypatch.setattr(loop, "train", stop)
    found = saec(*command(folder, "other"))
    assert found.code == 130
    assert "stopped at step 3 of 10; the same command goes on from there" in found.err


def test_a_leak_is_a_failed_gate(folder: Path):
    val = folder / "train-again.jsonl"
    val.write_text((folder / "train.jsonl").read_text())
    found = saec(*command(folder, "leak", "--val", str(val)))
    assert found.code == 1
    assert found.err.splitlines()[-1].startswith("gate failed: training and validation share the group g")
