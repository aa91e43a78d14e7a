"""A student's adapter is taught, and nothing else: not its base, not its teacher; and a stopped run loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="the train extra is not installed")

import torch
from safetensors.torch import load_file

import tiny_loupe as tiny
from cli_run import saec
from saec.config import DistillSettings, MllmSettings
from saec.data.hashing import sha256_file
from saec.errors import BadInput
from saec.learn.distill import Judged, Teacher, distill, load_teacher
from saec.train.config import TrainSettings, load_train_settings
from saec.train.evaluation import p_defects
from saec.train.gates import files_gate
from saec.train.loop import TrainResult, train
from saec.train.release import check_files, trained_with
from saec.train.rows import Row, read_rows
from saec.train.steps import Interrupted
from saec.vlm.adapter import with_adapter
from saec.vlm.load import Vlm, load_vlm
from saec.vlm.trained import WEIGHTS
from tiny_vlms import save_tiny, save_tiny_adapter
from train_rows import make_files

LESSON = DistillSettings(epochs=2, batch_size=4, lr=2e-3, projector_lr=2e-3, weight_logits=1.0)
SMALL = ("max_side=56", "dtype=float32", "release_dtype=float32", "lora_rank=2", "checkpoint_every=2")


def load_tiny(settings: TrainSettings) -> Vlm:
    return tiny.tiny_loupe()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and the adapters of a student and of a teacher that learnt longer."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("distill")
    files = make_files(place, n_train=16, n_val=8)
    for name, epochs in (("student", 1), ("teacher", 3)):
        settings = load_train_settings(preset="loupe", overrides=[*SMALL, f"epochs={epochs}", "lr=5e-3"])
        train(settings, *files, place / name, load=load_tiny)
    return place


def rows(folder: Path) -> list[Row]:
    return read_rows(folder / "val.jsonl")


def adapted(folder: Path, name: str) -> Vlm:
    return with_adapter(tiny.tiny_loupe(), folder / name / "last")


def run(
    folder: Path, out: Path, settings: DistillSettings = LESSON, *, teacher: str = "teacher", weight: float = 1, **more
):
    parts = [replace(Judged.of(row), weight=weight) for row in rows(folder)]
    master = Teacher(adapted(folder, teacher), _prompt(folder))
    how = {"teacher": lambda base, name: master, "load": load_tiny, **more}
    return distill(folder / "student/last", parts, out, settings, **how)


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "train.log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def taught(folder: Path) -> TrainResult:
    return run(folder, folder / "taught")


# -- what is learnt


def test_every_term_is_logged_and_their_sum_is_the_loss(folder: Path, taught: TrainResult):
    entries = log(folder / "taught")
    assert len(entries) == taught.summary["steps"] == 4
    for entry in entries:
        assert set(entry["terms"]) == {"answer", "query", "language", "logits"}
        assert entry["loss"] == pytest.approx(sum(entry["terms"].values()), rel=1e-6)


def test_without_labels_the_student_still_comes_closer_to_its_teacher(folder: Path, tmp_path: Path):
    run(folder, tmp_path / "out", LESSON.model_copy(update={"epochs": 8}), weight=0)
    entries = log(tmp_path / "out")
    assert all(entry["terms"]["answer"] == 0 for entry in entries)
    for name in ("query", "language", "logits"):
        first, *_, last = (sum(entry["terms"][name] for entry in entries if entry["epoch"] == at) for at in range(8))
        assert last < 0.7 * first


def test_the_taught_folder_is_an_adapter_like_any_other(folder: Path, taught: TrainResult):
    assert taught.release == folder / "taught" / "last"
    before, after = (p_defects(vlm, rows(folder), _prompt(folder), 4) for vlm in (_student(folder), _taught(taught)))
    assert float(np.abs(np.subtract(before, after)).max()) > 1e-3
    assert trained_with(taught.release).lora_rank == 2
    assert [check.right for check in check_files(taught.release)] == [True]
    assert check_files(taught.release)[0].expected == taught.summary["adapter_sha256"]
    learnt = [line.split()[0] for line in (folder / "taught/trained_on.txt").read_text().splitlines()]
    known = [row.sha256 for row in (*read_rows(folder / "train.jsonl"), *rows(folder))]
    assert learnt == known, "what it was trained on before is not forgotten"


def _prompt(folder: Path) -> Any:
    return trained_with(folder / "student/last").prompt


def _student(folder: Path) -> Vlm:
    return adapted(folder, "student")


def _taught(taught: TrainResult) -> Vlm:
    return with_adapter(tiny.tiny_loupe(), taught.release)


def test_only_the_adapter_changes_and_neither_teacher_nor_projection_is_saved(folder: Path, tmp_path: Path):
    kept: list[Vlm] = []
    given = Teacher(adapted(folder, "teacher"), _prompt(folder))
    master = given.vlm
    frozen = {name: value.clone() for name, value in master.model.state_dict().items()}

    def load(settings: TrainSettings) -> Vlm:
        kept.append(tiny.tiny_loupe())
        return kept[0]

    parts = [Judged.of(row) for row in rows(folder)]
    result = distill(
        folder / "student/last", parts, tmp_path / "out", LESSON, teacher=lambda base, name: given, load=load
    )
    model = kept[0].model  # PEFT put the adapter into these very modules
    plain = tiny.tiny_loupe().model.state_dict()
    own = {
        name.replace("base_layer.", "").replace("original_module.", ""): value
        for name, value in model.state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name
    }
    assert own.keys() == plain.keys()
    assert all(torch.equal(own[name], plain[name]) for name in plain)
    assert all(
        weight.requires_grad == ("lora_" in n or "modules_to_save" in n) for n, weight in model.named_parameters()
    )
    assert not {id(weight) for weight in model.parameters()} & {id(weight) for weight in master.model.parameters()}
    assert all(torch.equal(value, frozen[name]) for name, value in master.model.state_dict().items())
    assert all(weight.grad is None for weight in master.model.parameters())
    before, after = (load_file(place / WEIGHTS) for place in (folder / "student/last", result.release))
    assert before.keys() == after.keys()
    assert {name: value.shape for name, value in before.items()} == {name: v.shape for name, v in after.items()}
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("vision_tower" in name for name in changed)
    assert any("language_model" in name for name in changed)
    assert any("projector" in name for name in changed)


def test_a_student_that_is_its_own_teacher_has_exactly_nothing_to_distil(folder: Path, tmp_path: Path):
    run(folder, tmp_path / "out", teacher="student")
    first = log(tmp_path / "out")[0]["terms"]
    assert first["answer"] > 0
    assert (first["query"], first["language"], first["logits"]) == (0.0, 0.0, 0.0)


def test_weights_of_zero_leave_the_labels_alone(folder: Path, tmp_path: Path):
    off = {"weight_features": 0.0, "weight_language": 0.0, "weight_logits": 0.0}
    run(folder, tmp_path / "out", LESSON.model_copy(update=off))
    assert all("terms" not in entry for entry in log(tmp_path / "out"))


def test_a_wider_teacher_teaches_through_a_learned_projection(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(tiny.TEXT, "hidden_size", 96)
    wide = Teacher(tiny.tiny_loupe(seed=5), _prompt(folder))
    monkeypatch.undo()
    parts = [Judged.of(row) for row in rows(folder)]
    given = {"teacher": lambda base, name: wide, "load": load_tiny}
    long = LESSON.model_copy(update={"epochs": 10, "projector_lr": 1e-2})
    distill(folder / "student/last", parts, tmp_path / "out", long, **given)
    for name in ("query", "language"):
        first, *_, last = (e["terms"][name] for e in log(tmp_path / "out"))
        assert last < 0.9 * first
    assert not [name for name in load_file(tmp_path / "out/last" / WEIGHTS) if "width" in name]


def test_a_teacher_shares_the_frozen_base_and_nobody_teaches_himself(tmp_path: Path):
    folder = str(save_tiny("smolvlm", tmp_path / "smolvlm"))
    other = save_tiny_adapter(tmp_path / "smolvlm", tmp_path / "adapter")
    bare = MllmSettings(model=folder, dtype="float32")
    base = load_vlm(bare)
    own = {id(weight) for weight in base.model.parameters()}

    def shared(settings: MllmSettings) -> int:
        return sum(id(weight) in own for weight in load_teacher(settings, base, folder).vlm.model.parameters())

    assert shared(bare.model_copy(update={"adapter": other})) == len(own)
    assert shared(bare) == 0, "the student's adapter is put into the base: it must not be the teacher's"


# -- stopping and refusing


class Stops:
    def __init__(self, at: int) -> None:
        self.at = at

    def said(self, text: str) -> None:
        pass

    def stepped(self, step: int, total: int, entry: dict[str, Any]) -> None:
        if step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_run_goes_on_to_the_same_adapter(folder: Path, taught: TrainResult, tmp_path: Path):
    with pytest.raises(Interrupted, match="stopped at step 3 of 4"):
        run(folder, tmp_path / "out", watcher=Stops(3))
    again = run(folder, tmp_path / "out")
    assert [entry["terms"] for entry in log(tmp_path / "out")] == [e["terms"] for e in log(folder / "taught")]
    assert sha256_file(again.release / WEIGHTS) == sha256_file(taught.release / WEIGHTS)
    assert run(folder, tmp_path / "out").repeated


def test_another_teacher_or_other_weights_never_go_on_with_a_run(folder: Path, taught: TrainResult):
    with pytest.raises(BadInput, match="begun with other data: teacher"):
        run(folder, folder / "taught", teacher="student")
    with pytest.raises(BadInput, match="begun with other data: settings"):
        run(folder, folder / "taught", LESSON.model_copy(update={"weight_language": 0.5}))


def test_an_adapter_without_a_record_and_no_parts_are_refused(folder: Path, tmp_path: Path):
    alone = shutil.copytree(folder / "student/last", tmp_path / "alone")
    parts = [Judged.of(row) for row in rows(folder)]
    with pytest.raises(BadInput, match="no record of its training"):
        distill(alone, parts, tmp_path / "out", LESSON, teacher=lambda base, name: None, load=load_tiny)
    with pytest.raises(BadInput, match="nothing to learn from"):
        distill(folder / "student/last", [], tmp_path / "out", LESSON, teacher=lambda base, name: None, load=load_tiny)


# -- as a command, across families


def test_the_command_teaches_a_llava_by_a_smolvlm(tmp_path: Path):
    make_files(tmp_path, n_train=8, n_val=4)
    for family in ("llava", "smolvlm"):
        save_tiny(family, tmp_path / family)
    own = (
        "--preset",
        "tiny",
        "--set",
        f"model={tmp_path / 'llava'}",
        "--set",
        "epochs=1",
        "--set",
        "train_projector=1",
    )
    files = ("--train", tmp_path / "train.jsonl", "--val", tmp_path / "val.jsonl", "--out", tmp_path / "run")
    assert saec("train", *own, *files).code == 0
    student = ("learn", "distill", "--student", tmp_path / "run/last", "--samples", tmp_path / "val.jsonl")
    command = (*student, "--teacher", tmp_path / "smolvlm", "--out", tmp_path / "taught", "--set", "distill.epochs=1")
    told = saec(*command)
    assert told.code == 0, told.err
    assert "4 parts, taught by smolvlm" in told.out
    assert files_gate(str(tmp_path / "llava"), check_files(tmp_path / "taught/last")).passed
    assert "nothing was done" in saec(*command).out
    assert "no such file" in saec(*student[:-1], tmp_path / "none.jsonl", *command[6:]).error().lower()
    assert "pass --desk DIR or --samples FILE" in saec(*student[:-2], *command[6:]).error()
    assert "no desk with opinions" in saec(*student[:-2], "--desk", tmp_path, *command[6:]).error()
