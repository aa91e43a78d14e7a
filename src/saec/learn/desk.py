"""The desk on a disk: frames, jobs and updates of one cloud service, in a folder that survives a killed process.

    frames/<2 hex>/<sha256>   what came up; complete and synced, or not there
    jobs/<id>.json            request, state and result of each job
    updates/<sha256>          what the jobs have made

Jobs run one at a time in one thread, which has the cores that live questions leave. One that had not ended when the
process did is begun anew by the next, so that a runner must come to the same result when it is called twice; it fails
where :data:`MOST_STARTS` services have died over it.

When the folder holds ``learn.desk_bytes``, the oldest ended jobs go, with their updates and the frames that no open job
names. Open jobs, and frames that no job has named yet, are not thrown away: what does not fit then is refused. Frames
may fill nine tenths, so that a job about them still fits. One that no job has named for a week goes at the next start.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from saec.cloud.desk import DeskFull, FramesMissing, Job, JobConflict, JobStatus, Judge
from saec.config import LearnSettings
from saec.errors import BadInput, SaecError, first_problem
from saec.fleet.frame import BadFrame, Frame, decode_frame, frame_id
from saec.fleet.sqlite_file import sync_folder
from saec.learn.storage import Storage
from saec.types import Opinion, Query

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the steps done and all steps."""

JobRunner = Callable[[Mapping[str, Any], Callable[[str], Frame], Judge, Progress], Mapping[str, Any]]
"""Does a job: gets its request, a reader of frames by name, the judge, and whom to tell how far it is.

Returns JSON in which a value may be ``bytes``: an update, which is kept and replaced by its SHA-256.
"""

KINDS = ("sample",)
"""The frames that are taken."""

MOST_STARTS = 3
"""A job that was begun so often and has neither ended nor been stopped is what ends the service: it fails."""

_PATIENCE_S = 10.0
_FORGOTTEN_S = 7 * 86_400.0
_NICER = 10


class _Stopped(Exception):
    """The service ends; the job is begun anew by the next."""


