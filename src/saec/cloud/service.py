"""The cloud service as an app and as a process."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from saec.cloud.desk import Desk
from saec.cloud.desk_endpoints import DeskEndpoints, judge_between
from saec.cloud.endpoints import Endpoints
from saec.cloud.transport import is_loopback
from saec.cloud.wire import encode_problem
from saec.config import ServeSettings
from saec.data.manifest import write_atomic
from saec.errors import BadInput, SaecError
from saec.types import Backend

logger = logging.getLogger(__name__)

Started = Callable[[Exception | None], None]

# Longer than the client keeps an idle connection, so that it never writes into one that is just being closed.
_KEEP_ALIVE_S = 30


def create_app(
    backend: Backend, settings: ServeSettings, desk: Desk | None = None, *, on_started: Started | None = None
) -> FastAPI:
    """Return the service as an ASGI app around one backend.

    ``POST /v1/judge``, ``PUT /v1/references/{sha256}``, ``PUT /v1/adapter``, ``GET /v1/model``, ``GET /healthz``,
    ``GET /metrics``, and ``/v1/learn/…`` at the desk, if there is one (:mod:`saec.cloud.desk_endpoints`). Starting the
    app runs the backend's ``warm_up()`` if it has one; until that is done, questions get 503. Then the desk is opened
    and ``on_started`` called once, with ``None`` or with what went wrong. Refusals are JSON ``{"error", "fix"}``. An
    app serves once, and closes the desk: after its shutdown, build another.
    """
    endpoints = Endpoints(backend, settings)

    async def start() -> None:
        failure: Exception | None = None
        try:
            await endpoints.warm_up()
            if desk is not None:
                desk.open(judge_between(backend, endpoints.batcher, asyncio.get_running_loop()))
        except Exception as error:  # a model may fail in any way; /healthz and the caller must hear of it
            if not isinstance(error, BadInput):  # which says in one line all that there is to say
                logger.exception("the backend did not start")
            endpoints.status, failure = "failed", error
        if on_started is not None:
            on_started(failure)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        endpoints.batcher.start()
        starting = asyncio.create_task(start())
        yield
        endpoints.status = "draining"
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        if desk is not None:
            await asyncio.to_thread(desk.close)
        await endpoints.batcher.drain(settings.max_deadline_s)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/v1/judge", endpoints.judge, methods=["POST"], response_model=None)
    app.add_api_route("/v1/references/{sha256}", endpoints.put_reference, methods=["PUT"], response_model=None)
    app.add_api_route("/v1/adapter", endpoints.put_adapter, methods=["PUT"], response_model=None)
    app.add_api_route("/v1/model", endpoints.model, methods=["GET"], response_model=None)
    app.add_api_route("/healthz", endpoints.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", endpoints.metrics, methods=["GET"], response_model=None)
    DeskEndpoints(endpoints, desk, settings).add_to(app)
    app.add_exception_handler(HTTPException, _no_such_route)
    return app


def serve(
    backend: Backend,
    settings: ServeSettings,
    desk: Desk | None = None,
    *,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish the questions at hand and return.

    One process, one event loop. ``on_ready`` gets the actual address, such as ``http://127.0.0.1:40913`` for port 0,
    once the backend is warm.

    Raises:
        BadInput: an address that may not or cannot be bound, or a backend that does not start.
    """
    listener = _listen(settings)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    failures: list[Exception] = []

    def started(failure: Exception | None) -> None:
        if failure is not None:
            failures.append(failure)
            server.should_exit = True
        elif on_ready is not None:
            on_ready(url)

    server = uvicorn.Server(
        uvicorn.Config(
            create_app(backend, settings, desk, on_started=started),
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(settings.max_deadline_s),
        )
    )
    with listener, _signals_only_stop():
        server.run(sockets=[listener])
    if failures:
        if isinstance(failures[0], SaecError):
            raise failures[0]
        what = f"the backend does not start ({type(failures[0]).__name__}: {failures[0]})"
        raise BadInput(what, where=backend.model_id) from failures[0]


def ready_file(path: Path) -> Callable[[str], None]:
    """Return an ``on_ready`` that writes ``{"url": …}`` to ``path``; a reader never sees half of it."""

    return lambda url: write_atomic(path, json.dumps({"url": url}) + "\n")


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    text = encode_problem(f"{request.method} {request.url.path} is not served", "POST /v1/judge")
    return Response(text, status_code=status, media_type="application/json")


def _listen(settings: ServeSettings) -> socket.socket:
    if settings.token is None and not is_loopback(settings.host):
        fix = "pass a --token-file, or listen on 127.0.0.1"
        raise BadInput("without a token only loopback addresses are served", where=settings.host, fix=fix)
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
        # Asyncio turns Nagle's algorithm off only where the protocol is named; with it every answer takes 40 ms more.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        if listener is not None:
            listener.close()
        where = f"{settings.host}:{settings.port}"
        raise BadInput(f"cannot listen ({error.strerror or error})", where=where, fix="choose another port") from None
    return listener


@contextmanager
def _signals_only_stop() -> Iterator[None]:
    """Let SIGTERM and SIGINT end the serving, but not the process in the middle of what follows.

    Uvicorn raises the signal again after its own shutdown; under these handlers that is harmless: ``serve`` returns.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
