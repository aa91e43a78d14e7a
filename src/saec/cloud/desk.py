"""What a cloud service needs to take part in learning, whoever does it: frames in, jobs, updates out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from saec.errors import SaecError
from saec.types import Opinion, Query

Name = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in hex: the name of a frame or of an update."""

JobId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8,64}$")]
"""Chosen by the client: the same id with the same request is the same job, however often it is asked for."""

Judge = Callable[[Sequence[Query]], list[Opinion | Exception]]
"""Asks the service's backend, one opinion or exception for each query; for threads other than the event loop's."""


class JobStatus(StrEnum):
    """How far a job is. ``DONE`` and ``FAILED`` are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Job(BaseModel):
    """One job of a desk, on the wire too. ``done`` of ``total`` steps; ``result`` is JSON and there once it is done,
    ``error`` once it failed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: JobId
    status: JobStatus = JobStatus.QUEUED
    done: int = Field(0, ge=0)
    total: int = Field(0, ge=0)
    result: Mapping[str, Any] | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.status in (JobStatus.DONE, JobStatus.FAILED)


class FrameNames(BaseModel):
    """Body of ``POST /v1/learn/missing`` and of its answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    frames: tuple[Name, ...] = Field(max_length=10_000)


class DeskFull(SaecError):
    """The desk's disk, or its share of it, is used up."""


class JobConflict(SaecError):
    """Another request was made under this job's id."""


class FramesMissing(SaecError):
    """A job names frames that are not here."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(f"{len(names)} of the job's frames are not here")


class Desk(Protocol):
    """Keeps frames and updates and runs jobs. Thread-safe; its calls may wait for a disk, never for a job."""

    def open(self, judge: Judge) -> None:
        """Begin to work; called once, when the backend is warm."""
        ...

    def close(self) -> None:
        """Stop; a job that has not ended is begun anew by the next process."""
        ...

    def put(self, name: str, data: bytes) -> bool:
        """Keep a frame; return, once it is durable, whether it is new.

        Raises:
            BadFrame: it cannot be used, or its bytes do not have the SHA-256 ``name``.
            DeskFull: there is no room for it.
        """
        ...

    def missing(self, names: Sequence[str]) -> list[str]:
        """Return those of the named frames that are not here."""
        ...

    def start(self, job_id: str, request: Mapping[str, Any]) -> tuple[Job, bool]:
        """Queue a job; return it, and whether it is new or, having failed, is begun anew. ``request["frames"]`` names
        the frames that it is about.

        Raises:
            JobConflict, FramesMissing, DeskFull: see there.
        """
        ...

    def job(self, job_id: str) -> Job | None:
        """Return how far a job is, or ``None`` where there is none."""
        ...

    def update(self, sha256: str) -> bytes | None:
        """Return the bytes of an update that a job has made, or ``None`` where there is none."""
        ...

    def jobs(self) -> Mapping[JobStatus, int]:
        """Return the number of jobs in each state."""
        ...
