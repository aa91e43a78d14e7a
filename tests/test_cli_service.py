"""A service started by another command ends with it, also where that command is killed.

Real processes, a fake expert.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cli_run import SCRIPT, environment
from saec.cloud.client import probe
from saec.config import CloudSettings
from saec.errors import BadInput

EXPERT = "expert-fake"

# What runs ``saec learn rounds`` or ``saec demo``, less all that they do: it holds a service and another child.
PARENT = """
import json, subprocess, sys, time
from pathlib import Path
from saec.cli import service
service.PROGRAM = (sys.executable, sys.argv[1])
folder = Path(sys.argv[2])
with service.service_process(["cloud", "serve", "-s", str(folder), "--port", "0"], folder / "cloud.log") as url:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(json.dumps({"url": url, "other": other.pid}), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    (tmp_path / "expert").mkdir()
    command = [sys.executable, "-c", PARENT, SCRIPT, str(tmp_path)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True)
    with started:
        yield started
        started.kill()


def test_kill_9_of_the_parent_ends_its_service_within_seconds(parent: subprocess.Popen[str], tmp_path: Path) -> None:
    assert parent.stdout is not None
    told = json.loads(parent.stdout.readline())
    service = next(p for p in psutil.Process(parent.pid).children() if "serve" in p.cmdline())
    other = psutil.Process(told["other"])
    try:
        assert probe(told["url"], CloudSettings()).model_id == EXPERT
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        service.wait(timeout=5)
        assert other.is_running()  # it holds no end of the service's pipe
        with pytest.raises(BadInput, match="does not answer"):
            probe(told["url"], CloudSettings())
        assert "Traceback" not in (tmp_path / "cloud.log").read_text()
    finally:
        other.kill()
        if service.is_running():
            service.kill()


def test_ctrl_c_reaches_the_service_through_its_parent_alone(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    told = json.loads(parent.stdout.readline())
    service = next(p for p in psutil.Process(parent.pid).children() if "serve" in p.cmdline())
    parent.send_signal(signal.SIGSTOP)  # so that it cannot stop its service before we have looked
    try:
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
        time.sleep(0.5)
        assert probe(told["url"], CloudSettings()).model_id == EXPERT
    finally:
        parent.send_signal(signal.SIGCONT)
    service.wait(timeout=15)
    parent.wait(timeout=15)


def test_a_service_with_until_eof_ends_cleanly_when_its_input_does(tmp_path: Path) -> None:
    (tmp_path / "expert").mkdir()
    command = [sys.executable, SCRIPT, "cloud", "serve", "-s", str(tmp_path), "--port", "0", "--until-eof"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdin is not None and process.stderr is not None
        assert b"serving expert-fake at" in process.stderr.readline()
        process.stdin.write(b"what comes is not read as anything\n")
        process.stdin.flush()
        time.sleep(0.3)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=5) == 0
