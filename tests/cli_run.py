"""Calling ``saec`` in tests: in this process, or as the user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

import cli_fakes

SCRIPT = str(Path(cli_fakes.__file__))


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one line on stderr of a call that was refused."""
        assert self.code == 2, (self.code, self.out, self.err)
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in self.out
        return lines[0]


def saec(*args: object) -> Result:
    """Call the command in this process. An exception that is no clean exit is raised: it is a bug."""
    from saec.cli.app import app

    found = CliRunner().invoke(app, [str(arg) for arg in args])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return Result(found.exit_code, found.stdout, found.stderr)


def command(*args: object) -> list[str]:
    return [sys.executable, SCRIPT, *(str(arg) for arg in args)]


def environment(**more: str) -> Mapping[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def process(*args: object, prefix: tuple[str, ...] = (), timeout: float = 60, **env: str) -> Result:
    """Call the command as a process of its own."""
    found = subprocess.run(
        [*prefix, *command(*args)], capture_output=True, text=True, timeout=timeout, env=environment(**env)
    )
    return Result(found.returncode, found.stdout, found.stderr)
