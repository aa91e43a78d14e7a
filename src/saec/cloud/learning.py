"""The edge's side of learning: frames up, a job, an update down; every step can be cut off and gone on with.

Waiting is part of the work here, unlike in judging: each call tries again until its deadline, whatever becomes of the
line or the service meanwhile, and gives up early only where the answer would stay the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from saec.cloud.desk import FrameNames, FramesMissing, Job, JobStatus
from saec.cloud.transport import Reply, Uplink
from saec.config import CloudSettings
from saec.errors import first_problem
from saec.fleet.frame import CONTENT_TYPE
from saec.fleet.outbox import Outbox
from saec.fleet.sqlite_file import sync_folder
from saec.types import CloudError, Reason

M = TypeVar("M", bound=BaseModel)

Progress = Callable[[int, int], None]
"""Called with what is done and all there is to do."""

OnWait = Callable[[CloudError, float], None]
"""Called with why there was no answer, and for how many seconds it will be tried again."""

_JSON = "application/json"
_AT_ITS_END = 416  # nothing is left to download
_NAMES = 1000  # asked about at once
_FIRST_WAIT_S, _MOST_WAIT_S = 0.1, 5.0
_MOST_POLL_S = 2.0
_CHECK_S = 10.0
_CONFLICT = 409
_CHANGED_FIRST = (413, 415, 422)


class ServiceRefused(CloudError):
    """The service has said no. ``fix`` is what it says is to be done, ``""`` where it says nothing; ``missing`` are
    names that it lacks."""

    def __init__(self, reply: Reply) -> None:
        plain = reply.refusal()
        super().__init__(plain.reason, str(plain), retry_after_s=plain.retry_after_s)
        self.status = reply.status
        self.fix = str(reply.problem.get("fix") or "")
        missing = reply.problem.get("missing")
        self.missing = tuple(map(str, missing)) if isinstance(missing, list) else ()

    @property
    def for_good(self) -> bool:
        """Whether the same request would be refused for ever: what it holds has to change first."""
        return self.status in _CHANGED_FIRST


class JobFailed(CloudError):
    """A job has failed; asked for again, the same job would fail again."""


class LearnClient:
    """Talks to a service that has a desk. For one thread at a time.

    ``bytes_up`` and ``bytes_down`` are those of the requests' and answers' bodies, repeated ones included.
    """

    def __init__(
        self,
        url: str,
        settings: CloudSettings,
        *,
        on_wait: OnWait = lambda error, seconds: None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._uplink = Uplink(url, token=settings.token, connections=1, transport=transport)
        self._patience_s = settings.timeout_s
        self._on_wait = on_wait

    @property
    def bytes_up(self) -> int:
        """Bytes that went up so far."""
        return self._uplink.bytes_sent

    @property
    def bytes_down(self) -> int:
        """Bytes that came down so far."""
        return self._uplink.bytes_received

    def check(self) -> None:
        """Ask once whether a service that learns is there and takes the token, without waiting for one.

        Raises:
            CloudError: nobody answers, or something else; :class:`ServiceRefused`: it does not learn, or not with us.
        """
        try:
            self._missing([], time.monotonic() + _CHECK_S, patient=False)
        except ServiceRefused as error:
            if error.reason is Reason.CLOUD_BAD_ANSWER:
                raise  # else it is there, and busy

    def send(self, outbox: Outbox, *, deadline_s: float, progress: Progress = lambda done, total: None) -> int:
        """Send what waits, in order, and return the number of frames that went up.

        The service is asked first what it has: what a cut upload brought there does not go up again. A frame leaves the
        outbox once the service has it on its disk.

        Raises:
            CloudError: not all was taken by the deadline, or a frame was refused; what was not taken still waits.
        """
        deadline = time.monotonic() + deadline_s
        waiting = outbox.pending()
        sent = 0
        for start in range(0, len(waiting), _NAMES):
            names = waiting[start : start + _NAMES]
            missing = set(self._missing(names, deadline))
            outbox.acknowledge([name for name in names if name not in missing])
            for index, name in enumerate(names, start + 1):
                if name in missing:
                    self._put(name, outbox.read(name), deadline)
                    outbox.acknowledge([name])
                    sent += 1
                progress(index, len(waiting))
        return sent

    def start(self, job_id: str, request: Mapping[str, Any], *, deadline_s: float) -> Job:
        """Start a job, or find it started: the same id and request are the same job.

        Raises:
            FramesMissing: the service lacks some of its frames: send them, then start it again.
            CloudError: refused, or no answer by the deadline.
        """
        body = json.dumps(request, sort_keys=True, allow_nan=False).encode()
        deadline = time.monotonic() + deadline_s
        try:
            return _parsed(Job, self._ask("PUT", f"jobs/{job_id}", deadline, body=body, kind=_JSON))
        except ServiceRefused as error:
            if error.status == _CONFLICT and error.missing:
                raise FramesMissing(error.missing) from None
            raise

    def finish(self, job_id: str, *, deadline_s: float, progress: Progress = lambda done, total: None) -> Job:
        """Wait until a job is done and return it with its result.

        Raises:
            JobFailed: it failed, for good.
            CloudError: it is not known, or is not done by the deadline.
        """
        deadline = time.monotonic() + deadline_s
        wait = _FIRST_WAIT_S
        while True:
            job = _parsed(Job, self._ask("GET", f"jobs/{job_id}", deadline))
            progress(job.done, job.total)
            if job.status is JobStatus.FAILED:
                raise JobFailed(Reason.CLOUD_BAD_ANSWER, f"the job failed: {job.error}")
            if job.ended:
                return job
            if time.monotonic() + wait >= deadline:
                what = f"the job is not done after {deadline_s:.0f} s ({job.done} of {job.total} steps)"
                raise CloudError(Reason.CLOUD_TIMEOUT, what)
            time.sleep(wait)
            wait = min(2 * wait, _MOST_POLL_S)

    def download(self, sha256: str, target: Path, *, most: int, deadline_s: float) -> None:
        """Bring an update of at most ``most`` bytes to ``target``, which appears whole and right, or not at all.

        What has come is kept beside it in ``<sha256>.part``; the next call goes on from there.

        Raises:
            CloudError: not there, too large, not the bytes that its name states, or not complete by the deadline.
            OSError: the disk refuses.
        """
        deadline = time.monotonic() + deadline_s
        part = target.with_name(f"{sha256}.part")
        while True:
            begun = part.stat().st_size if part.exists() else 0
            self._fetch(sha256, part, most, deadline)
            with part.open("rb") as stream:
                right = hashlib.file_digest(stream, "sha256").hexdigest() == sha256
                os.fsync(stream.fileno())
            if right:
                break
            part.unlink()
            if not begun:  # else what lay there was wrong: once more, from the beginning
                raise CloudError(Reason.CLOUD_BAD_ANSWER, "the update does not have the SHA-256 that it is named by")
        part.replace(target)
        sync_folder(target.parent)

    def close(self) -> None:
        """Close the connection."""
        self._uplink.close()

    def _put(self, name: str, data: bytes, deadline: float) -> None:
        try:
            self._ask("PUT", f"frames/{name}", deadline, body=data, kind=CONTENT_TYPE)
        except CloudError as error:
            error.args = (f"frame {name}: {error}",)
            raise

    def _missing(self, names: list[str], deadline: float, *, patient: bool = True) -> tuple[str, ...]:
        body = FrameNames(frames=tuple(names)).model_dump_json().encode()
        reply = self._ask("POST", "missing", deadline, body=body, kind=_JSON, patient=patient)
        return _parsed(FrameNames, reply).frames

    def _fetch(self, sha256: str, part: Path, most: int, deadline: float) -> None:
        """Append to ``part`` until it is complete, each try going on where the last one ended."""
        with part.open("ab") as file:
            self._ask("GET", f"updates/{sha256}", deadline, into=_Growing(file, most))

    def _ask(
        self,
        method: str,
        path: str,
        deadline: float,
        *,
        body: bytes = b"",
        kind: str | None = None,
        into: _Growing | None = None,
        patient: bool = True,
    ) -> Reply:
        """Ask until there is an answer, or the deadline comes; once only unless ``patient``. Bad answers would stay bad
        and are raised at once."""
        wait = _FIRST_WAIT_S
        while True:
            try:
                return self._asked_once(method, path, deadline, body=body, kind=kind, into=into)
            except CloudError as error:
                pause = max(wait * random.uniform(0.5, 1), error.retry_after_s or 0)
                late = time.monotonic() + pause >= deadline
                if not patient or late or error.reason is Reason.CLOUD_BAD_ANSWER:
                    raise
                if wait == _FIRST_WAIT_S:
                    self._on_wait(error, deadline - time.monotonic())
            time.sleep(pause)
            wait = min(2 * wait, _MOST_WAIT_S)

    def _asked_once(
        self, method: str, path: str, deadline: float, *, body: bytes, kind: str | None, into: _Growing | None
    ) -> Reply:
        headers = {"Content-Type": kind} if kind else {} if into is None else into.headers()
        reply = self._uplink.request(
            method,
            f"/v1/learn/{path}",
            deadline=deadline,
            body=body,
            headers=headers,
            patience_s=self._patience_s,
            sink=None if into is None else into.sink,
        )
        if reply.status not in (200, 201, 206, _AT_ITS_END):
            raise ServiceRefused(reply)
        return reply


class _Growing:
    """A file that an update is appended to."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self._file, self._most = file, most
        self._size = file.tell()

    def headers(self) -> dict[str, str]:
        """Ask for what is not there yet, as it is: a compressed answer could not be gone on with."""
        return {"Range": f"bytes={self._size}-", "Accept-Encoding": "identity"}

    def sink(self, status: int, headers: httpx.Headers) -> Callable[[bytes], object] | None:
        if status == 200:  # the whole of it
            self._size = 0
            self._file.truncate(0)
        elif status != 206:
            return None
        elif not headers.get("content-range", "").startswith(f"bytes {self._size}-"):
            raise CloudError(Reason.CLOUD_BAD_ANSWER, "another piece of the update than was asked for")
        return self._take

    def _take(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._most:
            raise CloudError(Reason.CLOUD_BAD_ANSWER, f"the update is larger than {self._most} bytes")
        self._file.write(piece)


def _parsed(kind: type[M], reply: Reply) -> M:
    try:
        return kind.model_validate_json(reply.body)
    except ValidationError as error:
        raise CloudError(Reason.CLOUD_BAD_ANSWER, f"the answer cannot be used ({first_problem(error)})") from None
