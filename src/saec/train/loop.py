"""The training loop: plain PyTorch, the same for every family, resumable at any moment.

Loss is the mean cross-entropy of an answer's tokens, averaged over the questions of a step: a label of one token weighs
as much as a sentence. LoRA after Hu et al. 2021, NF4 after Dettmers et al. 2023 (QLoRA), recipe of SAEC section 4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saec.config import MllmSettings
from saec.train import adapter, evaluation, record
from saec.train.checkpoint import Position
from saec.train.config import TrainSettings
from saec.train.files import append_line, read_lines
from saec.train.leaks import check_leaks
from saec.train.rows import Example, Row, epoch_plan, pose, read_rows
from saec.train.schedule import steps_of
from saec.train.steps import Interrupted, Silent, Steps, Watcher, full_disk_told
from saec.train.stop import Stop
from saec.vlm.encode import IGNORED
from saec.vlm.load import Vlm, load_vlm
from saec.vlm.run import on_device


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run: the release folder, and ``train.json`` as read. ``repeated``: it had been finished before."""

    release: Path
    summary: dict[str, Any]
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class _Run:
    steps: Steps[Example, dict[str, Tensor]]
    vlm: Vlm
    train: Sequence[Row]
    val: Sequence[Row]
    data: dict[str, str]

    @property
    def settings(self) -> TrainSettings:
        return self.steps.settings

    @property
    def out(self) -> Path:
        return self.steps.out


def load_base(settings: TrainSettings) -> Vlm:
    """Load the base model of a run, without any adapter."""
    return load_vlm(
        MllmSettings(
            model=settings.model,
            dtype=settings.dtype,
            four_bit=settings.four_bit,
            device=settings.device,
            attention=settings.attention,
            max_side=settings.max_side,
            side_multiple=settings.side_multiple,
        )
    )


def train(
    settings: TrainSettings,
    train_file: Path,
    val_file: Path,
    out: Path,
    *,
    load: Callable[[TrainSettings], Vlm] = load_base,
    watcher: Watcher | None = None,
) -> TrainResult:
    """Fine-tune a model, or go on with a run that was stopped or killed, in the folder ``out``.

    It then holds ``best/`` and ``last/`` (PEFT adapter folders), ``train.log.jsonl``, ``eval.jsonl``, ``loss.png``,
    ``trained_on.txt`` (SHA-256 of every training image), and ``train.json``, written last.

    Raises:
        BadInput: settings, rows, model or folder that cannot be used, another run's folder, or a full disk.
        GateFailed: training and validation share an image, or the loss is no number.
        Interrupted: it was told to stop; a checkpoint is written.
    """
    watcher = watcher or Silent()
    data = record.hashes_of({"train": train_file, "val": val_file})
    finished = record.check_run(out, settings, data)
    if finished is not None:
        return TrainResult(out / str(finished["release"]), finished, repeated=True)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    rows, held_out = read_rows(train_file), read_rows(val_file)
    watcher.said(f"checking {len(rows)} training and {len(held_out)} validation images for leaks")
    check_leaks(rows, held_out)
    watcher.said(f"loading {settings.model}")
    vlm = adapter.add_adapter(load(settings), settings)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(vlm.model, settings), weight_decay=settings.weight_decay)
    total = sum(steps_of(len(epoch_plan(rows, settings, epoch)), settings) for epoch in range(settings.epochs))
    learning = adapter.trainable(vlm.model)
    encode, loss = partial(_encode, vlm, settings), partial(_loss, vlm)
    steps = Steps(settings, out, learning, optimizer, total, watcher, encode, loss)
    run = _Run(steps, vlm, rows, held_out, data)
    learnt = record.learnt((row.sha256, row.part_id) for row in rows)
    # Nothing is written before all is known to be right: a corrected command finds the folder free.
    with full_disk_told(out), record.begun(out, settings, data, learnt), Stop() as stop:
        at = steps.resumed()
        while at.epoch < settings.epochs:
            vlm.model.train()
            at = steps.epoch(at, epoch_plan(rows, settings, at.epoch), stop)
            _evaluate(run, at)
            at = replace(at, epoch=at.epoch + 1, done=0)
            if stop and at.epoch < settings.epochs:
                raise Interrupted(at.step, total)
        return _finish(run, at)