class _Record(BaseModel):
    """A job's file. ``number`` orders jobs by their start, ``updates`` are the SHA-256 of what it made, ``starts`` how
    often it was begun and not stopped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    job: Job
    request: dict[str, Any]
    updates: tuple[str, ...] = ()
    starts: int = 0

    @property
    def frames(self) -> frozenset[str]:
        return frozenset(self.request.get("frames", ()))


class FolderDesk:
    """A :class:`saec.cloud.desk.Desk` in a folder, which belongs to one process at a time."""

    def __init__(self, root: Path, run: JobRunner, settings: LearnSettings) -> None:
        """Open or create the folder; jobs wait until :meth:`open`.

        Raises:
            BadInput: it is in use by another process, cannot be written, or holds a job that cannot be read.
        """
        self._run, self._settings = run, settings
        self._lock = threading.RLock()
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._storage = Storage(root)
        try:
            records = sorted(map(_read, self._storage.jobs.iterdir()), key=lambda record: record.number)
        except BadInput:
            self._storage.close()
            raise
        self._records = {record.job.id: record for record in records}
        self._updates = {name for record in records for name in record.updates}
        for file in self._storage.updates.iterdir():
            if file.name not in self._updates:  # of a job that was killed: it will make it again
                self._storage.remove(file)
        named = {name for record in records for name in record.frames}
        for file in self._storage.frames.glob("*/*"):
            if file.name not in named and file.stat().st_mtime < time.time() - _FORGOTTEN_S:
                self._storage.remove(file)
        self._frames = {file.name for file in self._storage.frames.glob("*/*")}
        for record in records:
            if not record.job.ended:
                self._queue.put(record.job.id)

    def open(self, judge: Judge) -> None:
        """Begin with the jobs that wait."""
        self._thread = threading.Thread(target=self._work, args=(judge,), name="saec-desk", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the job at hand at its next step, and let go of the folder."""
        self._closing.set()
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)
            if self._thread.is_alive():
                logger.warning("a job does not stop; it ends with the process")
                return
        self._storage.close()

    def put(self, name: str, data: bytes) -> bool:
        """Check and keep a frame; return, once it is durable, whether it is new."""
        if frame_id(data) != name:
            raise BadFrame("its bytes do not have the SHA-256 that it is named by")
        decode_frame(data, kinds=KINDS, most=self._settings.max_frame_bytes)
        with self._lock:
            file = self._storage.frame(name)
            if name in self._frames:
                sync_folder(file.parent)  # whoever wrote it may have been killed before it came to this
                return False
            self._write(file, data, reserve=self._settings.desk_bytes // 10)
            self._frames.add(name)
            return True

    def missing(self, names: Sequence[str]) -> list[str]:
        """Return those of the named frames that are not here."""
        with self._lock:
            return [name for name in names if name not in self._frames]

    def start(self, job_id: str, request: Mapping[str, Any]) -> tuple[Job, bool]:
        """Queue a job once it is durable; return it and whether it is new, or failed before and is begun anew."""
        plain = json.loads(json.dumps(dict(request), allow_nan=False))
        with self._lock:
            known = self._records.get(job_id)
            if known is not None:
                if known.request != plain:
                    raise JobConflict(f"job {job_id} was begun with another request")
                if known.job.status is not JobStatus.FAILED:
                    return known.job, False
            number = 1 + max((record.number for record in self._records.values()), default=0)
            record = _Record(number=number, job=Job(id=job_id), request=plain)
            if missing := self.missing(sorted(record.frames)):
                raise FramesMissing(missing)
            self._save(record)
            self._queue.put(job_id)
            return record.job, True

    def job(self, job_id: str) -> Job | None:
        """Return how far a job is; that it is done, once that is durable."""
        with self._lock:
            record = self._records.get(job_id)
            return None if record is None else record.job

    def update(self, sha256: str) -> bytes | None:
        """Return the bytes of an update."""
        with self._lock:
            return self._storage.update(sha256).read_bytes() if sha256 in self._updates else None

    def jobs(self) -> Mapping[JobStatus, int]:
        """Return the number of jobs in each state."""
        with self._lock:
            return Counter(record.job.status for record in self._records.values())

    def _work(self, judge: Judge) -> None:
        _step_back()
        while (job_id := self._queue.get()) is not None and not self._closing.is_set():
            self._do(job_id, judge)

    def _do(self, job_id: str, judge: Judge) -> None:
        def progress(done: int, total: int) -> None:
            self._go_on()
            self._tell(job_id, done=done, total=total)

        def asked(queries: Sequence[Query]) -> list[Opinion | Exception]:
            self._go_on()
            return judge(queries)

        if self._records[job_id].starts >= MOST_STARTS:
            self._fail(
                job_id, f"{MOST_STARTS} services ended while they were at it: it may take more memory than there is"
            )
            return
        self._count(job_id, 1)
        self._tell(job_id, status=JobStatus.RUNNING)
        try:
            result, updates = self._kept(self._run(self._records[job_id].request, self._frame, asked, progress))
            done = self._changed(job_id, status=JobStatus.DONE, result=result)
            self._save(done.model_copy(update={"updates": updates}))
        except Exception as error:  # noqa: BLE001 - whatever a runner raises fails its job, never the service
            if self._closing.is_set():
                self._count(job_id, -1)
                return
            expected = isinstance(error, SaecError)
            self._fail(job_id, str(error) if expected else f"{type(error).__name__}: {error}", trace=not expected)

    def _fail(self, job_id: str, what: str, *, trace: bool = False) -> None:
        logger.warning("job %s failed: %s", job_id, what, exc_info=trace)
        self._tell(job_id, status=JobStatus.FAILED, result=None, error=what)
        try:
            self._save(self._records[job_id])
        except (DeskFull, OSError):
            logger.exception("job %s will be begun anew by the next service", job_id)

    def _count(self, job_id: str, more: int) -> None:
        """Note durably that a job is begun, or stopped in order: of one that kills the service nothing else remains."""
        record = self._records[job_id]
        try:
            # As it waits: the next service begins it anew, however far it is now.
            waiting = Job(id=job_id)
            self._save(record.model_copy(update={"job": waiting, "starts": record.starts + more}))
        except (DeskFull, OSError) as error:
            logger.warning("the start of job %s is not counted: %s", job_id, error)

    def _changed(self, job_id: str, **change: Any) -> _Record:
        record = self._records[job_id]
        return record.model_copy(update={"job": record.job.model_copy(update=change)})

    def _tell(self, job_id: str, **change: Any) -> None:
        """Change what is said of a job, in memory alone: how far it was is of no use to the next service."""
        with self._lock:
            self._records[job_id] = self._changed(job_id, **change)

    def _go_on(self) -> None:
        if self._closing.is_set():
            raise _Stopped

    def _kept(self, result: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Keep the updates in a result; return it with their names in their places, and the names."""
        plain, updates = dict(result), []
        for key, value in result.items():
            if isinstance(value, bytes):
                plain[key] = frame_id(value)
                updates.append(plain[key])
                with self._lock:
                    self._write(self._storage.update(plain[key]), value)
                    self._updates.add(plain[key])
        return json.loads(json.dumps(plain, allow_nan=False)), tuple(updates)

    def _frame(self, name: str) -> Frame:
        with self._lock:
            data = self._storage.frame(name).read_bytes() if name in self._frames else b""
            if frame_id(data) != name:
                self._frames.discard(name)  # damaged on the disk: as good as never sent
                raise FramesMissing([name])
        return decode_frame(data, kinds=KINDS, most=self._settings.max_frame_bytes)

    def _save(self, record: _Record) -> None:
        """Make a job durable. It is on the books before it is on the disk, so that its frames are not thrown away."""
        with self._lock:
            before = self._records.get(record.job.id)
            self._records[record.job.id] = record
            try:
                self._write(self._storage.job(record.job.id), record.model_dump_json().encode())
            except BaseException:
                if before is None:
                    del self._records[record.job.id]
                else:
                    self._records[record.job.id] = before
                raise

    def _write(self, file: Path, data: bytes, reserve: int = 0) -> None:
        """Write a file and leave ``reserve`` bytes free, having forgotten as many ended jobs as it takes; not the one
        whose own file is written."""
        most, needed = self._settings.desk_bytes, len(data) + reserve
        ended = (r for r in self._records.values() if r.job.ended and self._storage.job(r.job.id) != file)
        for record in sorted(ended, key=lambda record: record.number):
            if self._storage.used + needed <= most:
                break
            self._forget(record)
        if self._storage.used + needed > most:
            raise DeskFull(f"the desk is full: {self._storage.used} of {most} bytes are taken by what is still needed")
        self._storage.write(file, data)

    def _forget(self, record: _Record) -> None:
        """Throw an ended job away: its record last, so that a kill in the middle leaves what is needed to go on."""
        others = [other for other in self._records.values() if other is not record]
        for name in (record.frames & self._frames) - {n for r in others if not r.job.ended for n in r.frames}:
            self._frames.remove(name)
            self._storage.remove(self._storage.frame(name))
        for name in set(record.updates) - {n for r in others for n in r.updates}:
            self._updates.discard(name)
            self._storage.remove(self._storage.update(name))
        del self._records[record.job.id]
        self._storage.remove(self._storage.job(record.job.id))


def _step_back() -> None:
    """Give this thread, and those that it starts, a lower priority; only Linux has one for each thread.

    Teaching on the two cores that Loupe answers on made a question take 1.7 times as long, and so 1.1 times.
    """
    if sys.platform == "linux":
        this = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, this, os.getpriority(os.PRIO_PROCESS, this) + _NICER)


def _read(file: Path) -> _Record:
    try:
        return _Record.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise BadInput(f"a job that cannot be read ({first_problem(error)})", where=file, fix="delete it") from None
