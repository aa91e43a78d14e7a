"""What the cloud service does with each request. The app around it is built in :mod:`saec.cloud.service`."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from saec import __version__
from saec.cloud import wire
from saec.cloud.backend import SwapsAdapter, prepared, warm_up
from saec.cloud.batcher import Batcher, Draining, Expired, Overloaded, WorkFailed
from saec.cloud.body import Body, ClientGone, TooLarge
from saec.cloud.desk import DeskFull, FramesMissing, JobConflict
from saec.cloud.metrics import Metrics
from saec.cloud.references import ReferenceStore
from saec.config import ServeSettings
from saec.data.decode import UnreadableImage, decode_image
from saec.errors import BadInput
from saec.fleet.frame import BadFrame
from saec.types import Backend, CloudError, Opinion, Query, Reason

logger = logging.getLogger(__name__)

_JSON = "application/json"
_DISCARD_S = 2.0
_MAX_SMALL_BODY = 16_384
_STATUS_CLIENT_GONE = 499  # nobody reads it; the name under which proxies log the same thing

_STATUS_OF_REASON = {Reason.CLOUD_TIMEOUT: 504, Reason.CLOUD_UNREACHABLE: 503}


class Problem(Exception):
    """A refusal: an HTTP status, what is wrong, and what to do about it."""

    def __init__(
        self, status: int, error: str, fix: str, *, retry_after_s: float | None = None, **more: object
    ) -> None:
        self.status = status
        self._headers = {}
        if retry_after_s is not None:
            # The header knows whole seconds only; the body keeps the exact figure for our own client.
            self._headers["Retry-After"] = str(math.ceil(retry_after_s))
            more["retry_after_s"] = retry_after_s
        if status == 401:
            self._headers["WWW-Authenticate"] = "Bearer"
        self._body = wire.encode_problem(error, fix, **more)
        super().__init__(error)

    def response(self) -> Response:
        """Return the JSON answer ``{"error", "fix", …}``."""
        return Response(self._body, status_code=self.status, headers=self._headers, media_type=_JSON)


class Endpoints:
    """The handlers of one service and the state they share."""

    def __init__(self, backend: Backend, settings: ServeSettings) -> None:
        self._backend = backend
        self._settings = settings
        self._references = ReferenceStore(settings.reference_cache_bytes)
        self.batcher: Batcher[Query, Opinion] = Batcher(
            backend.judge,
            max_batch=settings.max_batch,
            max_wait_s=settings.max_wait_ms / 1e3,
            max_queue=settings.max_queue,
            on_batch=lambda size: self.counters.batch(size),
        )
        self.counters = Metrics(lambda: self.batcher.depth)
        self.status = "starting"

    async def judge(self, request: Request) -> Response:
        """``POST /v1/judge``: a question in, an opinion out."""
        response = await self.answer(request, self._judge)
        self.counters.answered(response.status_code)
        return response

    async def put_reference(self, request: Request) -> Response:
        """``PUT /v1/references/{sha256}``: keep a reference image for the questions that name it."""
        return await self.answer(request, self._put_reference)

    async def put_adapter(self, request: Request) -> Response:
        """``PUT /v1/adapter``: answer with another adapter of this machine, or with none, from the next batch on."""
        return await self.answer(request, self._put_adapter)

    async def model(self, request: Request) -> Response:
        """``GET /v1/model``: who answers here; needs the token, so that a client can check its own."""
        return await self.answer(request, self._health)

    async def health(self, request: Request) -> Response:
        """``GET /healthz``: 200 when questions are welcome, else 503; needs no token."""
        return await self._health(request, Body(request.receive, self.counters.received))

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``: Prometheus text; needs the token where there is one."""
        return await self.answer(request, self._render_metrics)

    async def warm_up(self) -> None:
        """Run the backend's own ``warm_up()``, where it has one, in its thread; questions are welcome afterwards."""
        await self.batcher.in_work_thread(lambda: warm_up(self._backend))
        self.status = "ready"

    async def answer(self, request: Request, handle: Callable[[Request, Body], Awaitable[Response]]) -> Response:
        """Let ``handle`` answer a request that shows the token; whatever it raises becomes a refusal."""
        body = Body(request.receive, self.counters.received)
        try:
            try:
                self._authorise(request)
                return await handle(request, body)
            except ClientGone:
                raise
            except Exception as error:  # whatever goes wrong with one question is answered; the service goes on
                problem = _problem(error)
                if problem.status == 500:
                    logger.exception("a question failed")
                await body.discard(self._settings.max_body_bytes, _DISCARD_S)
                return problem.response()
        except ClientGone:
            return Response(status_code=_STATUS_CLIENT_GONE)

    def _authorise(self, request: Request) -> None:
        token = self._settings.token
        shown = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
            raise Problem(401, "the token is missing or wrong", "set cloud.token to the service's serve.token")

    async def _judge(self, request: Request, body: Body) -> Response:
        arrived = time.monotonic()
        if request.headers.get("content-type") != wire.CONTENT_TYPE:
            raise Problem(415, "not a question", f"send Content-Type: {wire.CONTENT_TYPE}")
        deadline = arrived + self._time_left(request)
        if self.status != "ready":
            raise Problem(503, f"the service is {self.status}", "ask again soon", retry_after_s=1.0)
        with self.batcher.admit(deadline):
            async with asyncio.timeout(deadline - arrived):
                data = await body.read(self._settings.max_body_bytes, request.headers.get("content-length"))
                received = time.monotonic()
                query = prepared(self._backend, await self._decode(data))
            decoded = time.monotonic()
            answered = await body.unless_gone(self.batcher.submit(query, deadline=deadline))
        stages = {
            "receive": received - arrived,
            "decode": decoded - received,
            "queue": answered.queue_s,
            "backend": answered.work_s,
        }
        reply = _reply(answered.value, stages, query.original_size)
        self.counters.stages({**stages, "total": time.monotonic() - arrived})
        return Response(reply, media_type=_JSON)

    def _time_left(self, request: Request) -> float:
        """Return the seconds that the client still waits, at most ``max_deadline_s``."""
        text = request.headers.get(wire.DEADLINE_HEADER)
        if text is None:
            return self._settings.max_deadline_s
        try:
            left = float(text) / 1e3
        except ValueError:
            left = math.nan
        if not math.isfinite(left):
            raise Problem(422, f"{wire.DEADLINE_HEADER} is not a number", "send the milliseconds left")
        if left <= 0:
            raise Expired
        return min(left, self._settings.max_deadline_s)

    async def _decode(self, data: bytearray) -> Query:
        question = wire.parse_question(data)
        try:
            references = {name: self._references.get(name) for name in question.references}
        except KeyError:
            missing = self._references.missing(question.references)
            raise Problem(409, "unknown reference images", "upload them and ask again", missing=missing) from None
        return await asyncio.to_thread(question.decode, references, max_pixels=self._settings.max_pixels)

    async def _put_reference(self, request: Request, body: Body) -> Response:
        with self.batcher.admit():
            async with asyncio.timeout(self._settings.max_deadline_s):
                data = await body.read(self._settings.max_body_bytes, request.headers.get("content-length"))
            name = hashlib.sha256(data).hexdigest()
            if name != request.path_params["sha256"]:
                raise Problem(422, "the image does not have this hash", "use the SHA-256 of the bytes as its name")
            image = await asyncio.to_thread(decode_image, bytes(data), name=name, max_pixels=self._settings.max_pixels)
            self._references.put(name, image)
        return Response(status_code=204)

    async def _put_adapter(self, request: Request, body: Body) -> Response:
        if self._settings.token is None or not isinstance(self._backend, SwapsAdapter):
            # A folder of this machine is named: nothing for whoever happens to reach the port.
            raise Problem(403, "adapters are not swapped here", "serve --backend transformers with a --token-file")
        if self.status != "ready":
            raise Problem(503, f"the service is {self.status}", "ask again soon", retry_after_s=1.0)
        folder = wire.decode_adapter(await body.read(_MAX_SMALL_BODY, request.headers.get("content-length")))
        await asyncio.to_thread(self._backend.swap_adapter, folder)
        return await self._health(request, body)

    async def _health(self, request: Request, body: Body) -> Response:
        health = wire.Health(
            status=self.status,
            model_id=self._backend.model_id,
            version=__version__,
            wire=wire.VERSION,
            queue_depth=self.batcher.depth,
        )
        return Response(health.model_dump_json(), status_code=200 if self.status == "ready" else 503, media_type=_JSON)

    async def _render_metrics(self, request: Request, body: Body) -> Response:
        text = await asyncio.to_thread(self.counters.render)
        return Response(text, headers={"Content-Type": Metrics.content_type})