def _encode(vlm: Vlm, settings: TrainSettings, batch: Sequence[Example]) -> dict[str, Tensor]:
    posed = [pose(example, settings.prompt) for example in batch]
    inputs: dict[str, Tensor] = vlm.encoder.encode([asked for asked, _ in posed], [answer for _, answer in posed])
    return inputs


def _loss(vlm: Vlm, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"answer": answer_loss(vlm, batch)}


def answer_loss(vlm: Vlm, batch: dict[str, Tensor]) -> Tensor:
    """Return the sum over a batch's examples of the mean cross-entropy of their answer tokens, a float32 scalar.

    ``batch`` is what :meth:`Encoder.encode` gives with answers. Only positions from the first answer on are put
    through the vocabulary: of a prompt of 1,000 tokens, the last few.
    """
    targets = batch["labels"][:, 1:]  # the state before a token predicts it
    asked = targets != IGNORED
    first = int(asked.any(0).nonzero()[0])
    kept = batch["labels"].shape[1] - first
    inputs = on_device(vlm, {name: value for name, value in batch.items() if name != "labels"})
    logits = vlm.model(**inputs, logits_to_keep=kept, use_cache=False).logits[:, :-1]
    targets, asked = targets[:, first:].to(vlm.device), asked[:, first:].to(vlm.device)
    losses = nn.functional.cross_entropy(logits[asked].float(), targets[asked], reduction="none")
    weight = (asked / asked.sum(1, keepdim=True))[asked]
    return (losses * weight).sum()


def _evaluate(run: _Run, at: Position) -> None:
    """Evaluate after an epoch and save the adapters, unless a killed run already did."""
    former = read_lines(run.out / record.EVALUATIONS)
    if any(entry["epoch"] == at.epoch for entry in former):
        return
    run.steps.watcher.said(f"evaluating epoch {at.epoch + 1}")
    started = time.monotonic()
    p = evaluation.p_defects(run.vlm, run.val, run.settings.prompt, run.settings.evaluate_batch)
    found = evaluation.figures(run.val, p)
    if all(_rank(found) > _rank(entry) for entry in former):
        adapter.save_release(run.vlm, run.out / "best", dtype=run.settings.release_dtype)
    adapter.save_release(run.vlm, run.out / "last", dtype=run.settings.release_dtype)
    seconds = round(time.monotonic() - started, 3)
    # Last: a line in this log means that the adapters are on the disk.
    append_line(run.out / record.EVALUATIONS, {"epoch": at.epoch, "step": at.step, **found, "seconds": seconds})
    record.draw_losses(run.out)
    shown = {name: "–" if found[name] is None else f"{found[name]:.4f}" for name in ("auroc", "accuracy")}
    run.steps.watcher.said(f"epoch {at.epoch + 1}: AUROC {shown['auroc']}, accuracy {shown['accuracy']}")


def _rank(entry: dict[str, Any]) -> tuple[float, float]:
    """Order of evaluations: by AUROC; where the validation file has one class only, by accuracy."""
    return (-1.0 if entry["auroc"] is None else entry["auroc"], entry["accuracy"] if entry["auroc"] is None else 0.0)


def _finish(run: _Run, at: Position) -> TrainResult:
    release = run.out / run.settings.keep
    evaluations = read_lines(run.out / record.EVALUATIONS)
    data = {"sha256": run.data, "n_train": len(run.train), "n_val": len(run.val)}
    weights = sum(weight.numel() for weight in run.steps.learning.values())
    summary = record.summary_of(run.vlm.base_id, release, run.settings, data, weights, at)
    summary |= {"best_epoch": max(evaluations, key=_rank)["epoch"], "epochs": evaluations}
    record.write_summary(run.out, summary)
    return TrainResult(release, summary)
