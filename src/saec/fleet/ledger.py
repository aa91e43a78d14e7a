"""The ledger: every verdict of a run, in an SQLite file that survives a killed process and a power cut.

Nothing is acknowledged before it is on the disk: WAL with ``synchronous=FULL`` syncs every commit, and a receipt is
given only after the commit. One writer thread commits whatever has queued up while the last commit was syncing (group
commit): the throughput does not depend on the disk's sync time, and a lone write does not wait for company.

A part's row is written once, by its local verdict, and amended at most once, by the cloud. A final verdict on a reject
may wait for an explanation, which is added once and changes nothing else. Rows are ordered by the sequence in which
they were recorded, never by a clock.
"""

from __future__ import annotations

import json
import os
import queue
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saec.errors import BadInput
from saec.fleet.schema import migrate
from saec.fleet.sqlite_file import connect, explain, explained, lock, open_writable, sync_folder
from saec.fleet.verdict_json import verdict_from_json, verdict_to_json
from saec.types import Heatmap, Verdict

GROUP = 256
"""Most writes in one commit, and the length of the queue before it: callers wait when the disk cannot keep up."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that a verdict is on the disk. ``fresh`` is false when the same judgement had been recorded before."""

    seq: int
    fresh: bool = True


@dataclass(frozen=True, slots=True)
class Pending:
    """A part whose verdict stands while a question about it is open, with the heatmap that the question needs."""

    seq: int
    verdict: Verdict
    heatmap: Heatmap | None


@dataclass(frozen=True, slots=True)
class Spent:
    """What a run has used of the cloud so far, from its rows: the state of the budget dial."""

    parts: int = 0
    """Parts with a local verdict."""
    questions: int = 0
    """Parts granted to the cloud, answered or not."""
    answered: int = 0
    """Questions whose cost is known: answered or fallen back."""
    uplink_bytes: int = 0
    cloud_s: float = 0.0
    """Sum of the questions' own durations in seconds."""


@dataclass(frozen=True, slots=True)
class _Local:
    line: str
    part_id: str
    sha256: str
    models: str
    pending: bool
    unexplained: bool
    heatmap: Heatmap | None
    done: Future[Receipt]


@dataclass(frozen=True, slots=True)
class _Amendment:
    line: str
    part_id: str
    sha256: str
    uplink_bytes: int
    cloud_s: float
    unexplained: bool
    done: Future[Receipt]


@dataclass(frozen=True, slots=True)
class _Explanation:
    line: str
    seq: int
    done: Future[Receipt]


_Write = _Local | _Amendment | _Explanation


