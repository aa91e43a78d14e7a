"""Teaching an adapter: a student's LoRA and projector learn from a few parts that a teacher, or a person, has judged.

The loss is :mod:`saec.learn.akd`'s; steps, checkpoints and logs are those of ``saec train``, and so is what is left:
an adapter folder that is served, verified and exported like any other, with its record. Dropout is off, so that a
student which equals its teacher has nothing to learn. The teacher is no part of the student: it is held beside it,
shares at most the frozen base, and runs without gradients. The width projections are thrown away at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from saec.config import DistillSettings, MllmSettings, PromptSettings
from saec.data.hashing import sha256_file, sha256_json
from saec.errors import BadInput
from saec.learn.akd import akd_terms, projections
from saec.learn.features import look
from saec.train import adapter, record
from saec.train.config import TrainSettings
from saec.train.loop import TrainResult, load_base
from saec.train.release import trained_with
from saec.train.rows import Row, flipped, query_of
from saec.train.schedule import steps_of
from saec.train.steps import Interrupted, Silent, Steps, Watcher, full_disk_told
from saec.train.stop import Stop
from saec.types import Query
from saec.vlm.load import Vlm, load_vlm
from saec.vlm.prompt import Ask, build_question
from saec.vlm.run import bare
from saec.vlm.trained import TRAINED_ON, WEIGHTS, as_trained, run_record

RELEASE = "last"
"""The taught adapter's folder in that of the run."""

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A part to learn from. ``p_defect`` is the label: a teacher's, soft, or a person's, 0 or 1, which wins.
    ``weight`` says how much that label counts; ``sha256`` is that of the image's file."""

    query: Query
    sha256: str
    p_defect: float
    weight: float = 1.0

    @classmethod
    def of(cls, row: Row) -> Judged:
        """Return a fine-tuning row with its image read.

        Raises:
            BadInput: the image or the anomaly map cannot be read.
        """
        return cls(query_of(row), row.sha256, row.p_defect)


@dataclass(frozen=True, slots=True)
class Teacher:
    """A loaded model, and how questions are put to it."""

    vlm: Vlm
    prompt: PromptSettings


def load_teacher(settings: MllmSettings, base: Vlm, base_model: str) -> Teacher:
    """Load the teacher; an adapter of the student's base model shares the weights of ``base``.

    Raises:
        BadInput: see :func:`saec.vlm.load.load_vlm`.
    """
    settings = as_trained(settings)
    # A bare base is loaded for itself: the student's adapter will be put into ``base``, and nobody teaches himself.
    shared = settings.model == base_model and settings.adapter is not None
    return Teacher(load_vlm(settings, base=base if shared else None), settings)


def distill(
    student: Path,
    parts: Sequence[Judged],
    out: Path,
    settings: DistillSettings,
    *,
    teacher: Callable[[Vlm, str], Teacher],
    load: Callable[[TrainSettings], Vlm] = load_base,
    watcher: Watcher | None = None,
) -> TrainResult:
    """Teach a copy of the adapter ``student``, or go on with a run that was stopped or killed, in the folder ``out``.

    It then holds ``last/`` (a PEFT adapter folder), ``train.log.jsonl`` with every term of the loss, ``trained_on.txt``
    (also of what the student had learnt from before), and ``train.json``, written last. ``teacher`` is called with the
    student's base before that is changed, and with its name. The same seed gives the same adapter.

    Raises:
        BadInput: no parts, an adapter that was not trained here, another run's folder, or a full disk.
        GateFailed: the loss is no number.
        Interrupted: it was told to stop; a checkpoint is written.
    """
    watcher = watcher or Silent()
    if not parts:
        raise BadInput("nothing to learn from", fix="pass judged parts")
    how = _settings(student, settings)
    watcher.said(f"loading {how.model} and its teacher")
    base = load(how)
    master = teacher(base, how.model)
    data = _identity(student, parts, master, settings)
    finished = record.check_run(out, how, data)
    if finished is not None:
        return TrainResult(out / RELEASE, finished, repeated=True)
    vlm = adapter.add_adapter(base, how)
    vlm.model.eval()
    steps = _steps(vlm, master, len(parts), out, how, settings, watcher)
    learnt = record.learnt((part.sha256, part.query.part_id) for part in parts)
    with full_disk_told(out), record.begun(out, how, data, _learnt_before(student) + learnt), Stop() as stop:
        at = steps.resumed()
        while at.epoch < how.epochs:
            at = steps.epoch(at, _plan(parts, how, at.epoch), stop)
            at = replace(at, epoch=at.epoch + 1, done=0)
            if stop and at.epoch < how.epochs:
                raise Interrupted(at.step, steps.total)
        adapter.save_release(vlm, out / RELEASE, dtype=how.release_dtype)
        weights = sum(weight.numel() for weight in adapter.trainable(vlm.model).values())
        said = {"sha256": data, "n_train": len(parts)}
        summary = record.summary_of(vlm.base_id, out / RELEASE, how, said, weights, at)
        summary |= {"distillation": settings.model_dump(mode="json"), "teacher": master.vlm.model_id}
        record.write_summary(out, summary)
    return TrainResult(out / RELEASE, summary)


