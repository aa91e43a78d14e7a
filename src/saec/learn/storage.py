"""Files of a desk: whole and on the disk, or not there at all, and how many bytes they are."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

from saec.cloud.desk import DeskFull
from saec.data.manifest import write_atomic
from saec.errors import BadInput
from saec.fleet.sqlite_file import lock, sync_folder

_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_OTHERS = {
    "station.json": "a station",
    "adapter_config.json": "an adapter",
    "predictions.jsonl": "a run",
    "ledger.sqlite": "a run",
}
"""Files by which a folder is known to be something else."""


def claim(root: Path) -> None:
    """Make the folder of a desk, or see that it may be one.

    Raises:
        BadInput: a file, a folder that is something else, or one that cannot be written.
    """
    try:
        if root.exists() and not root.is_dir():
            raise BadInput("this is a file", where=root, fix="pass a folder for samples and jobs")
        for name, what in _OF_OTHERS.items():
            if (root / name).exists():
                raise BadInput(f"this is the folder of {what}", where=root, fix="pass one for samples and jobs alone")
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput("the folder cannot be written", where=root, fix=error.strerror or "") from None


class Storage:
    """``frames/<2 hex>/<sha256>``, ``jobs/<id>.json`` and ``updates/<sha256>``, for one process and one thread at a
    time. Names are trusted: a caller looks up what others name before it asks for it."""

    def __init__(self, root: Path) -> None:
        """Open or create the folder, and clear away what a killed process left half-written.

        Raises:
            BadInput: it is in use by another process, or cannot be written.
        """
        self.frames, self.jobs, self.updates = (root / part for part in ("frames", "jobs", "updates"))
        try:
            for folder in (self.jobs, self.updates, *(self.frames / f"{byte:02x}" for byte in range(256))):
                folder.mkdir(parents=True, exist_ok=True)
            for folder in (root.parent, root, self.frames):
                sync_folder(folder)
            self._alone = lock(root / "desk")
        except sqlite3.OperationalError as error:
            fix = "stop the other service, or pass another folder"
            raise BadInput(f"the folder is in use by another service ({error})", where=root, fix=fix) from None
        except OSError as error:
            raise BadInput("the folder cannot be written", where=root, fix=error.strerror or "") from None
        self.used = 0
        for file in (*self.frames.glob("*/*"), *self.jobs.iterdir(), *self.updates.iterdir()):
            if file.name.startswith("."):
                file.unlink()
            else:
                self.used += file.stat().st_size

    def frame(self, name: str) -> Path:
        """Return the place of a frame."""
        return self.frames / name[:2] / name

    def update(self, name: str) -> Path:
        """Return the place of an update."""
        return self.updates / name

    def job(self, job_id: str) -> Path:
        """Return the place of a job's record."""
        return self.jobs / f"{job_id}.json"

    def write(self, file: Path, data: bytes) -> None:
        """Write or replace a file; it is durable when this returns.

        Raises:
            DeskFull: the disk is full.
            OSError: the disk refuses otherwise.
        """
        old = file.stat().st_size if file.exists() else 0
        try:
            write_atomic(file, data)
        except OSError as error:
            if error.errno in _FULL:
                raise DeskFull(f"the desk's disk is full ({error.strerror})") from None
            raise
        self.used += len(data) - old
        sync_folder(file.parent)

    def remove(self, file: Path) -> None:
        """Delete a file, if it is there."""
        if file.exists():
            self.used -= file.stat().st_size
            file.unlink()

    def close(self) -> None:
        """Let go of the folder."""
        self._alone.close()
