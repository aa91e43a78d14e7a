"""What the edge costs: latency from pixels and from the file, cold start, memory; a peer beside it where installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from saec.config import Settings
from saec.data.dataset import Dataset
from saec.data.decode import read_image
from saec.edge.fit import fit_station
from saec.edge.station import Station
from saec.errors import BadInput
from saec.evaluate.table import Cell, Table
from saec.types import Image, Label, Part

COLUMNS = ("product", "what", "p50 ms", "p90 ms", "p99 ms", "cold start s", "resident MB", "images")
WARM_UP = 5

# Runs in an interpreter of its own: the start of the process is part of what is measured.
_COLD = """
import sys, time
begun = time.perf_counter()
from pathlib import Path
from saec.config import Settings
from saec.data.decode import read_image
from saec.edge.station import Station
station = Station.load(Path(sys.argv[1]), settings=Settings())
station.predict(read_image(Path(sys.argv[3])), sys.argv[2])
cold = time.perf_counter() - begun
import json, psutil
assert "torch" not in sys.modules
for _ in range(20):
    station.predict(read_image(Path(sys.argv[3])), sys.argv[2])
print(json.dumps({"cold_s": cold, "rss_mb": psutil.Process().memory_info().rss / 2**20}))
"""


def bench_edge(dataset: Dataset, settings: Settings, *, images: int = 100, rounds: int = 3) -> Table:
    """Fit each product of ``dataset`` and time its detector, one image at a time, ``settings.edge.threads`` threads."""
    rows: list[dict[str, Cell]] = []
    for product in dataset.products:
        parts = dataset.select(product=product)
        learnt = tuple(p for p in parts if p.label is Label.GOOD and p.split in (None, "train", "calibration"))
        timed = ([p for p in parts if p.split == "test"] or list(parts))[:images]
        station = fit_station(Dataset(dataset.name, dataset.root, learnt), settings)
        pixels = [read_image(part.path, max_pixels=settings.data.max_pixels) for part in timed]
        rows += _station_rows(station, product, timed, pixels, rounds)
        rows += _peer_rows(product, learnt, pixels)
    notes = [f"{settings.edge.threads} threads; one image at a time; cold start: a new process, imports included"]
    if importlib.util.find_spec("anomalib") is None:
        notes.append("anomalib is not installed: no peer was timed")
    return Table("Cost of the edge", COLUMNS, rows, notes)


def _station_rows(
    station: Station, product: str, parts: Sequence[Part], pixels: Sequence[Image], rounds: int
) -> list[dict[str, Cell]]:
    from_pixels = _times(lambda i: station.predict(pixels[i], product), len(pixels), rounds)
    from_file = _times(lambda i: station.predict(read_image(parts[i].path), product), len(parts), rounds)
    with TemporaryDirectory(prefix="saec-bench-") as scratch:
        folder = Path(scratch) / "station"
        station.save(folder)
        cold = _cold_start(folder, product, parts[0].path)
    first = {"cold start s": cold["cold_s"], "resident MB": cold["rss_mb"]}
    return [
        {"product": product, "what": "pixels in", **_percentiles(from_pixels), **first, "images": len(pixels)},
        {"product": product, "what": "file in", **_percentiles(from_file), "images": len(parts)},
    ]


def _cold_start(station: Path, product: str, image: Path) -> dict[str, float]:
    command = [sys.executable, "-c", _COLD, str(station), product, str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own interpreter
    if done.returncode != 0:
        raise BadInput("the cold start failed", where=product, fix=done.stderr.strip().splitlines()[-1])
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _peer_rows(product: str, learnt: Sequence[Part], pixels: Sequence[Image]) -> list[dict[str, Cell]]:
    """Time anomalib's PatchCore (its default backbone's size, random weights: the time does not depend on them)."""
    if importlib.util.find_spec("anomalib") is None:
        return []
    import torch
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    torch.set_num_threads(2)
    model = PatchcoreModel(backbone="wide_resnet50_2", layers=("layer2", "layer3"), pre_trained=False)

    def tensor(image: Image) -> torch.Tensor:
        import cv2

        small = cv2.resize(image, (256, 256), interpolation=cv2.INTER_AREA)
        return torch.from_numpy(np.ascontiguousarray(small[:, :, ::-1].transpose(2, 0, 1))).float()[None] / 255

    with torch.no_grad():
        model.train()
        for part in learnt[:50]:
            model(tensor(read_image(part.path)))
        model.subsample_embedding(0.1)
        model.eval()
        times = _times(lambda i: model(tensor(pixels[i])), min(len(pixels), 20), 1)
    return [{"product": product, "what": "anomalib PatchCore, pixels in", **_percentiles(times), "images": 20}]


def _times(call: Callable[[int], object], count: int, rounds: int) -> list[float]:
    """Return milliseconds of each call after a warm-up."""
    for index in range(min(WARM_UP, count)):
        call(index)
    times = []
    for _ in range(rounds):
        for index in range(count):
            begun = time.perf_counter()
            call(index)
            times.append((time.perf_counter() - begun) * 1e3)
    return times


def _percentiles(times: Sequence[float]) -> dict[str, Cell]:
    p50, p90, p99 = (float(value) for value in np.quantile(times, [0.5, 0.9, 0.99]))
    return {"p50 ms": p50, "p90 ms": p90, "p99 ms": p99}
