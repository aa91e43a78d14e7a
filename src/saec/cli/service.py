"""A cloud service as a process of its own, for as long as a block runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from saec.errors import BadInput

PROGRAM: tuple[str, ...] = (sys.executable, "-m", "saec")
"""How this very program is called."""

START_S = 60.0
"""Longest wait for a service to warm up."""

_STOP_S = 10.0
"""What a service that was asked to end has for it; then it is killed."""

_STDIN = 0


@contextmanager
def service_process(command: Sequence[str], log: Path) -> Iterator[str]:
    """Run ``saec`` with ``command`` in another process and yield the service's address once it answers.

    The process is stopped at the end of the block: asked first, then killed. It is not in this process's group, so
    that Ctrl-C reaches it only through us, after the questions under way were answered. Its standard input is a pipe
    that we alone hold open: whatever kills us closes it, and the service ends by itself.

    Raises:
        BadInput: it ends, or does not answer in time; its output is in ``log``.
    """
    ready = log.with_suffix(".ready.json")
    ready.unlink(missing_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
            [*PROGRAM, *command, "--ready-file", str(ready), "--until-eof"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield _address(process, ready, log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()
        ready.unlink(missing_ok=True)


def end_with_stdin() -> None:
    """From now on, end this process as SIGTERM does once its standard input ends, and kill it if that takes too long.

    For a service whose parent may be killed: nobody is left then to ask it to end, or to see that it hangs.
    """
    threading.Thread(target=_end_with_stdin, name="saec-stdin", daemon=True).start()


def _end_with_stdin() -> None:
    # Not sys.stdin: a thread that holds its lock at the end of the process makes the interpreter abort.
    with suppress(OSError):  # closed from the beginning: ended as well
        while os.read(_STDIN, 4096):
            pass
    killed_at = time.monotonic() + _STOP_S
    while time.monotonic() < killed_at:
        os.kill(os.getpid(), signal.SIGTERM)  # again and again: one that comes while the service starts may be lost
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def _address(process: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    give_up = time.monotonic() + START_S
    while not ready.is_file():
        if process.poll() is not None:
            raise BadInput(f"the cloud service ended ({_last_line(log)})", where=log)
        if time.monotonic() > give_up:
            raise BadInput(f"the cloud service was not ready after {START_S:.0f} s", where=log)
        time.sleep(0.02)
    url: str = json.loads(ready.read_text(encoding="utf-8"))["url"]
    return url


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no word why"