def _settings(student: Path, settings: DistillSettings) -> TrainSettings:
    """Return how the run trains: as the student was, but for the few steps and the rates of teaching."""
    trained = trained_with(student)
    if trained is None:
        raise BadInput("no record of its training lies with the adapter", where=student, fix="use one of saec train")
    same = settings.model_dump(include={"epochs", "batch_size", "lr", "projector_lr", "seed"})
    fixed = {"adapter": str(student), "accumulation": 1, "gradient_checkpointing": False, "keep": RELEASE}
    return trained.model_copy(update={**same, **fixed, "schedule": "cosine", "warmup": 0.1, "weight_decay": 0.0})


def _identity(student: Path, parts: Sequence[Judged], master: Teacher, settings: DistillSettings) -> dict[str, str]:
    """Return what must be the same for a stopped run to go on."""
    judged = [[part.sha256, part.query.product, part.p_defect, part.weight] for part in parts]
    return {
        "student": sha256_file(student / WEIGHTS),
        "samples": sha256_json(judged),
        "teacher": sha256_json([master.vlm.model_id, master.vlm.fingerprint]),
        "settings": sha256_json(settings.model_dump(mode="json")),
    }


def _learnt_before(student: Path) -> str:
    found = run_record(student)
    listed = None if found is None else found.with_name(TRAINED_ON)
    return listed.read_text(encoding="utf-8") if listed is not None and listed.is_file() else ""


def _steps(
    vlm: Vlm, master: Teacher, count: int, out: Path, how: TrainSettings, settings: DistillSettings, watcher: Watcher
) -> Steps[_Turn, _Inputs]:
    widths = projections(_width(vlm), _width(master.vlm), seed=how.seed).to(vlm.device)
    group = {"params": list(widths.parameters()), "lr": how.projector_lr, "peak": how.projector_lr}
    groups = [*adapter.parameter_groups(vlm.model, how), group]
    learning = adapter.trainable(vlm.model) | {f"widths.{name}": weight for name, weight in widths.named_parameters()}
    optimizer = torch.optim.AdamW(groups, weight_decay=how.weight_decay)
    encode = partial(_encode, vlm, master, how.prompt)
    loss = partial(_loss, vlm, master.vlm, widths, settings)
    return Steps(how, out, learning, optimizer, how.epochs * steps_of(count, how), watcher, encode, loss)


def _width(vlm: Vlm) -> int:
    return int(bare(vlm.model).get_input_embeddings().weight.shape[1])


@dataclass(frozen=True, slots=True)
class _Turn:
    part: Judged
    hflip: bool
    vflip: bool


@dataclass(frozen=True, slots=True)
class _Inputs:
    own: Batch
    masters: Batch
    p_defect: Tensor
    weight: Tensor


def _plan(parts: Sequence[Judged], how: TrainSettings, epoch: int) -> list[_Turn]:
    """Return an epoch's samples in order, half of them mirrored each way that the student's training mirrored."""
    rng = np.random.default_rng([how.seed, epoch])
    flips = (rng.random((len(parts), 2)) < 0.5) & [[way in how.augment for way in ("hflip", "vflip")]]
    return [_Turn(parts[at], *map(bool, flips[at])) for at in rng.permutation(len(parts))]


def _encode(vlm: Vlm, master: Teacher, prompt: PromptSettings, batch: Sequence[_Turn]) -> _Inputs:
    queries = [flipped(turn.part.query, across=turn.hflip, down=turn.vflip) for turn in batch]

    def asked(of: Vlm, how: PromptSettings) -> Batch:
        return of.encoder.encode([build_question(query, Ask.LABEL, how) for query in queries])

    labels = torch.tensor([[turn.part.p_defect, turn.part.weight] for turn in batch])
    return _Inputs(asked(vlm, prompt), asked(master.vlm, master.prompt), labels[:, 0], labels[:, 1])


def _loss(
    vlm: Vlm, master: Vlm, widths: nn.ModuleDict, settings: DistillSettings, inputs: _Inputs
) -> dict[str, Tensor]:
    with torch.no_grad():  # not inference mode: what is compared with must be saved for the gradient
        aim = look(master, inputs.masters).to(vlm.device)
    own = look(vlm, inputs.own)
    p_defect, weight = inputs.p_defect.to(vlm.device), inputs.weight.to(vlm.device)
    return akd_terms(own, aim, p_defect, weight, widths, settings)
