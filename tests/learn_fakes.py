"""Frames, jobs and a service with a desk, for tests of learning on the wire. ``python learn_fakes.py`` serves one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cloud_fakes import FakeBackend, query
from saec.config import LearnSettings, ServeSettings
from saec.fleet.frame import Frame, encode_frame, frame_id
from saec.learn.desk import FolderDesk
from saec.types import Opinion

JOB = "0123456789abcdef"


def frames(count: int, size: int = 100, seed: int = 0) -> dict[str, bytes]:
    """Encoded samples by name, each of about ``size`` bytes."""
    rng = np.random.default_rng(seed)
    made = [
        encode_frame(Frame("sample", {"number": number}, {"a": rng.integers(0, 255, size, np.uint8)}))
        for number in range(count)
    ]
    return {frame_id(data): data for data in made}


def settings(**more: object) -> LearnSettings:
    return LearnSettings(**more)  # type: ignore[arg-type]


class Runner:
    """Asks about each frame and makes an update of their names; ``seconds`` for each, and a log of what it began."""

    def __init__(self, log: Path, seconds: float = 0.0, update_bytes: int = 100_000) -> None:
        self._log, self._seconds, self._update_bytes = log, seconds, update_bytes

    def __call__(
        self,
        request: Mapping[str, Any],
        frame_of: Callable[[str], Frame],
        judge: Callable[[Sequence[Any]], list[Opinion | Exception]],
        progress: Callable[[int, int], None],
    ) -> dict[str, Any]:
        with self._log.open("a") as log:
            log.write(f"{request.get('note', '')}\n")
        if "fail" in request:
            raise ValueError(request["fail"])
        numbers, opinions = [], []
        for index, name in enumerate(request["frames"], 1):
            numbers.append(frame_of(name).header["number"])
            opinions += judge([query(f"p{index}")])
            time.sleep(self._seconds)
            progress(index, len(request["frames"]))
        seed = hashlib.sha256(json.dumps(request["frames"]).encode()).digest()
        update = np.random.default_rng(list(seed)).bytes(self._update_bytes)
        return {"numbers": numbers, "p": [opinion.p_defect for opinion in opinions], "update": update}


@contextmanager
def learning_service(
    folder: Path, *arguments: str, port: int = 0, **more: object
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A real service with a desk in another process; yields the process and its address. With arguments it is
    ``saec cloud serve`` that starts it, with the teacher."""
    ready = folder / "ready.json"
    ready.unlink(missing_ok=True)
    log = folder / "service.log"
    command = [sys.executable, __file__, str(folder), *(arguments or [json.dumps({"port": port, **more})])]
    with log.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        give_up = time.monotonic() + 30
        while not ready.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up, "the service did not start"
            time.sleep(0.02)
        yield process, json.loads(ready.read_text())["url"]
    finally:
        process.kill()
        process.wait()


def main(folder: Path, options: dict[str, Any]) -> None:
    from saec.cloud.service import ready_file, serve

    runner = Runner(folder / "jobs.log", options.pop("seconds", 0.0), options.pop("update_bytes", 100_000))
    desk = FolderDesk(folder / "desk", runner, settings())
    backend = FakeBackend(options.pop("judge_s", 0.0), keep=False)
    serve(backend, ServeSettings(**options), desk, on_ready=ready_file(folder / "ready.json"))


def main_of_saec(folder: Path, arguments: Sequence[str]) -> None:
    from saec.cli import cloud, main

    cloud.backend_of = lambda *_: FakeBackend(keep=False)  # type: ignore[assignment]
    sys.argv = ["saec", "cloud", "serve", "--port", "0", "--ready-file", str(folder / "ready.json"), *arguments]
    main()


if __name__ == "__main__":
    if sys.argv[2].startswith("{"):
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    else:
        main_of_saec(Path(sys.argv[1]), sys.argv[2:])