class Ledger:
    """One run's ledger, open for writing by one process at a time. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Open or create the file; an interrupted write of a killed process is rolled back.

        Raises:
            BadInput: the file is damaged, foreign, from a newer version, in use by another run, or cannot be written.
        """
        self.path = path
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock(path)
            try:
                self._db = open_writable(path, migrate)
            except BaseException:
                self._lock.close()
                raise
        self._failure: BadInput | None = None
        self._closed = False
        self._writes: queue.Queue[_Write | None] = queue.Queue(GROUP)
        self._writer = threading.Thread(target=self._write_all, name="saec-ledger", daemon=True)
        self._writer.start()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def bind(self, *, station: str, settings: str) -> None:
        """Tie the run to the hashes of its station and of the settings that decide verdicts, before the first part.

        Raises:
            BadInput: the run was begun with another station or with other settings.
        """
        with explained(self.path), closing(connect(self.path)) as db:
            for key, value in (("station", station), ("settings", settings)):
                db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, value))
                if db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0] != value:
                    raise BadInput(
                        f"the run was begun with another {key}" if key == "station" else f"the run had other {key}",
                        where=self.path,
                        fix="resume with the same, or pass a new run folder",
                    )

    def record_local(
        self, verdict: Verdict, *, pending_cloud: bool, unexplained: bool = False, heatmap: Heatmap | None = None
    ) -> Future[Receipt]:
        """Record a part's local verdict; the future resolves once it is durable.

        The same judgement (part, content, models) a second time changes nothing: its receipt is not ``fresh``.
        ``heatmap`` ([h, w] float32) is kept while the cloud's question or the explanation is open. The future's
        callbacks run in the writer thread. It fails with :class:`BadInput` when the disk is full or the file damaged;
        what was acknowledged before stays intact.

        Raises:
            ValueError: a figure of the verdict is not finite.
        """
        models = json.dumps(dict(verdict.models), sort_keys=True)
        line = verdict_to_json(verdict)
        kept = heatmap if pending_cloud or unexplained else None
        key = (verdict.part_id, verdict.sha256, models)
        return self._submit(_Local(line, *key, pending_cloud, unexplained, kept, Future()))

    def amend(self, verdict: Verdict, *, unexplained: bool = False) -> Future[Receipt]:
        """Replace a pending local verdict by the final one; the future resolves once it is durable.

        It fails with :class:`BadInput` where no question is pending for this part and content: a part is amended once.

        Raises:
            ValueError: a figure of the verdict is not finite.
        """
        cloud_s = verdict.timings_ms.get("cloud", 0.0) / 1000
        line = verdict_to_json(verdict)
        cost = (verdict.uplink_bytes, cloud_s)
        return self._submit(_Amendment(line, verdict.part_id, verdict.sha256, *cost, unexplained, Future()))

    def explain(self, seq: int, verdict: Verdict) -> Future[Receipt]:
        """Replace a verdict that waits for its explanation; the future resolves once it is durable.

        It fails with :class:`BadInput` where no explanation is open.

        Raises:
            ValueError: a figure of the verdict is not finite.
        """
        return self._submit(_Explanation(verdict_to_json(verdict), seq, Future()))

    def done_ids(self) -> dict[str, int]:
        """Return how many local verdicts each recorded part has: 1, unless its name came again with other content."""
        with explained(self.path), closing(connect(self.path)) as db:
            return dict(db.execute("SELECT part_id, count(*) FROM verdicts GROUP BY part_id"))

    def pending(self) -> list[Pending]:
        """Return the open questions to the cloud in the order of their parts."""
        return self._pending("WHERE state = 'pending_cloud' ORDER BY seq")

    def next_unexplained(self) -> Pending | None:
        """Return the first part whose verdict is final and waits for an explanation."""
        return next(iter(self._pending("JOIN unexplained USING (seq) ORDER BY seq LIMIT 1")), None)

    def count_unexplained(self) -> int:
        """Return how many explanations are open."""
        with explained(self.path), closing(connect(self.path)) as db:
            return int(db.execute("SELECT count(*) FROM unexplained").fetchone()[0])

    def _pending(self, which: str) -> list[Pending]:
        with explained(self.path), closing(connect(self.path)) as db:
            rows = db.execute(
                f"SELECT seq, verdict, height, width, cells FROM verdicts LEFT JOIN heatmaps USING (seq) {which}"  # noqa: S608 - our own words
            ).fetchall()
        return [
            Pending(
                seq,
                verdict_from_json(line, where=self.path),
                None if cells is None else np.frombuffer(cells, dtype="<f4").reshape(height, width).astype(np.float32),
            )
            for seq, line, height, width, cells in rows
        ]

    def spent(self) -> Spent:
        """Return what the run has used of the cloud so far."""
        with explained(self.path), closing(connect(self.path)) as db:
            row = db.execute(
                "SELECT count(*), total(granted), total(amended), total(uplink_bytes), total(cloud_s) FROM verdicts"
            ).fetchone()
        return Spent(int(row[0]), int(row[1]), int(row[2]), int(row[3]), float(row[4]))

    def verdicts(self) -> Iterator[Verdict]:
        """Yield all verdicts by sequence, final or not. See :func:`read_verdicts`."""
        return read_verdicts(self.path)

    def export_jsonl(self, path: Path) -> int:
        """Write one verdict a line, by sequence, and return their number: the whole file or, on failure, the old one.

        Raises:
            BadInput: the file cannot be written.
        """
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        count = 0
        try:
            with partial.open("w", encoding="utf-8") as file:
                for line in _lines(self.path):
                    file.write(line + "\n")
                    count += 1
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise BadInput(
                f"cannot write ({error.strerror})", where=path, fix="check the folder and free space"
            ) from None
        return count

    def close(self) -> None:
        """Finish the queued writes and release the file. Closing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        self._writes.put(None)
        self._writer.join()
        try:
            if self._failure is None:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            # The verdicts are safe in the WAL; only the tidying up failed.
            raise explain(error, self.path) from None
        finally:
            self._db.close()
            self._lock.close()

    def _submit(self, write: _Write) -> Future[Receipt]:
        if self._closed:
            raise BadInput("the ledger is closed", where=self.path)
        write.done.set_running_or_notify_cancel()  # from here on it cannot be cancelled under the writer's hands
        self._writes.put(write)
        return write.done

    def _write_all(self) -> None:
        open_ = True
        while open_:
            batch = [self._writes.get()]
            while len(batch) < GROUP and not self._writes.empty():
                batch.append(self._writes.get())
            open_ = None not in batch
            self._commit([write for write in batch if write is not None])

    def _commit(self, batch: list[_Write]) -> None:
        receipts: list[Receipt | BadInput] = []
        if self._failure is None and batch:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                receipts = [self._apply(write) for write in batch]
                self._db.execute("COMMIT")
            except Exception as error:  # noqa: BLE001 - whatever it is, it reaches every waiting caller below
                self._failure = explain(error, self.path)
                # A failed COMMIT may have rolled back by itself; the first error is the one to tell.
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
        for index, write in enumerate(batch):
            outcome = self._failure or receipts[index]
            if isinstance(outcome, Receipt):
                write.done.set_result(outcome)
            else:
                write.done.set_exception(outcome)

    def _apply(self, write: _Write) -> Receipt | BadInput:
        match write:
            case _Local():
                return self._insert(write)
            case _Amendment():
                return self._update(write)
            case _Explanation():
                return self._explain(write)

    def _insert(self, write: _Local) -> Receipt:
        key = (write.part_id, write.sha256, write.models)
        found = self._db.execute(
            "SELECT seq FROM verdicts WHERE part_id = ? AND sha256 = ? AND models = ?", key
        ).fetchone()
        if found is not None:
            return Receipt(found[0], fresh=False)
        state = "pending_cloud" if write.pending else "final"
        self._db.execute(
            "INSERT INTO verdicts (part_id, sha256, models, state, granted, verdict) VALUES (?, ?, ?, ?, ?, ?)",
            (*key, state, int(write.pending), write.line),
        )
        seq: int = self._db.execute("SELECT last_insert_rowid()").fetchone()[0]
        if write.heatmap is not None:
            height, width = write.heatmap.shape
            cells = write.heatmap.astype("<f4").tobytes()
            self._db.execute("INSERT INTO heatmaps VALUES (?, ?, ?, ?)", (seq, height, width, cells))
        if write.unexplained:
            self._db.execute("INSERT INTO unexplained VALUES (?)", (seq,))
        return Receipt(seq)

    def _update(self, write: _Amendment) -> Receipt | BadInput:
        found = self._db.execute(
            "SELECT seq FROM verdicts WHERE part_id = ? AND sha256 = ? AND state = 'pending_cloud'",
            (write.part_id, write.sha256),
        ).fetchone()
        if found is None:
            return BadInput("no question is pending for this part", where=write.part_id)
        self._db.execute(
            "UPDATE verdicts SET state = 'final', amended = 1, uplink_bytes = ?, cloud_s = ?, verdict = ?"
            " WHERE seq = ?",
            (write.uplink_bytes, write.cloud_s, write.line, found[0]),
        )
        if write.unexplained:
            self._db.execute("INSERT INTO unexplained VALUES (?)", found)
        else:
            self._db.execute("DELETE FROM heatmaps WHERE seq = ?", found)
        return Receipt(found[0])

    def _explain(self, write: _Explanation) -> Receipt | BadInput:
        seq = (write.seq,)
        if not self._db.execute("DELETE FROM unexplained WHERE seq = ?", seq).rowcount:
            return BadInput("no explanation is open for this part", where=write.seq)
        self._db.execute("UPDATE verdicts SET verdict = ? WHERE seq = ?", (write.line, write.seq))
        self._db.execute("DELETE FROM heatmaps WHERE seq = ?", seq)
        return Receipt(write.seq)


def read_verdicts(path: Path) -> Iterator[Verdict]:
    """Yield all verdicts of a ledger by sequence; the run that writes it may go on meanwhile.

    Raises:
        BadInput: no such file, or it is damaged.
    """
    if not path.is_file():
        raise BadInput("no ledger", where=path, fix="pass the folder of a run")
    for line in _lines(path):
        yield verdict_from_json(line, where=path)


def _lines(path: Path) -> Iterator[str]:
    with explained(path), closing(connect(path)) as db:
        for (line,) in db.execute("SELECT verdict FROM verdicts ORDER BY seq"):
            yield line
