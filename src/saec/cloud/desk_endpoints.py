"""What the cloud service does with the requests of learning. Work on files is done off the event loop, a few at a time:
whoever learns never makes a question wait. A body is read before it takes one of those places: uploads that stall hold
bytes, of which there is a bounded number, and nobody else's work.

A frame is acknowledged once it is on the disk: 201, or 200 where it was there before, so that sending twice is sending
once. Updates are named by their SHA-256 and are downloaded in as many pieces as it takes (``Range``).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from saec.cloud.backend import prepared
from saec.cloud.batcher import Batcher
from saec.cloud.body import Body
from saec.cloud.desk import Desk, FrameNames, Job, JobId, Judge, Name
from saec.cloud.endpoints import Endpoints, Problem
from saec.config import ServeSettings
from saec.errors import first_problem
from saec.fleet.frame import CONTENT_TYPE
from saec.types import Backend, Opinion, Query

T = TypeVar("T")

_JSON = "application/json"
_AT_ONCE = 4
_MOST_JSON = 1_000_000
_BODIES = 8  # of the largest size that may be on their way together
_COME_BACK_S = 1.0
_WAIT_S = 0.01

PATIENCE_S = 5.0
"""Live load that a question of learning lets pass before it."""

_Handle = Callable[[Desk, Request, Body], Awaitable[Response]]


class _Request(BaseModel):
    """A job's request: what the desk reads of it. The rest is for whoever does the job."""

    model_config = ConfigDict(extra="allow")

    frames: tuple[Name, ...] = ()


class DeskEndpoints:
    """The handlers of ``/v1/learn``; all of them answer 404 where there is no desk."""

    def __init__(self, endpoints: Endpoints, desk: Desk | None, settings: ServeSettings) -> None:
        self._endpoints = endpoints
        self._desk = desk
        self._settings = settings
        self._metrics = endpoints.counters
        if desk is not None:
            self._metrics.watch(desk.jobs)
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._bytes_left = _BODIES * max(settings.max_body_bytes, _MOST_JSON)

    def add_to(self, app: FastAPI) -> None:
        """Serve them."""
        for method, path, handle in (
            ("PUT", "frames/{sha256}", self._put_frame),
            ("POST", "missing", self._missing),
            ("PUT", "jobs/{job_id}", self._put_job),
            ("GET", "jobs/{job_id}", self._get_job),
            ("GET", "updates/{sha256}", self._get_update),
        ):
            app.add_api_route(f"/v1/learn/{path}", self._route(handle), methods=[method], response_model=None)

    def _route(self, handle: _Handle) -> Callable[[Request], Awaitable[Response]]:
        async def at_the_desk(request: Request, body: Body) -> Response:
            if self._desk is None:
                raise Problem(404, "this service does not learn", "start it with saec cloud serve --learn DIR")
            async with asyncio.timeout(self._settings.max_deadline_s):
                return await handle(self._desk, request, body)

        async def answered(request: Request) -> Response:
            return await self._endpoints.answer(request, at_the_desk)

        return answered

    async def _put_frame(self, desk: Desk, request: Request, body: Body) -> Response:
        data = bytes(await self._read(request, body, CONTENT_TYPE, self._settings.max_body_bytes))
        fresh = await self._in_place(desk.put, request.path_params["sha256"], data)
        self._metrics.frame(len(data), fresh)
        return Response(status_code=201 if fresh else 200)

    async def _missing(self, desk: Desk, request: Request, body: Body) -> Response:
        names = _valid(FrameNames, _loaded(await self._read(request, body, _JSON, _MOST_JSON)))
        missing = await self._in_place(desk.missing, names.frames)
        return Response(FrameNames(frames=tuple(missing)).model_dump_json(), media_type=_JSON)

    async def _put_job(self, desk: Desk, request: Request, body: Body) -> Response:
        job_id = _valid(JobId, request.path_params["job_id"])
        wanted = _loaded(await self._read(request, body, _JSON, _MOST_JSON))
        _valid(_Request, wanted)
        job, fresh = await self._in_place(desk.start, job_id, wanted)
        return _told(job, 201 if fresh else 200)

    async def _get_job(self, desk: Desk, request: Request, body: Body) -> Response:
        job = await asyncio.to_thread(desk.job, request.path_params["job_id"])  # from memory: it takes no place
        if job is None:
            raise Problem(404, "no such job", "start it with PUT")
        return _told(job, 200)

    async def _get_update(self, desk: Desk, request: Request, body: Body) -> Response:
        name = request.path_params["sha256"]
        data = await self._in_place(desk.update, name)
        if data is None:
            raise Problem(404, "no such update", "take its SHA-256 from the job's result")
        headers = {"ETag": f'"{name}"', "Accept-Ranges": "bytes"}
        span = _span(request.headers.get("range"), len(data))
        if span is None:
            status, piece = 200, data
        elif not span:
            raise Problem(416, f"the update has {len(data)} bytes", "begin inside of it")
        else:
            status, piece = 206, data[span.start : span.stop]
            headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{len(data)}"
        self._metrics.update(len(piece))
        return Response(piece, status_code=status, headers=headers, media_type=CONTENT_TYPE)

    async def _in_place(self, work: Callable[..., T], *arguments: object) -> T:
        """Do work on the disk, a few at a time."""
        async with self._places:
            return await asyncio.to_thread(work, *arguments)

    async def _read(self, request: Request, body: Body, content_type: str, limit: int) -> bytearray:
        if request.headers.get("content-type") != content_type:
            raise Problem(415, "a body of another type", f"send Content-Type: {content_type}")
        announced = request.headers.get("content-length")
        size = min(int(announced), limit) if announced is not None and announced.isdigit() else limit
        if size > self._bytes_left:
            what = "too many bytes of learning are on their way"
            raise Problem(429, what, "send again later", retry_after_s=_COME_BACK_S)
        self._bytes_left -= size
        try:
            return await body.read(limit, announced)
        finally:
            self._bytes_left += size


