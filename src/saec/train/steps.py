"""The steps of a run, whatever its loss: order, schedule, log, checkpoints, and the wish to stop between two steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from saec.errors import BadInput, GateFailed
from saec.train import checkpoint, record
from saec.train.ahead import ahead, chunks
from saec.train.checkpoint import Position
from saec.train.config import TrainSettings
from saec.train.files import append_line, cut_lines
from saec.train.schedule import rate
from saec.train.stop import Stop

Example = TypeVar("Example")
Inputs = TypeVar("Inputs")


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


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: all is saved at ``step``, and the same command goes on from there."""

    def __init__(self, step: int, total: int) -> None:
        self.step, self.total = step, total
        super().__init__(f"stopped at step {step} of {total}")


@contextmanager
def full_disk_told(out: Path) -> Iterator[None]:
    """A full disk is told in one line, and costs no more than what came after the last checkpoint."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        fix = "make room and give the same command again: it goes on from the last checkpoint"
        raise BadInput(f"the run cannot be written ({error})", where=out, fix=fix) from error


@dataclass(frozen=True, slots=True)
class Steps(Generic[Example, Inputs]):
    """Takes the optimizer's steps of a run in the folder ``out`` and can go on after a kill with the very same losses.

    ``encode`` makes the inputs of one forward pass, ahead in a thread. ``loss`` gives the weighted terms of the loss by
    name, each summed over the examples of the pass: what is minimised is their sum, averaged over a step's examples.
    Each line of the log has that sum, and the terms where there are several.
    """

    settings: TrainSettings
    out: Path
    learning: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    total: int
    watcher: Watcher
    encode: Callable[[Sequence[Example]], Inputs]
    loss: Callable[[Inputs], Mapping[str, Tensor]]

    def resumed(self) -> Position:
        """Return where a killed run goes on; what it logged after its checkpoint goes, for it is done again."""
        at = checkpoint.load_checkpoint(self.out / "checkpoints", self.learning, self.optimizer) or Position()
        if at.step:
            self.watcher.said(f"resuming at step {at.step} of {self.total}")
        for log in (record.LOG, record.EVALUATIONS):
            cut_lines(self.out / log, lambda entry: entry["step"] <= at.step)
        return at

    def epoch(self, at: Position, examples: Sequence[Example], stop: Stop) -> Position:
        """Do what is left of an epoch with these examples; return the position at its end, where a checkpoint lies.

        Raises:
            Interrupted: it was told to stop; a checkpoint is written.
            GateFailed: the loss or the gradient is no number.
        """
        batches = chunks(examples, self.settings.batch_size)
        steps = chunks(batches, self.settings.accumulation)[at.done :]
        began, passed = time.monotonic(), 0
        with closing(ahead(partial(self.encode, batch) for step in steps for batch in step)) as inputs:
            for step in steps:
                count, started = sum(map(len, step)), time.monotonic()
                terms = self._step((next(inputs) for _ in step), count, at.step)
                at = replace(at, step=at.step + 1, done=at.done + 1, seconds=at.seconds + time.monotonic() - started)
                entry: dict[str, Any] = {"step": at.step, "epoch": at.epoch, "loss": sum(terms.values())}
                entry |= {"terms": terms} if len(terms) > 1 else {}
                entry["lr"] = self.optimizer.param_groups[0]["lr"]
                append_line(self.out / record.LOG, {**entry, "seconds": round(at.seconds, 3)})
                passed += count
                self.watcher.stepped(at.step, self.total, entry | {"images_per_s": passed / (time.monotonic() - began)})
                if stop or (at.step % self.settings.checkpoint_every == 0 and step is not steps[-1]):
                    self._save(at)
                if stop:
                    raise Interrupted(at.step, self.total)
        if steps:
            self._save(at)
        return at

    def _save(self, at: Position) -> None:
        checkpoint.save_checkpoint(self.out / "checkpoints", at, self.learning, self.optimizer)

    def _step(self, inputs: Iterable[Inputs], examples: int, done: int) -> dict[str, float]:
        """Take one step of the optimizer over the forward passes ``inputs``; return the loss's terms."""
        found: dict[str, float] = {}
        for batch in inputs:
            terms = {name: term / examples for name, term in self.loss(batch).items()}
            torch.stack([*terms.values()]).sum().backward()
            for name, term in terms.items():
                found[name] = found.get(name, 0.0) + float(term.detach())
        norm = nn.utils.clip_grad_norm_(self.learning.values(), self.settings.max_grad_norm)
        for what, number in (("loss", sum(found.values())), ("gradient's norm", float(norm))):
            if not math.isfinite(number):
                raise GateFailed(f"the {what} is {number} at step {done + 1}: lower the learning rates and begin anew")
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate(done, self.total, self.settings)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return found
