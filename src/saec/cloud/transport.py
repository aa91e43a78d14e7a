"""HTTP from the side that asks: one request inside a deadline, every failure turned into a :class:`CloudError`."""

from __future__ import annotations

import ipaddress
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from saec.errors import BadInput
from saec.types import CloudError, Reason

_CHUNK = 65_536
_MAX_ANSWER_BYTES = 4_000_000
# Shorter than the service keeps idle connections, see saec.cloud.service.
_KEEP_ALIVE_S = 10.0


Sink = Callable[[int, httpx.Headers], Callable[[bytes], object] | None]
"""Gets status and headers of an answer and returns what takes its body piece by piece, or ``None`` to have it whole."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete HTTP answer; ``body`` is empty where a :data:`Sink` took it."""

    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def retry_after_s(self) -> float | None:
        """Seconds in the ``Retry-After`` header; ``None`` without one or when it names a date."""
        try:
            wait = float(self.headers.get("retry-after", ""))
        except ValueError:
            return None
        return wait if math.isfinite(wait) and wait >= 0 else None

    @property
    def problem(self) -> Mapping[str, object]:
        """The JSON of a refusal; empty where there is none."""
        try:
            problem = json.loads(self.body)
        except ValueError:
            return {}
        return problem if isinstance(problem, dict) else {}

    def refusal(self) -> CloudError:
        """Return what an answer that is no success means for the edge."""
        message = f"status {self.status}: {self.problem.get('error', 'no reason given')}"
        exact = self.problem.get("retry_after_s")
        wait = float(exact) if isinstance(exact, int | float) and 0 <= exact < float("inf") else self.retry_after_s
        match self.status:
            case 429 | 503:
                return CloudError(Reason.CLOUD_REFUSED, message, retry_after_s=wait)
            case 504 | 408:
                return CloudError(Reason.CLOUD_TIMEOUT, message)
            case _:
                return CloudError(Reason.CLOUD_BAD_ANSWER, message)


@dataclass(slots=True)
class Tally:
    """Counts the body bytes of one question over all of its requests."""

    bytes: int = 0


class Uplink:
    """A pooled, thread-safe HTTP client that holds a total deadline and counts what went up and came down.

    ``bytes_sent`` is the number of request *body* bytes handed to the network, failed and repeated requests included,
    ``bytes_received`` that of the answers' bodies; request lines, headers (about 200 bytes each), TLS and TCP are not
    in them.
    """

    def __init__(
        self, url: str, *, token: str | None, connections: int, transport: httpx.BaseTransport | None = None
    ) -> None:
        host = _host(url)
        if token is not None and not (token.isascii() and token.isprintable()):
            raise BadInput("the token has characters that HTTP cannot carry", where=url, fix="use printable ASCII")
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=_KEEP_ALIVE_S
            ),
            transport=transport,
            # A proxy of the surroundings must not swallow questions to this same machine.
            trust_env=not is_loopback(host),
        )
        self._sent = self._received = 0
        self._lock = threading.Lock()

    @property
    def bytes_sent(self) -> int:
        """Request body bytes since the start."""
        return self._sent

    @property
    def bytes_received(self) -> int:
        """Answer body bytes since the start."""
        return self._received

    def request(
        self,
        method: str,
        path: str,
        *,
        deadline: float,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        tally: Tally | None = None,
        patience_s: float = math.inf,
        sink: Sink | None = None,
    ) -> Reply:
        """Send one request and read its whole answer by ``deadline``, in seconds of ``time.monotonic``.

        Sending and reading stop at the deadline; connecting may take what was left when it began. ``tally`` counts the
        body's bytes as they go up. After ``patience_s`` seconds in which nothing moves it is given up earlier. An
        answer of more than 4 MB needs a ``sink``, whose exceptions are let through.

        Raises:
            CloudError: no complete answer.
        """

        def pieces() -> Iterator[bytes]:
            for start in range(0, len(body), _CHUNK):
                _check_time(deadline)
                piece = body[start : start + _CHUNK]
                self._count(len(piece), tally)
                yield piece

        left = deadline - time.monotonic()
        try:
            _check_time(deadline)
            request = self._http.build_request(
                method,
                path,
                content=pieces() if body else None,
                headers={**(headers or {}), **({"Content-Length": str(len(body))} if body else {})},
                timeout=min(left, patience_s),
            )
            return self._exchange(request, deadline, sink)
        except httpx.TimeoutException as error:
            what = f"no answer within {left:.2f} s ({type(error).__name__})"
            raise CloudError(Reason.CLOUD_TIMEOUT, what) from None
        except _AnswerTooLong:
            raise CloudError(Reason.CLOUD_BAD_ANSWER, "the answer is far too long") from None
        except (httpx.DecodingError, httpx.TooManyRedirects) as error:
            raise CloudError(Reason.CLOUD_BAD_ANSWER, str(error)) from None
        except httpx.HTTPError as error:  # connect, read, write, protocol: the other side is not there or went away
            what = f"no connection: {str(error) or type(error).__name__}"
            raise CloudError(Reason.CLOUD_UNREACHABLE, what) from None

    def close(self) -> None:
        """Close the pooled connections."""
        self._http.close()

    def _count(self, size: int, tally: Tally | None) -> None:
        with self._lock:
            self._sent += size
        if tally is not None:
            tally.bytes += size

    def _exchange(self, request: httpx.Request, deadline: float, sink: Sink | None) -> Reply:
        response = self._http.send(request, stream=True)
        try:
            take = None if sink is None else sink(response.status_code, response.headers)
            answer = bytearray()
            for piece in response.iter_bytes():
                _check_time(deadline)
                with self._lock:
                    self._received += len(piece)
                if take is not None:
                    take(piece)
                    continue
                answer += piece
                if len(answer) > _MAX_ANSWER_BYTES:
                    raise _AnswerTooLong
            return Reply(response.status_code, response.headers, bytes(answer))
        finally:
            response.close()


class _AnswerTooLong(Exception):
    pass


def _check_time(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise httpx.TimeoutException("the deadline passed")


def _host(url: str) -> str:
    fix = "write http://host:port"
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and httpx.URL(url).host and parts.port != 0:
            return parts.hostname
    except (ValueError, httpx.InvalidURL) as error:
        raise BadInput(f"not an http address ({error})", where=url, fix=fix) from None
    raise BadInput("not an http address", where=url, fix=fix)


def is_loopback(host: str) -> bool:
    """Say whether a host name or address means this same machine, without asking a name server."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
