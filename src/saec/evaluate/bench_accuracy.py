"""Image-level accuracy of the shipped default detector on any data sets: fitted on good parts, one setting for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from saec.calibrate.metrics import auroc
from saec.config import Settings
from saec.data.builders import build_folder, build_ksdd
from saec.data.dataset import Dataset
from saec.data.decode import read_image
from saec.data.elpv import build_elpv
from saec.data.readers import read_dataset
from saec.data.splitting import Shares
from saec.edge.fit import fit_station
from saec.evaluate.table import Cell, Table
from saec.types import Label

HALF = Shares(train=0.5, calibration=0.0, defect_calibration=0.0)
"""For data without splits of their own: half of the good parts is learnt from, all else is test."""

COLUMNS = (
    "product",
    "fitted on",
    "test good",
    "test defects",
    "AUROC",
    "accuracy",
    "balanced accuracy",
    "overkill",
    "escape",
    "fit s",
)


@dataclass(frozen=True, slots=True)
class _Outcome:
    fitted_on: int
    scores: np.ndarray[tuple[int], np.dtype[np.float64]]
    called_defect: np.ndarray[tuple[int], np.dtype[np.bool_]]
    is_defect: np.ndarray[tuple[int], np.dtype[np.bool_]]
    fit_s: float


def bench_accuracy(
    datasets: Sequence[Dataset], settings: Settings, *, progress: Callable[[str, int, int], None] | None = None
) -> Table:
    """Fit on each product's good parts, place the threshold by them alone, and judge its test parts.

    Good parts of the splits train and calibration are fitted on; the test is the test split and, since no defect is
    used, the defects of the calibration split.

    Args:
        datasets: with splits; see :func:`with_splits`.
        settings: the same for all.
        progress: called with step, done and total.
    """
    rows: list[dict[str, Cell]] = []
    for dataset in datasets:
        for product in dataset.products:
            outcome = _judge(dataset.select(product=product), product, settings, progress)
            rows.append(_row(product, outcome))
    rows.append({"product": "mean", **{name: _mean(rows, name) for name in COLUMNS[4:9]}})
    return Table(
        "Default detector, thresholds from good parts alone",
        COLUMNS,
        rows,
        (
            f"one setting for all; asked: at most {settings.calibration.overkill:.0%} overkill",
            "AUROC of the raw anomaly score over the product's test parts",
        ),
    )


@contextmanager
def with_splits(folders: Sequence[Path], *, elpv: bool = False, seed: int = 2025) -> Iterator[list[Dataset]]:
    """Open data sets; those without splits are split by content into a temporary folder of links.

    KolektorSDD is split by content (near-duplicates and repeated items' images stay together) and ELPV by its cells.
    """
    with TemporaryDirectory(prefix="saec-bench-") as scratch:
        found = []
        for number, folder in enumerate(folders):
            dataset = read_dataset(folder)
            if not dataset.splits:
                copy = Path(scratch) / str(number)
                if dataset.products == ("KolektorSDD",):
                    build_ksdd(folder, copy, unit="content", shares=HALF, seed=seed, mode="symlink")
                else:
                    build_folder(folder, copy, shares=HALF, seed=seed, mode="symlink")
                dataset = read_dataset(copy)
            found.append(dataset)
        if elpv:
            build_elpv(Path(scratch) / "elpv", seed=seed, mode="symlink")
            found.append(read_dataset(Path(scratch) / "elpv"))
        yield found


def _judge(
    dataset: Dataset, product: str, settings: Settings, progress: Callable[[str, int, int], None] | None
) -> _Outcome:
    learnt = tuple(
        replace(part, split="train")
        for part in dataset
        if part.label is Label.GOOD and part.split in ("train", "calibration")
    )
    test = [
        part for part in dataset if part.split == "test" or (part.split == "calibration" and part.label is Label.DEFECT)
    ]
    begun = time.perf_counter()
    station = fit_station(Dataset(dataset.name, dataset.root, learnt), settings, progress=progress)
    fit_s = time.perf_counter() - begun
    tau = station.calibration(product).thresholds.tau_edge
    scores, called = [], []
    for number, part in enumerate(test):
        result = station.predict(read_image(part.path, max_pixels=settings.data.max_pixels), product)
        scores.append(result.score)
        called.append(result.p_defect >= tau)
        if progress is not None:
            progress(f"{product}: judging test parts", number + 1, len(test))
    is_defect = np.array([part.label is Label.DEFECT for part in test])
    return _Outcome(len(learnt), np.array(scores), np.array(called), is_defect, fit_s)


def _row(product: str, outcome: _Outcome) -> dict[str, Cell]:
    wrong, defect = outcome.called_defect != outcome.is_defect, outcome.is_defect
    escape = float(wrong[defect].mean()) if defect.any() else None
    overkill = float(wrong[~defect].mean()) if (~defect).any() else None
    balanced = None if escape is None or overkill is None else 1 - (escape + overkill) / 2
    return {
        "product": product,
        "fitted on": outcome.fitted_on,
        "test good": int((~defect).sum()),
        "test defects": int(defect.sum()),
        "AUROC": auroc(outcome.scores, defect),
        "accuracy": float(1 - wrong.mean()),
        "balanced accuracy": balanced,
        "overkill": overkill,
        "escape": escape,
        "fit s": round(outcome.fit_s, 1),
    }


def _mean(rows: Sequence[dict[str, Cell]], name: str) -> float | None:
    values = [value for row in rows if isinstance(value := row[name], float)]
    return float(np.mean(values)) if values else None
