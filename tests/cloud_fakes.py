"""Backends without a model, and a way to run one as a cloud service in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from saec.config import ServeSettings
from saec.errors import BadInput
from saec.types import Evidence, Opinion, Query


class FakeBackend:
    """Answers with the edge's own probability; a part id steers what else happens."""

    model_id = "fake-1"

    def __init__(self, seconds: float = 0.0, *, keep: bool = True) -> None:
        self.seconds, self.keep = seconds, keep
        self.seen: list[Query] = []
        self.batches: list[int] = []

    def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
        self.batches.append(len(queries))
        self.seen += queries if self.keep else []
        if any(query.part_id == "crash" for query in queries):
            raise RuntimeError("out of memory")
        time.sleep(self.seconds)
        return [self._one(query) for query in queries]

    def _one(self, query: Query) -> Opinion | Exception:
        if query.part_id == "bad":
            return ValueError("no such product")
        if query.part_id == "stranger":
            return BadInput("the expert does not know this product", where=query.product)
        p = float("nan") if query.part_id == "nan" else (query.edge_p_defect or 0.0)
        return Opinion(p, Evidence(source=self.model_id), self.model_id, {"forward": 1.0})


def query(part_id: str = "p1", size: int = 64, **more: object) -> Query:
    image = np.full((size, size, 3), (40, 90, 160), np.uint8)
    image[: size // 2, :, 1] = np.arange(size, dtype=np.uint8)
    fields: dict[str, object] = {
        "part_id": part_id,
        "product": "cell",
        "image": image,
        "original_size": (size, size),
        "edge_p_defect": 0.25,
    }
    return Query(**{**fields, **more})  # type: ignore[arg-type]


@contextmanager
def service_process(
    folder: Path, *, seconds: float = 0.0, **settings: object
) -> Iterator[tuple[subprocess.Popen, str]]:
    """Run the fake behind a real service in another process; yields the process and its address."""
    ready = folder / "ready.json"
    ready.unlink(missing_ok=True)
    command = [sys.executable, __file__, json.dumps({"port": 0, **settings}), str(seconds), str(ready)]
    with (folder / "service.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        give_up = time.monotonic() + 30
        while not ready.exists():
            assert process.poll() is None, (folder / "service.log").read_text()
            assert time.monotonic() < give_up, "the service did not start"
            time.sleep(0.02)
        yield process, json.loads(ready.read_text())["url"]
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    from saec.cloud.service import ready_file, serve

    serve(
        FakeBackend(float(sys.argv[2]), keep=False),  # nobody here can read them, and they would grow its memory
        ServeSettings(**json.loads(sys.argv[1])),
        on_ready=ready_file(Path(sys.argv[3])),
    )
