"""What a running cloud service does under a burst: every question gets one answer, load is 429 and never 5xx, a fresh
question is soon answered as fast as before, and memory stays flat.

All questions of a wave are coded beforehand and leave together, each on a connection of its own, as the stations of a
plant would after a stop. What the service says of itself (answers by status, memory) is read from its ``/metrics``.
"""

from __future__ import annotations

import asyncio
import math
import re
import ssl
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from saec.cloud import wire
from saec.cloud.transport import is_loopback
from saec.config import CloudSettings
from saec.errors import BadInput
from saec.evaluate.meter import MB
from saec.evaluate.metrics import percentiles
from saec.evaluate.table import Cell, Table
from saec.types import Query

CALM = 72
"""Questions at once that stand for a busy but ordinary plant; a burst is ten times as many."""

RECOVERY_S = 5.0

_NO_ANSWER = 0
_ALONE = 5
_AS_FAST = 2.0
_METRIC = re.compile(r"^(saec_cloud_requests_total\{status=\"(\d+)\"\}|process_resident_memory_bytes) (\S+)$", re.M)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: HTTP status (0: none came), seconds until it was there, seconds to wait if it asked for that, and
    P(defect) if it gave one."""

    status: int
    seconds: float
    retry_after_s: float | None = None
    p_defect: float | None = None


@dataclass(frozen=True, slots=True)
class Wave:
    """What came back of questions asked at once, in their order.

    ``recovery_s`` is the time from the last answer until a fresh question had been answered within twice the time of a
    question alone; ``None`` if that took more than 5 s. ``counted`` are the answers that the service itself counted
    meanwhile, by status. ``rss`` is the service's resident memory in bytes afterwards; ``None`` where it does not tell.
    """

    answers: Sequence[Answer]
    wall_s: float
    recovery_s: float | None
    counted: Mapping[str, int]
    rss: float | None


def run_burst(
    url: str, settings: CloudSettings, queries: Sequence[Query], *, waves: Sequence[int] = (CALM, 10 * CALM, 10 * CALM)
) -> list[Wave]:
    """Ask a few questions one by one, then the waves, each as many questions at once as stated, the queries in turn.

    The first wave returned holds the questions asked one by one. References of the queries are not sent.

    Raises:
        BadInput: nothing to ask, or the service does not answer a question alone.
    """
    if not queries or not waves or min(waves) < 1:
        raise BadInput("nothing to ask", fix="pass at least one image and waves of at least one question")
    return asyncio.run(_Burst(url, settings, queries).run(waves))


def bench_burst(
    url: str, settings: CloudSettings, queries: Sequence[Query], *, waves: Sequence[int] = (CALM, 10 * CALM, 10 * CALM)
) -> Table:
    """Return :func:`run_burst` as a table: what was answered, refused and failed, how fast, and the memory."""
    found = run_burst(url, settings, queries, waves=waves)
    notes = [
        "busy: refused with 429; failed: any other status, or no answer; recovery_s: from the last answer until a "
        f"fresh question was answered within {_AS_FAST:g} times the time of one alone, – if not within {RECOVERY_S:g} s"
    ]
    if any(wave.counted and sum(wave.counted.values()) != len(wave.answers) for wave in found):
        notes.append("the service counted other answers than came back: something was lost or answered twice")
    failures = Counter(each.status for wave in found for each in wave.answers if each.status not in (200, 429))
    if failures:
        told = (f"{number} with {status or 'no answer'}" for status, number in failures.items())
        notes.append(f"failed: {', '.join(told)}")
    names = ["one by one", *(f"{number} at once" for number in waves)]
    rows = [_row(name, wave) for name, wave in zip(names, found, strict=True)]
    return Table("Cloud service under a burst", tuple(rows[0]), rows, notes)


class _Burst:
    def __init__(self, url: str, settings: CloudSettings, queries: Sequence[Query]) -> None:
        self._url, self._timeout_s = url.rstrip("/"), settings.timeout_s
        self._headers = {} if settings.token is None else {"Authorization": f"Bearer {settings.token}"}
        # One for all: making it reads the system's certificates, which takes longer than a question.
        self._tls: ssl.SSLContext | bool = ssl.create_default_context() if self._url.startswith("https") else False
        self._proxied = not is_loopback(httpx.URL(url).host)
        side, quality = settings.max_side, settings.jpeg_quality
        self._bodies = [wire.encode_question(each, [], max_side=side, jpeg_quality=quality) for each in queries]
        self._alone_s = math.inf

    async def run(self, waves: Sequence[int]) -> list[Wave]:
        alone = await self._wave(_ALONE, together=False)
        if any(answer.status != 200 for answer in alone.answers):
            seen = ", ".join(str(answer.status or "no answer") for answer in alone.answers)
            raise BadInput(f"the service does not answer questions one by one ({seen})", where=self._url)
        self._alone_s = sorted(answer.seconds for answer in alone.answers)[_ALONE // 2]
        return [alone, *[await self._wave(number, together=True) for number in waves]]

    async def _wave(self, number: int, *, together: bool) -> Wave:
        bodies = [self._bodies[i % len(self._bodies)] for i in range(number)]
        before, _ = await self._told()
        begun = time.perf_counter()
        if together:
            answers = list(await asyncio.gather(*map(self._ask, bodies)))
        else:
            answers = [await self._ask(body) for body in bodies]
        wall_s = time.perf_counter() - begun
        after, rss = await self._told()
        counted = {status: after[status] - before[status] for status in after if after[status] > before[status]}
        recovery_s = await self._recovered() if together else None
        return Wave(answers, wall_s, recovery_s, counted, rss)

    async def _ask(self, body: bytes) -> Answer:
        headers = {
            **self._headers,
            "Content-Type": wire.CONTENT_TYPE,
            wire.DEADLINE_HEADER: f"{self._timeout_s * 1e3:.1f}",
        }
        begun = time.perf_counter()
        try:
            async with self._client() as client:  # its own pool: one pool of hundreds costs more than the service
                reply = await client.post("/v1/judge", content=body, headers=headers)
        except httpx.HTTPError:
            return Answer(_NO_ANSWER, time.perf_counter() - begun)
        seconds, told = time.perf_counter() - begun, reply.json()
        wait = reply.headers.get("retry-after")
        return Answer(reply.status_code, seconds, None if wait is None else float(wait), told.get("p_defect"))

    async def _recovered(self) -> float | None:
        begun = time.perf_counter()
        while (left := RECOVERY_S - (time.perf_counter() - begun)) > 0:
            answer = await self._ask(self._bodies[0])
            if answer.status == 200 and answer.seconds <= _AS_FAST * self._alone_s:
                return time.perf_counter() - begun
            await asyncio.sleep(min(0.05, left))
        return None

    async def _told(self) -> tuple[Counter[str], float | None]:
        """Return the service's count of answers by status and its resident bytes; nothing where it does not tell."""
        async with self._client() as client:
            try:
                text = (await client.get("/metrics", headers=self._headers)).text
            except httpx.HTTPError:
                return Counter(), None  # the questions themselves tell whether the service lives
        rows = _METRIC.findall(text)
        return (
            Counter({status: int(float(value)) for _, status, value in rows if status}),
            next((float(value) for _, status, value in rows if not status), None),
        )

    def _client(self) -> httpx.AsyncClient:
        # Half as long again as the service is given: whether it keeps its own deadline is part of what is asked.
        wait = httpx.Timeout(1.5 * self._timeout_s + 1.0)
        return httpx.AsyncClient(base_url=self._url, timeout=wait, verify=self._tls, trust_env=self._proxied)


def _row(name: str, wave: Wave) -> dict[str, Cell]:
    answered = [answer.seconds * 1e3 for answer in wave.answers if answer.status == 200]
    refused = [answer for answer in wave.answers if answer.status == 429]
    latency = percentiles(answered) or {}
    return {
        "questions": name,
        "answered": len(answered),
        "busy": len(refused),
        "failed": len(wave.answers) - len(answered) - len(refused),
        "per_s": len(answered) / wave.wall_s,
        "p50_ms": latency.get("p50"),
        "max_ms": max(answered, default=None),
        "retry_after_s": max((answer.retry_after_s or 0.0 for answer in refused), default=None),
        "recovery_s": wave.recovery_s,
        "rss_mb": None if wave.rss is None else wave.rss / MB,
    }
