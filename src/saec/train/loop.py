"""The training loop: plain PyTorch, the same for every family, resumable at any moment.

Loss is the mean cross-entropy of an answer's tokens, averaged over the questions of a step: a label of one token weighs
as much as a sentence. LoRA after Hu et al. 2021, NF4 after Dettmers et al. 2023 (QLoRA), recipe of SAEC section 4.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from saec import __version__
from saec.config import MllmSettings
from saec.data.hashing import sha256_file
from saec.errors import BadInput, GateFailed
from saec.train import adapter, checkpoint, evaluation, record
from saec.train.ahead import ahead, chunks
from saec.train.checkpoint import Position
from saec.train.config import TrainSettings
from saec.train.files import append_line, cut_lines, read_lines
from saec.train.leaks import check_leaks
from saec.train.rows import Example, Row, epoch_plan, pose, read_rows
from saec.train.schedule import rate, steps_of
from saec.train.stop import Stop
from saec.vlm.encode import IGNORED
from saec.vlm.load import Vlm, load_vlm
from saec.vlm.run import on_device
from saec.vlm.trained import WEIGHTS


class Watcher(Protocol):
    """Who is told how it goes."""

    def said(self, text: str) -> None:
        """Hear what is being done."""
        ...

    def stepped(self, step: int, total: int, entry: dict[str, Any]) -> None:
        """Hear of one optimizer step: ``entry`` is the line of the log, with ``images_per_s`` besides."""
        ...


class Silent:
    """Watches nothing."""

    def said(self, text: str) -> None:
        """Ignore it."""

    def stepped(self, step: int, total: int, entry: dict[str, Any]) -> None:
        """Ignore it."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run: the release folder, and ``train.json`` as read. ``repeated``: it had been finished before."""

    release: Path
    summary: dict[str, Any]
    repeated: bool = False


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: all is saved at ``step``, and the same command goes on from there."""

    def __init__(self, step: int, total: int) -> None:
        self.step, self.total = step, total
        super().__init__(f"stopped at step {step} of {total}")


@dataclass(frozen=True, slots=True)
class _Run:
    settings: TrainSettings
    out: Path
    vlm: Vlm
    train: Sequence[Row]
    val: Sequence[Row]
    data: dict[str, str]
    learning: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    total: int
    watcher: Watcher

    def save(self, at: Position) -> None:
        checkpoint.save_checkpoint(self.out / "checkpoints", at, self.learning, self.optimizer)


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
    run = _Run(settings, out, vlm, rows, held_out, data, learning, optimizer, total, watcher)
    # Nothing is written before all is known to be right: a corrected command finds the folder free.
    with _disk(out), record.begun(out, settings, data, rows), Stop() as stop:
        at = _resumed(run)
        while at.epoch < settings.epochs:
            at = _epoch(run, at, stop)
            _evaluate(run, at)
            at = replace(at, epoch=at.epoch + 1, done=0)
            if stop and at.epoch < settings.epochs:
                raise Interrupted(at.step, run.total)
        return _finish(run, at)


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """A full disk is told in one line, and costs no more than what came after the last checkpoint."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        fix = "make room and give the same command again: it goes on from the last checkpoint"
        raise BadInput(f"the run cannot be written ({error})", where=out, fix=fix) from error


def _resumed(run: _Run) -> Position:
    """Return where a killed run goes on, with what came after its checkpoint forgotten: it is done, and told, again."""
    at = checkpoint.load_checkpoint(run.out / "checkpoints", run.learning, run.optimizer) or Position()
    if at.step:
        run.watcher.said(f"resuming at step {at.step} of {run.total}")
    for log in (record.LOG, record.EVALUATIONS):
        cut_lines(run.out / log, lambda entry: entry["step"] <= at.step)
    return at


def _epoch(run: _Run, at: Position, stop: Stop) -> Position:
    """Train what is left of an epoch and return the position at its end, where a checkpoint lies."""
    settings = run.settings
    batches = chunks(epoch_plan(run.train, settings, at.epoch), settings.batch_size)
    steps = chunks(batches, settings.accumulation)[at.done :]
    run.vlm.model.train()
    began, passed = time.monotonic(), 0
    with closing(ahead(partial(_encode, run, batch) for step in steps for batch in step)) as inputs:
        for step in steps:
            examples, started = sum(map(len, step)), time.monotonic()
            loss = _step(run, (next(inputs) for _ in step), examples, at.step)
            at = replace(at, step=at.step + 1, done=at.done + 1, seconds=at.seconds + time.monotonic() - started)
            entry = {"step": at.step, "epoch": at.epoch, "loss": loss, "lr": run.optimizer.param_groups[0]["lr"]}
            append_line(run.out / record.LOG, {**entry, "seconds": round(at.seconds, 3)})
            passed += examples
            run.watcher.stepped(at.step, run.total, {**entry, "images_per_s": passed / (time.monotonic() - began)})
            if stop or (at.step % settings.checkpoint_every == 0 and step is not steps[-1]):
                run.save(at)
            if stop:
                raise Interrupted(at.step, run.total)
    if steps:
        run.save(at)
    return at


def _encode(run: _Run, batch: Sequence[Example]) -> dict[str, Tensor]:
    posed = [pose(example, run.settings.prompt) for example in batch]
    inputs: dict[str, Tensor] = run.vlm.encoder.encode([asked for asked, _ in posed], [answer for _, answer in posed])
    return inputs


def _step(run: _Run, inputs: Iterable[dict[str, Tensor]], examples: int, done: int) -> float:
    """Take one step of the optimizer over the forward passes ``inputs``; return the mean loss of its examples."""
    loss = torch.zeros((), device=run.vlm.device)
    for batch in inputs:
        part = answer_loss(run.vlm, batch) / examples
        part.backward()
        loss += part.detach()
    norm = nn.utils.clip_grad_norm_(run.learning.values(), run.settings.max_grad_norm)
    value = float(loss)
    for what, number in (("loss", value), ("gradient's norm", float(norm))):
        if not math.isfinite(number):
            raise GateFailed(f"the {what} is {number} at step {done + 1}: lower the learning rates and begin anew")
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * rate(done, run.total, run.settings)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return value


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
    run.watcher.said(f"evaluating epoch {at.epoch + 1}")
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
    run.watcher.said(f"epoch {at.epoch + 1}: AUROC {shown['auroc']}, accuracy {shown['accuracy']}")


def _rank(entry: dict[str, Any]) -> tuple[float, float]:
    """Order of evaluations: by AUROC; where the validation file has one class only, by accuracy."""
    return (-1.0 if entry["auroc"] is None else entry["auroc"], entry["accuracy"] if entry["auroc"] is None else 0.0)


def _finish(run: _Run, at: Position) -> TrainResult:
    release = run.out / run.settings.keep
    evaluations = read_lines(run.out / record.EVALUATIONS)
    best = max(evaluations, key=_rank)
    summary = {
        "format": "saec-train/1",
        "version": __version__,
        "model": run.vlm.base_id,
        "release": run.settings.keep,
        "adapter_sha256": sha256_file(release / WEIGHTS),
        "best_epoch": best["epoch"],
        "settings": run.settings.model_dump(mode="json"),
        "data": {"sha256": run.data, "n_train": len(run.train), "n_val": len(run.val)},
        "trainable_weights": sum(weight.numel() for weight in run.learning.values()),
        "steps": at.step,
        "train_seconds": round(at.seconds, 3),
        "memory": record.peak_memory(),
        "epochs": evaluations,
    }
    record.write_summary(run.out, summary)
    return TrainResult(release, summary)