def judge_between(backend: Backend, batcher: Batcher[Query, Opinion], loop: asyncio.AbstractEventLoop) -> Judge:
    """Return how a job asks the backend: one question at a time in its own thread, while no live one is at hand.

    So a live question waits for the rest of one question of learning at most, and for none if it finds others. Where
    there is always one at hand, one of learning goes between two batches after :data:`PATIENCE_S`: a service that is
    always busy learns too, if slowly.
    """

    async def one(query: Query) -> Opinion | Exception:
        until = loop.time() + PATIENCE_S
        while batcher.at_hand and loop.time() < until:
            await asyncio.sleep(_WAIT_S)
        try:
            (answer,) = await batcher.in_work_thread(lambda: backend.judge([prepared(backend, query)]))
        except Exception as error:  # noqa: BLE001 - it stands in the answer's place
            return error
        return answer

    def judge(queries: Sequence[Query]) -> list[Opinion | Exception]:
        return [asyncio.run_coroutine_threadsafe(one(query), loop).result() for query in queries]

    return judge


def _span(header: str | None, size: int) -> range | None:
    """Return the bytes that a ``Range`` header asks for, empty where there are none; ``None``: all of them."""
    found = re.fullmatch(r"bytes=(\d{1,18})-(\d{0,18})", header or "")
    if found is None:
        return None
    start, last = int(found[1]), int(found[2] or size - 1)
    return range(start, min(last + 1, size))


def _loaded(data: bytearray) -> dict[str, Any]:
    try:
        loaded = json.loads(data)
        json.dumps(loaded, allow_nan=False)  # Python reads NaN, which is no JSON and differs from itself
    except (ValueError, RecursionError) as error:
        raise Problem(422, f"not JSON ({error})", "send a JSON object") from None
    if not isinstance(loaded, dict):
        raise Problem(422, "not a JSON object", "send a JSON object")
    return loaded


def _valid(kind: type[T], value: object) -> T:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise Problem(422, first_problem(error), "send it in the documented form") from None


def _told(job: Job, status: int) -> Response:
    return Response(job.model_dump_json(), status_code=status, media_type=_JSON)
