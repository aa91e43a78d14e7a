"""What the cloud service tells Prometheus. One registry per app, so that two apps in a process do not mix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from saec.cloud.desk import JobStatus

_STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 64)


class Metrics:
    """Counters and histograms of one service."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, queue_depth: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "saec_cloud_requests", "Questions by HTTP status.", ["status"], registry=self._registry
        )
        self._batches = Histogram(
            "saec_cloud_batch_size", "Questions in a batch.", buckets=_BATCH_BUCKETS, registry=self._registry
        )
        self._stages = Histogram(
            "saec_cloud_stage_seconds",
            "Time of one question in each stage.",
            ["stage"],
            buckets=_STAGE_BUCKETS,
            registry=self._registry,
        )
        self._bytes = Counter("saec_cloud_received_bytes", "Bytes of request bodies.", registry=self._registry)
        self._frames = Counter(
            "saec_cloud_frames", "Frames of learning, new ones and those sent again.", ["new"], registry=self._registry
        )
        self._frame_bytes = Counter("saec_cloud_frame_bytes", "Bytes of new frames.", registry=self._registry)
        self._update_bytes = Counter("saec_cloud_update_bytes", "Bytes of updates sent.", registry=self._registry)
        depth = Gauge("saec_cloud_queue_depth", "Admitted questions not yet in a batch.", registry=self._registry)
        depth.set_function(queue_depth)
        ProcessCollector(registry=self._registry)  # memory, processor time, open files; only Linux tells them

    def answered(self, status: int) -> None:
        """Count one finished question."""
        self._requests.labels(str(status)).inc()

    def batch(self, size: int) -> None:
        """Count one batch."""
        self._batches.observe(size)

    def stages(self, seconds: Mapping[str, float]) -> None:
        """Record how long one question spent in each stage."""
        for stage, value in seconds.items():
            self._stages.labels(stage).observe(value)

    def received(self, size: int) -> None:
        """Count bytes of a request body."""
        self._bytes.inc(size)

    def frame(self, size: int, fresh: bool) -> None:
        """Count one frame of learning that was taken."""
        self._frames.labels(str(fresh).lower()).inc()
        self._frame_bytes.inc(size if fresh else 0)

    def update(self, size: int) -> None:
        """Count bytes of an update that goes down."""
        self._update_bytes.inc(size)

    def watch(self, jobs: Callable[[], Mapping[JobStatus, int]]) -> None:
        """Tell the number of jobs in each state."""
        gauge = Gauge("saec_cloud_jobs", "Jobs of learning by state.", ["status"], registry=self._registry)
        for status in JobStatus:
            gauge.labels(status.value).set_function(partial(_count, jobs, status))

    def render(self) -> bytes:
        """Return the text exposition."""
        return generate_latest(self._registry)


def _count(jobs: Callable[[], Mapping[JobStatus, int]], status: JobStatus) -> float:
    return jobs().get(status, 0)
