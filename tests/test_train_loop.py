"""A run learns, is resumed after a kill with the very same losses, and refuses what would make its figures lies."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="the train extra is not installed")

import torch
from torch import nn

import train_tiny
from saec.config import MllmSettings
from saec.data.hashing import sha256_file
from saec.data.verify import content_hashes
from saec.errors import BadInput, GateFailed
from saec.fleet.sqlite_file import lock
from saec.train import checkpoint
from saec.train.ahead import ahead
from saec.train.loop import TrainResult, answer_loss, train
from saec.train.steps import Interrupted
from saec.vlm.load import Vlm
from saec.vlm.trained import as_trained
from train_rows import make_files, row, write_rows
from train_tiny import TinyModel, load_tiny, settings_for

RELEASE = ["adapter_config.json", "adapter_model.safetensors", "saec.json"]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train.log.jsonl").read_text().splitlines()]


def run(folder: Path, name: str, *overrides: str, **more: Any) -> TrainResult:
    files = folder / "train.jsonl", folder / "val.jsonl"
    return train(settings_for("epochs=3", *overrides), *files, folder / name, load=load_tiny, **more)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and one finished run of 3 epochs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    make_files(folder)
    run(folder, "run")
    return folder


@pytest.fixture
def rows(undisturbed: Path, tmp_path: Path) -> Path:
    """The same rows for a run of a test's own."""
    shutil.copytree(undisturbed / "images", tmp_path / "images")
    for name in ("train.jsonl", "val.jsonl"):
        shutil.copy(undisturbed / name, tmp_path / name)
    return tmp_path


class Stops:
    """Asks the process to stop, or fails, at a step."""

    def __init__(self, at: int, what: BaseException | None = None) -> None:
        self.at, self.what, self.said_lines = at, what, list[str]()

    def said(self, text: str) -> None:
        self.said_lines.append(text)

    def stepped(self, step: int, total: int, entry: dict[str, Any]) -> None:
        if step == self.at:
            if self.what is not None:
                raise self.what
            os.kill(os.getpid(), signal.SIGINT)


# -- what a run does


def test_the_loss_falls_and_the_folder_holds_all_that_is_promised(undisturbed: Path):
    out = undisturbed / "run"
    found = losses(out)
    assert sum(found[-5:]) < 0.97 * sum(found[:5])
    for name in ("best", "last"):
        assert sorted(path.name for path in (out / name).iterdir()) == RELEASE
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "train.json").read_text())
    assert summary["model"] == "tiny"
    assert summary["release"] == "best"
    assert summary["adapter_sha256"] == sha256_file(out / "best" / "adapter_model.safetensors")
    assert summary["data"]["sha256"]["train"] == sha256_file(undisturbed / "train.jsonl")
    assert [entry["epoch"] for entry in summary["epochs"]] == [0, 1, 2]
    assert set(summary["epochs"][0]["per_product"]) == {"bolt", "nut"}
    assert summary["memory"]["rss_peak_mb"] > 50
    assert summary["steps"] == len(found)


def test_the_list_of_training_images_is_what_the_holdout_builders_exclude(undisturbed: Path):
    images = {json.loads(line)["sha256"] for line in (undisturbed / "train.jsonl").read_text().splitlines()}
    assert content_hashes([undisturbed / "run" / "trained_on.txt"]) == images


def test_the_best_adapter_is_that_of_the_epoch_with_the_highest_auroc(undisturbed: Path):
    out = undisturbed / "run"
    summary = json.loads((out / "train.json").read_text())
    aurocs = [entry["auroc"] for entry in summary["epochs"]]
    assert summary["best_epoch"] == aurocs.index(max(aurocs))
    same = sha256_file(out / "best" / RELEASE[1]) == sha256_file(out / "last" / RELEASE[1])
    assert same == (summary["best_epoch"] == 2)


