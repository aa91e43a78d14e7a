"""A model's bundle is exported once into the model cache, and found there ever after."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the cloud extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

import typer
from typer.testing import CliRunner

from saec.cli.vlm_export import export_decoder
from saec.config import MllmSettings
from saec.errors import BadInput
from saec.fleet.slots import Slots
from saec.vlm.contract.bundle import DECODER, read_bundle
from saec.vlm.export import bundle as exporter
from saec.vlm.export.bundle import export_bundle
from saec.vlm.export.ready import ready_bundle
from tiny_vlms import save_tiny, save_tiny_adapter


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    save_tiny("smolvlm", root / "smolvlm")
    save_tiny_adapter(root / "smolvlm", root / "adapter")
    return root


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty model cache, and what is exported into it from now on."""
    monkeypatch.setenv("SAEC_MODELS", str(tmp_path / "cache"))
    made: list[str] = []
    real = export_bundle
    monkeypatch.setattr(
        exporter, "export_bundle", lambda model, out, **how: made.append(out.name) or real(model, out, **how)
    )
    return made


def settings(tiny: Path, **more: object) -> MllmSettings:
    return MllmSettings(model=str(tiny / "smolvlm"), **more)


def test_a_model_is_exported_at_its_first_use_only(tiny: Path, exports: list[str], tmp_path: Path):
    folder = ready_bundle(settings(tiny))
    assert ready_bundle(settings(tiny)) == folder and exports == [folder.name]
    bundle = read_bundle(folder)
    assert folder == tmp_path / "cache" / "exported" / f"smolvlm-{bundle.fingerprint[:12]}-int8"


def test_precision_and_adapter_make_bundles_of_their_own(tiny: Path, exports: list[str]):
    ways = [settings(tiny), settings(tiny, precision="int4"), settings(tiny, adapter=tiny / "adapter")]
    folders = {ready_bundle(way) for way in ways}
    assert len(folders) == len(exports) == 3
    assert "adapter:" in read_bundle(ready_bundle(ways[2])).model_id


def test_a_bundle_with_a_file_missing_is_made_again(tiny: Path, exports: list[str]):
    folder = ready_bundle(settings(tiny))
    (folder / DECODER).unlink()
    assert ready_bundle(settings(tiny)) == folder and len(exports) == 2
    read_bundle(folder)


def test_what_a_killed_export_left_is_cleared_away_by_the_next(tiny: Path, exports: list[str]):
    folder = ready_bundle(settings(tiny))
    (folder / DECODER).unlink()
    left, others = folder.with_name(f".{folder.name}.x1y2z3"), folder.with_name(".other-int8.x1y2z3")
    for each in (left, others):
        (each / "new").mkdir(parents=True)
    assert ready_bundle(settings(tiny)) == folder
    assert not left.exists() and others.exists()


def test_whatever_is_changed_about_a_checkpoint_or_its_adapter_makes_another_bundle(
    tiny: Path, exports: list[str], tmp_path: Path
):
    base, adapter = shutil.copytree(tiny / "smolvlm", tmp_path / "base"), tmp_path / "adapter"
    shutil.copytree(tiny / "adapter", adapter)
    wanted = MllmSettings(model=str(base), adapter=adapter)
    folders = {ready_bundle(wanted)}
    for file, key, value in (
        (base / "config.json", "image_token_id", 3),
        (base / "chat_template.json", "chat_template", "{{ messages }}"),
        (adapter / "adapter_config.json", "lora_alpha", 1),
    ):
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
        folders.add(ready_bundle(wanted))
    assert len(folders) == 4


def test_who_finds_the_bundle_needs_no_exporter(tiny: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "saec.vlm.export.bundle", None)  # as if onnx were not installed
    with pytest.raises(BadInput, match=r"saec\[export\]"):
        ready_bundle(settings(tiny))
    monkeypatch.undo()
    monkeypatch.setenv("SAEC_MODELS", str(tiny / "cache"))
    folder = ready_bundle(settings(tiny))
    monkeypatch.setitem(sys.modules, "saec.vlm.export.bundle", None)
    assert ready_bundle(settings(tiny)) == folder


def test_the_folder_of_a_bundle_is_taken_as_it_is(tiny: Path, exports: list[str], tmp_path: Path):
    mine = tmp_path / "mine"
    export_bundle(str(tiny / "smolvlm"), mine)
    assert ready_bundle(MllmSettings(model=str(mine))) == mine and not exports
    with pytest.raises(BadInput, match="adapter inside"):
        ready_bundle(MllmSettings(model=str(mine), adapter=tiny / "adapter"))
    with pytest.raises(BadInput, match="an exported model"):
        export_bundle(str(mine), tmp_path / "again")


def test_a_model_that_is_not_here_is_refused_in_one_line(exports: list[str], tmp_path: Path):
    with pytest.raises(BadInput, match="saec models pull loupe"):
        ready_bundle(MllmSettings())
    with pytest.raises(BadInput, match="unknown model"):
        ready_bundle(MllmSettings(model=str(tmp_path / "nothing")))
    assert not exports


# -- an adapter's versions


