"""Parity gates: is the adapter that is served the one that was trained, however it is asked?

Training sees an image with its answer in one teacher-forced, right-padded pass; serving sees it left-padded, through a
shared prefix and in whatever batch there is, perhaps with the adapter merged. All must give the same P(defect): in
float32 within :data:`LIMIT`, and the same label for every image. A release is written only if they do.
"""

from __future__ import annotations

import gc
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from saec.config import MllmSettings, PromptSettings, Settings
from saec.errors import BadInput
from saec.train.ahead import chunks
from saec.train.gates import Gate, Report, files_gate
from saec.train.probe import made_rows
from saec.train.release import base_of, check_files, trained_with
from saec.train.rows import Example, Row, pose, query_of, read_rows
from saec.types import Backend, Opinion, Query
from saec.vlm.decide import p_defect
from saec.vlm.encode import IGNORED
from saec.vlm.load import Vlm, load_vlm
from saec.vlm.prompt import Ask
from saec.vlm.run import on_device
from saec.vlm.trained import WEIGHTS, check_adapter

LIMIT = 1e-3
"""Largest difference of P(defect) between two ways of asking the same model in float32."""

BATCH = 4
"""Rows in one forward pass of the trained and of the merged model."""

Serve = Callable[[Settings], Backend]
"""Makes a backend ready to judge. The cloud's ``TransformersBackend``, which stands on the floor of this room."""


def verify_adapter(
    folder: Path, settings: Settings, serve: Serve, *, model: str | None = None, probe: Path | None = None
) -> Report:
    """Hold an adapter to all gates.

    Args:
        folder: PEFT adapter folder, of a training run or of a release.
        settings: how it will be served; number format, 4 bit, ranking and thresholds aside.
        serve: makes the backend.
        model: its base; by default the one that the training run or the adapter names.
        probe: fine-tuning rows to compare on; by default made plates.

    Raises:
        BadInput: no adapter there, no base known, or an unreadable probe.
    """
    check_adapter(folder)
    name = model or base_of(folder)
    mllm = _exact(settings.mllm, name, folder)
    gates = [files_gate(name, check_files(folder))]
    with _rows(probe) as rows:
        if gates[0].passed:
            gates += _adapter_gates(folder, settings.model_copy(update={"mllm": mllm}), serve, rows, settings.mllm.tau)
        return Report(name, str(folder), _name_of(probe), len(rows), tuple(gates))


def verify_model(name: str, settings: Settings, serve: Serve, *, probe: Path | None = None) -> Report:
    """Hold a model without an adapter to the gates that concern it: its files, and batches of any size.

    Raises:
        BadInput: unknown, not on this machine, or an unreadable probe.
    """
    intact = files_gate(name)
    if not intact.passed:
        return Report(name, None, "", 0, (intact,))
    changed = settings.model_copy(update={"mllm": _exact(settings.mllm, name, None)})
    with _rows(probe) as rows:
        alone, together = _served(changed, serve, rows)
        return Report(name, None, _name_of(probe), len(rows), (intact, _batch_gate(alone, together)))


def _adapter_gates(folder: Path, settings: Settings, serve: Serve, rows: Sequence[Row], tau: float) -> list[Gate]:
    mllm = settings.mllm
    base = load_vlm(mllm.model_copy(update={"adapter": None}))
    try:
        load_vlm(mllm, base=base)
    except BadInput as error:
        return [Gate("adapters that do not fit their base", 0, 1, error.what)]
    learnt, run = as_trained(base, folder), trained_with(folder)
    prompt = mllm if run is None else run.prompt
    trained = teacher_forced(learnt, rows, prompt)
    merged = merge(learnt)
    merged_p = _p(merged, rows, prompt)
    del base, learnt, merged
    gc.collect()  # a 7-billion-parameter model in float32 fits once
    alone, together = _served(settings, serve, rows)
    differ = sum((p >= tau) != (q >= tau) for p, q in zip(trained, together, strict=True))
    return [
        Gate("adapters that do not fit their base", 0, 0),
        Gate("trained and served: largest |ΔP|", LIMIT, _gap(trained, together)),
        Gate("trained and served: labels that differ", 0, differ),
        _batch_gate(alone, together),
        Gate("merged and unmerged: largest |ΔP|", LIMIT, _gap(merged_p, together)),
    ]