def test_nothing_but_lora_and_projector_has_changed(rows: Path):
    kept: list[Vlm] = []

    def load(settings: Any) -> Vlm:
        kept.append(load_tiny(settings))
        return kept[0]

    files = rows / "train.jsonl", rows / "val.jsonl"
    train(settings_for("epochs=1"), *files, rows / "run", load=load)
    before = TinyModel().state_dict()
    after = {
        name.replace("base_layer.", "").replace("original_module.", ""): value
        for name, value in kept[0].model.state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    learnt = [name for name, weight in kept[0].model.named_parameters() if weight.grad is not None]
    assert learnt == []  # cleared after each step, and never there for frozen weights


# -- the loss


class Says(nn.Module):
    """Answers with fixed logits [B, L, V] and remembers for how many positions."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int, use_cache: bool) -> Any:
        self.kept = logits_to_keep
        return type("Output", (), {"logits": self.logits[:, -logits_to_keep:]})


def test_the_loss_is_the_mean_over_each_answers_tokens_summed_over_the_examples():
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 5)
    ids = torch.randint(0, 5, (2, 6))
    labels = torch.full((2, 6), -100)
    labels[0, 3:5] = ids[0, 3:5]  # an answer of two tokens, then padding
    labels[1, 3:6] = ids[1, 3:6]
    model = Says(logits)
    loss = answer_loss(Vlm(model, train_tiny.TinyEncoder(), "says"), {"input_ids": ids, "labels": labels})
    log_p = logits.log_softmax(-1)
    one = -(log_p[0, 2, ids[0, 3]] + log_p[0, 3, ids[0, 4]]) / 2
    other = -(log_p[1, 2, ids[1, 3]] + log_p[1, 3, ids[1, 4]] + log_p[1, 4, ids[1, 5]]) / 3
    assert loss.item() == pytest.approx((one + other).item(), rel=1e-6)
    assert model.kept == 4  # from the state before the first answer token on
    loss.backward()
    touched = model.logits.grad.abs().sum(-1) > 0
    assert touched.tolist() == [[False, False, True, True, False, False], [False, False, True, True, True, False]]


def test_accumulated_small_batches_step_as_one_large_batch_does(rows: Path):
    for name, batch, accumulation in (("large", 8, 1), ("small", 2, 4)):
        run(rows, name, "epochs=1", "lora_dropout=0", f"batch_size={batch}", f"accumulation={accumulation}")
    assert losses(rows / "small") == pytest.approx(losses(rows / "large"), rel=1e-4)


def test_work_ahead_keeps_its_order_and_its_errors():
    assert list(ahead((lambda i=i: i * i) for i in range(20))) == [i * i for i in range(20)]
    results = ahead([lambda: 1, lambda: 1 // 0, lambda: 3], depth=1)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


# -- stopping, killing, resuming


def test_a_killed_run_loses_at_most_one_interval_and_goes_on_with_the_same_losses(rows: Path, undisturbed: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, train_tiny.__file__, str(rows), "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 19 "):
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
    assert len(losses(rows / "killed")) >= 19
    watcher = Stops(at=-1)
    run(rows, "killed", watcher=watcher)
    (resumed,) = [line for line in watcher.said_lines if line.startswith("resuming")]
    assert int(resumed.split()[3]) >= 18  # the interval is 2 steps
    assert losses(rows / "killed") == losses(undisturbed / "run")
    for name in ("best", "last"):
        assert sha256_file(rows / "killed" / name / RELEASE[1]) == sha256_file(undisturbed / "run" / name / RELEASE[1])


@pytest.mark.parametrize("at", [1, 14, 15])  # the first step, the last one of an epoch, the first of the next
def test_ctrl_c_saves_at_once_and_nothing_is_lost(at: int, rows: Path, undisturbed: Path):
    with pytest.raises(Interrupted, match=f"stopped at step {at} of"):
        run(rows, "stopped", watcher=Stops(at))
    assert len(losses(rows / "stopped")) == at
    run(rows, "stopped")
    assert losses(rows / "stopped") == losses(undisturbed / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    rows: Path, undisturbed: Path, caplog: pytest.LogCaptureFixture
):
    for damage, name in ((b"", "weights.safetensors"), (None, "optimizer.safetensors"), (b"{}", "state.json")):
        with pytest.raises(ZeroDivisionError):
            run(rows, "run", watcher=Stops(9, ZeroDivisionError()))
        former, newest = sorted((rows / "run/checkpoints").glob("step-*"))
        if damage is None:
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(damage)
        with pytest.raises(ZeroDivisionError):
            run(rows, "run", watcher=(watcher := Stops(9, ZeroDivisionError())))
        assert f"resuming at step {int(former.name[5:])} of" in " ".join(watcher.said_lines)
        assert f"damaged checkpoint {newest}" in caplog.text
        assert losses(rows / "run") == losses(undisturbed / "run")[:9]
        shutil.rmtree(rows / "run")


def test_a_full_disk_is_told_and_costs_no_checkpoint(rows: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch):
    written = checkpoint.save_file

    def fills_up(tensors: dict[str, torch.Tensor], file: Path) -> None:
        if "step-00000006" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        written(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", fills_up)
    with pytest.raises(BadInput, match=r"cannot be written \(.*No space left on device.*same command again"):
        run(rows, "run")
    monkeypatch.undo()
    assert list((rows / "run/checkpoints").glob(".*"))
    watcher = Stops(at=-1)
    run(rows, "run", watcher=watcher)
    assert "resuming at step 4 of" in " ".join(watcher.said_lines)
    assert not list((rows / "run/checkpoints").glob(".*")), "what the full disk left half is gone"
    assert losses(rows / "run") == losses(undisturbed / "run")


def test_a_finished_run_is_not_done_again(undisturbed: Path):
    out = undisturbed / "run"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    result = run(undisturbed, "run", "threads=1", "checkpoint_every=7")
    assert result.repeated
    assert result.release == out / "best"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_other_settings_other_data_and_a_foreign_folder_are_refused_by_name(rows: Path, undisturbed: Path):
    with pytest.raises(BadInput, match=r"begun with lr=0\.005"):
        run(undisturbed, "run", "lr=1e-4")
    with pytest.raises(BadInput, match="begun with other data: train"):
        files = write_rows(undisturbed / "other.jsonl", [row(undisturbed, 77, label=0)]), undisturbed / "val.jsonl"
        train(settings_for("epochs=3"), *files, undisturbed / "run", load=load_tiny)
    with pytest.raises(BadInput, match="not empty and no training run"):
        run(rows, "images")


def test_two_processes_never_train_in_one_folder(rows: Path):
    (rows / "run").mkdir()
    with closing(lock(rows / "run" / "run.json")), pytest.raises(BadInput, match="other process that trains here"):
        run(rows, "run", "epochs=1")
    run(rows, "run", "epochs=1")


def test_an_adapter_of_an_unfinished_run_is_served_at_the_size_of_its_training(rows: Path):
    with pytest.raises(Interrupted):
        run(rows, "run", watcher=Stops(15))  # after the first epoch
    served = as_trained(MllmSettings(adapter=rows / "run" / "best"))
    assert (served.max_side, served.side_multiple) == (56, 28)


# -- figures that would be lies


def test_an_image_in_both_files_stops_the_run_before_its_first_step(rows: Path):
    first = json.loads((rows / "train.jsonl").read_text().splitlines()[0])
    with (rows / "val.jsonl").open("a") as file:
        file.write(json.dumps({**first, "group": "another", "split": "val"}) + "\n")
    with pytest.raises(GateFailed, match=r"images/0\.png and .*images/0\.png"):
        run(rows, "run")
    assert not (rows / "run" / "train.log.jsonl").exists()


def test_a_group_in_both_files_stops_the_run(rows: Path):
    with (rows / "val.jsonl").open("a") as file:
        file.write(json.dumps(row(rows, 5000, label=0, split="val", group="g3")) + "\n")
    with pytest.raises(GateFailed, match=r"share the group g3: .*images/3\.png and .*images/5000\.png"):
        run(rows, "run")


def test_what_was_refused_leaves_the_folder_free_for_the_corrected_command(rows: Path):
    val = (rows / "val.jsonl").read_text()
    (rows / "val.jsonl").write_text((rows / "train.jsonl").read_text())
    with pytest.raises(GateFailed, match="share"):
        run(rows, "run", "epochs=1")
    (rows / "val.jsonl").write_text(val)
    assert not run(rows, "run", "epochs=1").repeated


def test_an_image_that_changed_since_its_row_was_written_is_refused(rows: Path):
    shutil.copy(rows / "images/0.png", rows / "images/1.png")
    with pytest.raises(BadInput, match=r"not the one of the row.*images/1\.png"):
        run(rows, "run")


def test_a_loss_that_is_no_number_stops_the_run(rows: Path):
    with pytest.raises(GateFailed, match="the loss is nan at step"):
        run(rows, "run", "lr=1e30", "projector_lr=1e30", "max_grad_norm=1e30")
