"""Reading a request's body under a limit, and noticing that its sender is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class TooLarge(Exception):
    """The body exceeds ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__()


class ClientGone(Exception):
    """The client closed the connection: nobody waits for the answer."""


class Body:
    """The body of one ASGI request, read once."""

    def __init__(self, receive: Receive, on_bytes: Callable[[int], None]) -> None:
        self._receive = receive
        self._on_bytes = on_bytes
        self._finished = False

    async def read(self, limit: int, announced: str | None) -> bytearray:
        """Return the body of at most ``limit`` bytes; ``announced`` is the Content-Length header, which may lie.

        Raises:
            TooLarge: more was announced, or more arrived.
            ClientGone: the connection closed in the middle.
        """
        if announced is not None and announced.isdigit() and int(announced) > limit:
            raise TooLarge(limit)
        body = bytearray()
        while not self._finished:
            body += await self._next()
            if len(body) > limit:
                raise TooLarge(limit)
        return body

    async def discard(self, limit: int, within_s: float) -> None:
        """Read what is left of a refused body and forget it, up to ``limit`` bytes and ``within_s`` seconds.

        A server that answers and closes while the client still sends makes the client's kernel drop the answer.
        """
        try:
            async with asyncio.timeout(within_s):
                while not self._finished and limit > 0:
                    limit -= len(await self._next())
        except TimeoutError:
            return

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work``, but cancel it as soon as the client closes the connection. Call after the body was read.

        Raises:
            ClientGone: the connection closed first.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._closed())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            return task.result()
        finally:
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        self._finished = not message.get("more_body", False)
        piece: bytes = message.get("body", b"")
        self._on_bytes(len(piece))
        return piece

    async def _closed(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
