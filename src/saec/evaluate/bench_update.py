"""What an update of an adapter costs in bytes, and in accuracy: share kept, bits, and how weights are selected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from saec.calibrate.metrics import auroc
from saec.evaluate.probe import TAU, AdapterAnswers, AdapterProbe
from saec.evaluate.table import Cell, Table
from saec.learn.delta import Delta, compress
from saec.learn.gain import fit_gain
from saec.learn.sensitivity import training_sensitivity
from saec.learn.state import LEARNT, State, Tensors, adapter_state, write_adapter
from saec.learn.update import ADAPTER, Update, encode_update
from saec.types import Label

Selection = Literal["magnitude", "sensitivity", "amplified"]
SELECTIONS: tuple[Selection, ...] = ("magnitude", "sensitivity", "amplified")
"""By the size of a change; by size and gradient; the same, amplified (:mod:`saec.learn.gain`)."""

COLUMNS = (
    *("update", "keep", "bits", "bytes", "of fp16", "norm sent", "gain"),
    *("accuracy", "AUROC", "same label", "mean |ΔP|"),
)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compress."""

    keep: float
    bits: int
    selection: Selection


def bench_update(
    base: Path,
    new: Path,
    probe: AdapterProbe,
    ways: Sequence[Way],
    *,
    answers: AdapterAnswers,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Table:
    """Compare each way with the dense update, and with none, on the probe's parts.

    Args:
        base: folder of the adapter that devices have.
        new: folder of the taught one; only in that of its training run are its gradients known.
        probe: asks the model.
        ways: what to compare, those by sensitivity only where the gradients are known.
        answers: asks the model about other parts; on them gains are fitted.
        progress: called with step, done and total.

    Raises:
        BadInput: an adapter or a part that cannot be used.
    """
    before, after = adapter_state(base), adapter_state(new)
    truth = np.array([part.label is Label.DEFECT for part in probe.parts])
    dense_bytes = plain_bytes(after)
    weights = training_sensitivity(new)
    ways = [way for way in ways if weights or way.selection == "magnitude"]

    with TemporaryDirectory(prefix="saec-bench-") as scratch:

        def asked(state: State) -> NDArray[np.float64]:
            folder = Path(scratch) / state.sha256[:16]
            write_adapter(state, folder)
            return probe.p_defect(folder)

        progress("dense", 0, len(ways) + 2)
        dense = asked(after)
        rows = [{"update": "dense", **_quality(dense, dense, truth), "bytes": dense_bytes, "of fp16": "100%"}]
        progress("none", 1, len(ways) + 2)
        rows.append({"update": "none", **_quality(asked(before), dense, truth), "bytes": 0})
        for number, way in enumerate(ways):
            progress(f"{way.selection} {way.keep:.1%} {way.bits} bits", number + 2, len(ways) + 2)
            delta = _compressed(before, after, way, weights, answers)
            decoded = delta.apply(before)
            size = len(encode_update(Update(ADAPTER, before.sha256, decoded.sha256, 1, 0, delta), b"key"))
            figures: dict[str, Cell] = {
                "keep": f"{way.keep:.1%}",
                "bits": way.bits,
                "norm sent": f"{delta.header['sparse']['norm']:.1%}",
                "gain": delta.header["sparse"]["gain"],
            }
            sizes: dict[str, Cell] = {"bytes": size, "of fp16": f"{size / dense_bytes:.2%}"}
            rows.append({"update": way.selection, **figures, **sizes, **_quality(asked(decoded), dense, truth)})
    notes = (
        f"{len(truth)} parts, {int(truth.sum())} defects; accuracy at P ≥ {TAU}; dense: all weights in half precision; "
        "gains are fitted on other parts, without their labels",
    )
    return Table("Compressed updates of an adapter", COLUMNS, rows, notes)


def plain_bytes(state: State) -> int:
    """Return the bytes of a state's weights as they are, uncompressed."""
    return sum(value.nbytes for name, value in state.tensors.items() if name != LEARNT)


def delta_figures(delta: Delta, new: State, size: int) -> dict[str, Any]:
    """Return what is worth saying about an update of ``size`` bytes to ``new``, as plain JSON types."""
    return {"bytes": size, "dense_bytes": plain_bytes(new), "error": delta.error, **(delta.header["sparse"] or {})}


def figures_table(title: str, figures: Mapping[str, Any]) -> Table:
    """Return figures as a table of one row each."""
    return Table(title, ("figure", "value"), [{"figure": key, "value": str(value)} for key, value in figures.items()])


def _compressed(before: State, after: State, way: Way, weights: Tensors, answers: AdapterAnswers) -> Delta:
    sensitivity = None if way.selection == "magnitude" else weights

    def louder(gain: float) -> Delta:
        return compress(before, after, keep=way.keep, bits=way.bits, gain=gain, sensitivity=sensitivity)

    return fit_gain(before, after, louder, answers.p_of)[1] if way.selection == "amplified" else louder(1.0)


def _quality(p: NDArray[np.float64], dense: NDArray[np.float64], truth: NDArray[np.bool_]) -> dict[str, Cell]:
    return {
        "accuracy": f"{np.mean((p >= TAU) == truth):.1%}",
        "AUROC": auroc(p, truth),
        "same label": f"{np.mean((p >= TAU) == (dense >= TAU)):.1%}",
        "mean |ΔP|": round(float(np.abs(p - dense).mean()), 4),
    }