def _reply(opinion: Opinion, stages: Mapping[str, float], original_size: tuple[int, int]) -> bytes:
    if not isinstance(opinion, Opinion):
        raise wire.BadAnswer(f"a {type(opinion).__name__} instead of an opinion")
    timing_ms = {**opinion.timing_ms, **{stage: round(value * 1e3, 3) for stage, value in stages.items()}}
    return wire.encode_opinion(replace(opinion, timing_ms=timing_ms), original_size)


def _problem(error: Exception) -> Problem:
    """Return the refusal that tells the client what happened."""
    match error:
        case Problem():
            return error
        case TooLarge(limit=limit):
            return Problem(413, f"the body exceeds {limit} bytes", "send less at once")
        case wire.WireError() | UnreadableImage():
            return Problem(422, str(error), "send a readable image in the documented form")
        case BadFrame():
            return Problem(422, str(error), "encode it with this version of saec, and send it again")
        case FramesMissing(names=names):
            return Problem(409, str(error), "send them, then start the job again", missing=names)
        case JobConflict():
            return Problem(409, str(error), "take another id for another request")
        case DeskFull():
            return Problem(507, str(error), "raise learn.desk_bytes, or free disk space")
        case BadInput():  # such as a product that the model was not fitted to
            return Problem(422, str(error), "ask about what this service's model knows")
        case Overloaded(retry_after_s=wait):
            return Problem(429, str(error), "ask again later", retry_after_s=wait)
        case Expired() | TimeoutError():
            return Problem(504, "the deadline passed before there was an answer", "allow more time")
        case Draining():
            return Problem(503, "the service is shutting down", "ask again soon", retry_after_s=1.0)
        case WorkFailed():
            return Problem(503, f"the model failed ({error})", "see the service's log")
        case CloudError(reason=Reason.CLOUD_REFUSED, retry_after_s=wait):  # an engine's load is load here too
            return Problem(429, str(error), "ask again later", retry_after_s=1.0 if wait is None else wait)
        case CloudError(reason=reason, retry_after_s=wait):
            return Problem(_STATUS_OF_REASON.get(reason, 502), str(error), "see the model's server", retry_after_s=wait)
        case wire.BadAnswer():
            return Problem(502, f"the model's answer cannot be used ({error})", "see the service's log")
        case _:
            return Problem(500, f"the question failed ({type(error).__name__}: {error})", "see the service's log")
