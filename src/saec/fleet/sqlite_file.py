"""Opening an SQLite file that must not lose anything, and saying in one line what is wrong with it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from saec.errors import BadInput


def connect(path: Path) -> sqlite3.Connection:
    """Open in autocommit, so that transactions are begun and ended in plain sight; every commit is synced."""
    db = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA synchronous = FULL")
    return db


def open_writable(path: Path, migrate: Callable[[sqlite3.Connection, Path], None]) -> sqlite3.Connection:
    """Open or create the file in WAL mode, check it, bring it to the newest schema, and make its name durable.

    Raises:
        BadInput: a damaged file, or what ``migrate`` refuses.
        sqlite3.Error, OSError: it cannot be opened or written.
    """
    db = connect(path)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        health = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if health != "ok":
            raise _damaged(path, health)
        migrate(db, path)
        sync_folder(path.parent)
    except BaseException:
        db.close()
        raise
    return db


def lock(path: Path) -> sqlite3.Connection:
    """Take ``path`` for this process alone until the returned connection is closed.

    It is an exclusive transaction on a file beside it: SQLite's file locks work on every platform, end with the process
    however it ends, and leave the file itself readable for others.

    Raises:
        sqlite3.OperationalError: busy, another process has it.
    """
    holder = sqlite3.connect(
        path.with_name(path.name + ".lock"), timeout=0, isolation_level=None, check_same_thread=False
    )
    try:
        holder.execute("BEGIN EXCLUSIVE")
    except BaseException:
        holder.close()
        raise
    return holder


def sync_folder(folder: Path) -> None:
    """Make a new or renamed file's name durable. Windows syncs names by itself and cannot open a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn SQLite's and the system's errors inside the block into :class:`BadInput`."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise explain(error, path) from None


def explain(error: Exception, path: Path) -> BadInput:
    """Return the one line that a user can act on; ``path`` is named as what it is, such as ``ledger.sqlite``."""
    code = getattr(error, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF  # the upper bits only refine it
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return _damaged(path, str(error))
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        fix = "wait for it, or pass a new run folder"
        return BadInput(f"the {path.stem} is in use by another run", where=path, fix=fix)
    return BadInput(
        f"the {path.stem} cannot be read or written ({error})",
        where=path,
        fix="check the folder and free space, then resume: what was recorded is kept",
    )


def _damaged(path: Path, what: str) -> BadInput:
    return BadInput(f"the {path.stem} is damaged ({what})", where=path, fix="restore a copy, or pass a new run folder")