def learnt(adapter: Path, version: int) -> Path:
    """Apply a version to an adapter that differs from all others; returns its folder."""

    def fill(out: Path) -> None:
        shutil.copytree(adapter, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("slots"))
        config = json.loads((out / "adapter_config.json").read_text())
        (out / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 10 + version}))

    slots = Slots(adapter)
    slots.stage(fill)
    return slots.switch(version, f"{version:064}")


@pytest.fixture
def learner(tiny: Path, tmp_path: Path) -> MllmSettings:
    return settings(tiny, adapter=shutil.copytree(tiny / "adapter", tmp_path / "learner"))


def in_cache(folder: Path) -> set[Path]:
    return {each for each in folder.parent.iterdir() if each.is_dir()}


def test_bundles_of_versions_that_no_slot_keeps_are_removed(tiny: Path, learner: MllmSettings, exports: list[str]):
    assert learner.adapter is not None
    others = {ready_bundle(settings(tiny)), ready_bundle(settings(tiny, adapter=tiny / "adapter"))}
    fitted = ready_bundle(learner)
    made = []
    for version in (1, 2, 3, 4):
        learnt(learner.adapter, version)
        made.append(ready_bundle(learner))
    assert in_cache(fitted) == {*others, fitted, *made[-2:]}
    Slots(learner.adapter).back()
    assert ready_bundle(learner) == made[-2] and len(exports) == 6
    assert not [each.name for each in fitted.parent.glob(".*.old")]


def test_who_serves_a_bundle_goes_on_when_it_is_removed(learner: MllmSettings, exports: list[str]):
    assert learner.adapter is not None
    learnt(learner.adapter, 1)
    first = ready_bundle(learner)
    with (first / DECODER).open("rb") as held:
        for version in (2, 3):
            learnt(learner.adapter, version)
            ready_bundle(learner)
        assert not first.exists() and held.read()


def test_a_bundle_that_others_want_as_well_stays(tiny: Path, learner: MllmSettings, exports: list[str], tmp_path: Path):
    assert learner.adapter is not None
    released, twin = tmp_path / "released", shutil.copytree(learner.adapter, tmp_path / "twin")
    shutil.copytree(learnt(learner.adapter, 1), released)
    first = ready_bundle(learner)
    assert ready_bundle(settings(tiny, adapter=released)) == first
    learnt(learner.adapter, 2)
    learnt(twin, 2)
    second = ready_bundle(learner)
    assert ready_bundle(settings(tiny, adapter=twin)) == second
    for version in (3, 4, 5):
        learnt(learner.adapter, version)
        ready_bundle(learner)
    assert first.exists(), "the released copy is no version"
    assert second.exists(), "the twin is still at version 2"
    for version in (3, 4):
        learnt(twin, version)
        ready_bundle(settings(tiny, adapter=twin))
    assert not second.exists()


def test_an_adapter_on_a_disk_that_is_away_loses_nothing(tiny: Path, exports: list[str], tmp_path: Path):
    adapters = [shutil.copytree(tiny / "adapter", tmp_path / name / "adapter") for name in ("here", "away")]
    for adapter in adapters:
        learnt(adapter, 1)
    kept = {ready_bundle(settings(tiny, adapter=adapter)) for adapter in adapters}
    assert len(kept) == 1  # both versions are equal
    adapters[1].parent.rename(tmp_path / "unplugged")
    for version in (2, 3):
        learnt(adapters[0], version)
        ready_bundle(settings(tiny, adapter=adapters[0]))
    assert all(folder.exists() for folder in kept)


def test_a_removal_that_was_killed_is_completed(learner: MllmSettings, exports: list[str]):
    assert learner.adapter is not None
    learnt(learner.adapter, 1)
    first = ready_bundle(learner)
    learnt(learner.adapter, 2)
    ready_bundle(learner)
    aside = first.rename(first.with_name(f".{first.name}.old"))
    learnt(learner.adapter, 3)
    ready_bundle(learner)
    assert not aside.exists() and not list(first.parent.glob(f".{first.name}*.json"))


# -- on the command line


def export(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(export_decoder)
    found = CliRunner().invoke(app, [*map(str, arguments)])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.stdout


def test_the_command_writes_what_it_is_told_to(tiny: Path, tmp_path: Path):
    out = tmp_path / "out"
    said = export(tiny / "smolvlm", "--out", out, "--ar", 1, "--context", 128, "--kv-style", "genie", "--json")
    record = json.loads(said)
    assert record["folder"] == str(out) and record["signature"] == read_bundle(out).signature.model_dump(mode="json")
    assert (record["signature"]["n"], record["signature"]["cache"], record["signature"]["style"]) == (1, 127, "genie")
    parts = export(tiny / "smolvlm", "--out", tmp_path / "some", "--parts", "vision, embed")
    assert "smolvlm@int8+p2" in parts and not (tmp_path / "some" / DECODER).exists()


def test_the_command_refuses_a_part_that_there_is_not(tiny: Path, tmp_path: Path):
    with pytest.raises(BadInput, match="no such part: head"):
        export(tiny / "smolvlm", "--out", tmp_path / "out", "--parts", "decoder,head")