def as_trained(base: Vlm, folder: Path) -> Vlm:
    """Return the base with an adapter as the training loop holds it; the base is wrapped in place."""
    config = PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # PEFT would warn that the base lies elsewhere than when it was trained
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT still asks for it
        model = get_peft_model(base.model, config, autocast_adapter_dtype=False)
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    return replace(base, model=model.eval())


def teacher_forced(vlm: Vlm, rows: Sequence[Row], prompt: PromptSettings) -> list[float]:
    """Return P(defect) of every row as training sees it: right-padded with its answer, the logits before that token."""
    found: list[float] = []
    for chunk in chunks(rows, BATCH):
        posed = [pose(Example(row, Ask.LABEL, row.label), prompt) for row in chunk]
        inputs = vlm.encoder.encode([asked for asked, _ in posed], [answer for _, answer in posed])
        targets = inputs.pop("labels")[:, 1:]  # the state before a token predicts it
        at = (targets != IGNORED).int().argmax(dim=1)
        with torch.inference_mode():
            logits = vlm.model(**on_device(vlm, inputs)).logits
        answer = logits[torch.arange(len(chunk)), at][:, list(vlm.encoder.label_tokens)].float()
        found += answer.softmax(dim=-1)[:, 1].tolist()
    return found


def merge(vlm: Vlm) -> Vlm:
    """Return the model with its adapter folded into the base's own weights."""
    return replace(vlm, model=vlm.model.merge_and_unload(safe_merge=True))


def _served(settings: Settings, serve: Serve, rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Return P(defect) as the backend answers each image alone, and in the service's largest batches."""
    backend = serve(settings)
    queries = [query_of(row) for row in rows]
    alone = [_answer(backend, [query])[0] for query in queries]
    together = [p for chunk in chunks(queries, settings.serve.max_batch) for p in _answer(backend, chunk)]
    return alone, together


def _answer(backend: Backend, queries: Sequence[Query]) -> list[float]:
    found = []
    for query, opinion in zip(queries, backend.judge(queries), strict=True):
        if not isinstance(opinion, Opinion):
            raise BadInput(f"the backend has no opinion of a probe image ({opinion})", where=query.part_id)
        found.append(opinion.p_defect)
    return found


def _p(vlm: Vlm, rows: Sequence[Row], prompt: PromptSettings) -> list[float]:
    found: list[float] = []
    for chunk in chunks(rows, BATCH):
        questions = [pose(Example(row, Ask.LABEL, row.label), prompt)[0] for row in chunk]
        found += [decision.p_defect for decision in p_defect(vlm, questions)]
    return found


def _gap(one: Sequence[float], other: Sequence[float]) -> float | None:
    gaps = [abs(p - q) for p, q in zip(one, other, strict=True)]
    return None if any(map(math.isnan, gaps)) else max(gaps)  # max() would overlook a NaN that is not the first


def _batch_gate(alone: Sequence[float], together: Sequence[float]) -> Gate:
    return Gate("alone and in a batch: largest |ΔP|", LIMIT, _gap(alone, together))


def _exact(mllm: MllmSettings, model: str, adapter: Path | None) -> MllmSettings:
    """Return the settings of serving in float32, with P(defect) for every image and no evidence written."""
    exact = {"dtype": "float32", "four_bit": False, "ranking": False, "mirrors": 1, "min_label_mass": 0.0, "tau": 1.0}
    return mllm.model_copy(update={**exact, "model": model, "adapter": adapter})


@contextmanager
def _rows(probe: Path | None) -> Iterator[list[Row]]:
    if probe is not None:
        yield read_rows(probe)
        return
    with tempfile.TemporaryDirectory(prefix="saec-probe.") as folder:
        yield made_rows(Path(folder))


def _name_of(probe: Path | None) -> str:
    return "made plates" if probe is None else str(probe)
