"""The ledger's tables and their history: a version is the number of migrations that a file has been through."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

from saec.errors import BadInput

APPLICATION_ID = 0x53414543
"""``SAEC`` in SQLite's header: another program's database is never taken for a ledger."""


def _verdicts_and_heatmaps(db: sqlite3.Connection) -> None:
    db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
    # AUTOINCREMENT: a sequence number is never given twice. The unique key is the idempotency key of a judgement.
    db.execute(
        """CREATE TABLE verdicts (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            part_id TEXT NOT NULL,
            sha256 TEXT NOT NULL,
            models TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('pending_cloud', 'final')),
            granted INTEGER NOT NULL CHECK (granted IN (0, 1)),
            amended INTEGER NOT NULL DEFAULT 0 CHECK (amended IN (0, 1)),
            uplink_bytes INTEGER NOT NULL DEFAULT 0,
            cloud_s REAL NOT NULL DEFAULT 0,
            verdict TEXT NOT NULL,
            UNIQUE (part_id, sha256, models)
        )"""
    )
    db.execute("CREATE INDEX pending ON verdicts (seq) WHERE state = 'pending_cloud'")
    # What a pending question needs besides the image, kept only while it is pending.
    db.execute(
        """CREATE TABLE heatmaps (
            seq INTEGER PRIMARY KEY REFERENCES verdicts (seq),
            height INTEGER NOT NULL,
            width INTEGER NOT NULL,
            cells BLOB NOT NULL
        )"""
    )


def _unexplained(db: sqlite3.Connection) -> None:
    # Final verdicts on rejects that wait for a sentence. Their heatmaps are kept as long.
    db.execute("CREATE TABLE unexplained (seq INTEGER PRIMARY KEY REFERENCES verdicts (seq))")


MIGRATIONS: Sequence[Callable[[sqlite3.Connection], None]] = (_verdicts_and_heatmaps, _unexplained)


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring a database to the newest version, each step in its own transaction.

    Raises:
        BadInput: the file belongs to another program or to a newer version of this one.
    """
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    tables: int = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise BadInput("not a ledger of this program", where=path, fix="pass another run folder")
    if version > len(MIGRATIONS):
        raise BadInput(f"the ledger is from a newer version (schema {version})", where=path, fix="update saec")
    for number, step in enumerate(MIGRATIONS[version:], start=version + 1):
        db.execute("BEGIN IMMEDIATE")
        step(db)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {number}")
        db.execute("COMMIT")
