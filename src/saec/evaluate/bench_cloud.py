"""How fast a running cloud service answers: throughput, latency and batch size over the number of questions at once.

What is measured is the whole way: JPEG coding, HTTP, queueing, the backend, and back. Batch sizes are the service's own
count, from its ``/metrics``.
"""

from __future__ import annotations

import itertools
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx

from saec.cloud.transport import is_loopback
from saec.errors import BadInput
from saec.evaluate.metrics import percentiles
from saec.evaluate.table import Cell, Table
from saec.types import CloudClient, CloudError, Query

CONCURRENCY = (1, 2, 4, 8, 16, 32)

_BATCHES = re.compile(r"^saec_cloud_batch_size_(bucket\{le=\"([^\"]+)\"\}|sum|count) (\S+)$", re.MULTILINE)

BatchCounts = Mapping[str, float]
"""Cumulated counts of batches by upper size limit (``"1"``, ``"2"``, … ``"+Inf"``), and ``sum`` and ``count``."""


@dataclass(slots=True)
class _Load:
    """What came back at one level of concurrency."""

    wall_s: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    uplink_bytes: int = 0
    failures: Counter[str] = field(default_factory=Counter)


def bench_cloud(
    client: CloudClient,
    queries: Sequence[Query],
    batches: Callable[[], BatchCounts],
    *,
    timeout_s: float,
    concurrency: Sequence[int] = CONCURRENCY,
    seconds: float = 5.0,
) -> tuple[Table, Table]:
    """Put questions to a service for ``seconds`` at each level of concurrency, taking the queries in turn.

    The first question, which carries the reference images up, is not counted.

    Returns:
        A table of throughput and latency, and one of the service's batch sizes.

    Raises:
        BadInput: nothing to ask, or the first question is not answered.
    """
    if not queries or not concurrency or min(concurrency) < 1 or seconds <= 0:
        raise BadInput("nothing to ask", fix="pass at least one image and one level of concurrency from 1 on")
    try:
        client.judge(queries[0], deadline_s=timeout_s)
    except CloudError as error:
        raise BadInput(f"the service does not answer ({error})", fix="check its log") from None
    rows: list[Mapping[str, Cell]] = []
    sizes: list[Mapping[str, Cell]] = []
    failures: Counter[str] = Counter()
    for together in concurrency:
        before = batches()
        load = _put(client, queries, together, seconds, timeout_s)
        counted = {name: value - before.get(name, 0.0) for name, value in batches().items()}
        rows.append(_row(together, load, counted))
        sizes.append({"concurrency": together, **_by_size(counted)})
        failures += load.failures
    notes = [f"{seconds:g} s a level, {len(queries)} images in turn; latency at the client, JPEG coding included"]
    if failures:
        notes.append("not answered: " + ", ".join(f"{n} {name}" for name, n in failures.items()))
    columns = tuple(dict.fromkeys(name for row in sizes for name in row))
    return (
        Table(f"Cloud service, {client.model_id}", tuple(rows[0]), rows, notes),
        Table("Batches by size", columns, sizes, ("how many batches had up to so many questions",)),
    )


def http_batches(url: str) -> Callable[[], BatchCounts]:
    """Return what reads a service's batch counts from its ``/metrics``; they are empty where it does not tell."""
    local = is_loopback(httpx.URL(url).host)

    def read() -> BatchCounts:
        try:
            text = httpx.get(f"{url.rstrip('/')}/metrics", trust_env=not local, timeout=5).text
        except httpx.HTTPError:
            return {}  # the table then has no batch sizes; the questions themselves tell whether the service lives
        return {limit or kind: float(value) for kind, limit, value in _BATCHES.findall(text)}

    return read


def _put(client: CloudClient, queries: Sequence[Query], together: int, seconds: float, timeout_s: float) -> _Load:
    load, lock, numbers = _Load(), threading.Lock(), itertools.count()
    begun = time.perf_counter()

    def ask(_: int) -> None:
        while (started := time.perf_counter()) - begun < seconds:
            try:
                opinion = client.judge(queries[next(numbers) % len(queries)], deadline_s=timeout_s)
            except CloudError as error:
                with lock:
                    load.failures[error.reason.value] += 1
                time.sleep(min(error.retry_after_s or 0.05, 0.5))  # who hammers a busy service measures the refusals
                continue
            with lock:
                load.latencies_ms.append((time.perf_counter() - started) * 1000)
                load.uplink_bytes += opinion.uplink_bytes

    with ThreadPoolExecutor(together) as pool:
        list(pool.map(ask, range(together)))
    load.wall_s = time.perf_counter() - begun
    return load


def _row(together: int, load: _Load, counted: BatchCounts) -> dict[str, Cell]:
    answered = len(load.latencies_ms)
    latency = percentiles(load.latencies_ms) or {}
    return {
        "concurrency": together,
        "answered": answered,
        "failed": load.failures.total(),
        "per_s": answered / load.wall_s,
        "p50_ms": latency.get("p50"),
        "p90_ms": latency.get("p90"),
        "p99_ms": latency.get("p99"),
        "mean_batch": counted["sum"] / counted["count"] if counted.get("count") else None,
        "kB_each": load.uplink_bytes / answered / 1000 if answered else None,
    }


def _by_size(counted: BatchCounts) -> dict[str, Cell]:
    """Turn cumulated bucket counts into one count for each bucket, named by its upper limit."""
    limits = sorted((float(name), name) for name in counted if name not in ("sum", "count"))
    found: dict[str, Cell] = {}
    below = 0.0
    for limit, name in limits:
        found["more" if math.isinf(limit) else f"<={limit:g}"] = int(counted[name] - below)
        below = counted[name]
    return found
