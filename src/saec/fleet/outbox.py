"""The outbox: frames that wait to go up, in an SQLite file that survives a killed process and a power cut.

A frame is here from the moment that :meth:`Outbox.put` returns until the service has acknowledged it, or its owner does
not want it to go up any more. The outbox never throws anything away by itself: when its bytes are used up it refuses
what is new, and says so.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Collection, Sequence
from pathlib import Path

from saec.errors import BadInput
from saec.fleet.frame import frame_id
from saec.fleet.sqlite_file import explained, lock, open_writable

APPLICATION_ID = 0x53414F42
"""``SAOB`` in SQLite's header: neither a ledger nor another program's database is ever taken for an outbox."""


class OutboxFull(BadInput):
    """A frame does not fit beside those that wait; none of them was touched."""


class Outbox:
    """Frames on their way up, open in one process at a time. Thread-safe."""

    def __init__(self, path: Path, *, most_bytes: int) -> None:
        """Open or create the file, which holds at most ``most_bytes`` of frames.

        Raises:
            BadInput: it is damaged, foreign, in use by another process, or cannot be written.
        """
        self.path = path
        self._most = most_bytes
        self._alone = threading.Lock()
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock(path)
            try:
                self._db = open_writable(path, _migrate)
                self._size = int(self._db.execute("SELECT total(length(data)) FROM frames").fetchone()[0])
            except BaseException:
                self._lock.close()
                raise

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes of the frames that wait."""
        return self._size

    def put(self, data: bytes) -> str:
        """Keep an encoded frame and return its name once it is on the disk; one that waits already is kept once.

        Raises:
            OutboxFull: it does not fit.
            BadInput: the file cannot be written.
        """
        name = frame_id(data)
        with explained(self.path), self._alone:
            if self._db.execute("SELECT 1 FROM frames WHERE id = ?", (name,)).fetchone():
                return name
            if self._size + len(data) > self._most:
                what = f"the outbox is full: {self._size} of {self._most} bytes wait, and {len(data)} more do not fit"
                raise OutboxFull(what, where=self.path, fix="send what waits, or raise learn.outbox_bytes")
            self._db.execute("INSERT INTO frames (id, data) VALUES (?, ?)", (name, data))
            self._size += len(data)
        return name

    def pending(self) -> list[str]:
        """Return the names of the frames that wait, in the order in which they were put."""
        with explained(self.path), self._alone:
            return [name for (name,) in self._db.execute("SELECT id FROM frames ORDER BY seq")]

    def read(self, name: str) -> bytes:
        """Return the bytes of a frame that waits.

        Raises:
            KeyError: no such frame waits.
        """
        with explained(self.path), self._alone:
            row = self._db.execute("SELECT data FROM frames WHERE id = ?", (name,)).fetchone()
        if row is None:
            raise KeyError(name)
        return bytes(row[0])

    def acknowledge(self, names: Sequence[str]) -> None:
        """Let go of frames that the other side has on its disk; names that do not wait are passed over."""
        with explained(self.path), self._alone:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                freed = [self._delete(name) for name in names]
            self._size -= sum(freed)

    def keep_only(self, names: Collection[str]) -> None:
        """Let go of all frames but these: nobody wants the others to go up any more."""
        self.acknowledge([name for name in self.pending() if name not in names])

    def close(self) -> None:
        """Release the file. Closing twice is allowed."""
        self._db.close()
        self._lock.close()

    def _delete(self, name: str) -> int:
        row = self._db.execute("SELECT length(data) FROM frames WHERE id = ?", (name,)).fetchone()
        self._db.execute("DELETE FROM frames WHERE id = ?", (name,))
        return 0 if row is None else int(row[0])


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    tables: int = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if not tables:
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute("CREATE TABLE frames (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, data BLOB)")
    elif db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise BadInput("not an outbox of this program", where=path, fix="pass another folder")
