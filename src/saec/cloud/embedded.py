"""A backend in the edge's own process, behind the same protocol as a cloud service."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from saec.cloud import wire
from saec.cloud.backend import close, prepared, warm_up
from saec.types import Backend, CloudError, Opinion, Query, Reason


@dataclass(eq=False, slots=True)
class _Waiting:
    query: Query
    deadline: float
    arrived: float
    answer: Future[Opinion] = field(default_factory=Future)


class EmbeddedClient:
    """Asks a backend directly: no service, no JPEG, no uplink (``uplink_bytes`` is 0).

    Thread-safe. The backend is warmed up first, runs in one thread of its own, and is closed with the client; what has
    gathered while it worked goes to it as one batch.
    """

    def __init__(self, backend: Backend, *, max_batch: int = 8) -> None:
        self._backend = backend
        self._max_batch = max_batch
        self._waiting: deque[_Waiting] = deque()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saec-embedded-backend")
        try:
            self._thread.submit(warm_up, backend).result()
        except BaseException:
            self.close()
            raise
        self.model_id = backend.model_id

    def judge(self, query: Query, *, deadline_s: float) -> Opinion:
        """Return the backend's opinion within ``deadline_s`` seconds.

        Raises:
            CloudError: CLOUD_TIMEOUT, or CLOUD_BAD_ANSWER when the backend fails or breaks the contract; what a
                backend itself raises as :class:`CloudError` is passed on.
        """
        now = time.monotonic()
        try:
            entry = _Waiting(prepared(self._backend, query), now + deadline_s, now)
            with self._lock:
                self._waiting.append(entry)
            self._thread.submit(self._run_batch)
        except RuntimeError:
            raise CloudError(Reason.CLOUD_UNREACHABLE, "the embedded backend was closed") from None
        try:
            return entry.answer.result(timeout=deadline_s)
        except wire.BadAnswer as error:
            raise CloudError(Reason.CLOUD_BAD_ANSWER, f"the answer cannot be used ({error})") from None
        except CloudError:
            raise
        except TimeoutError:
            entry.answer.cancel()
            raise CloudError(Reason.CLOUD_TIMEOUT, f"no answer within {deadline_s:.2f} s") from None
        except Exception as error:  # whatever a model throws, the edge's verdict stands
            what = f"the backend failed ({type(error).__name__}: {error})"
            raise CloudError(Reason.CLOUD_BAD_ANSWER, what) from error

    def close(self) -> None:
        """Stop the backend's thread once the batch at hand is done, and close the backend."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        close(self._backend)

    def _run_batch(self) -> None:
        """Judge all that waits, up to ``max_batch``; one such call is submitted per question, so none is left over."""
        begun = time.monotonic()
        batch: list[_Waiting] = []
        with self._lock:
            while self._waiting and len(batch) < self._max_batch:
                entry = self._waiting.popleft()
                if entry.deadline > begun and entry.answer.set_running_or_notify_cancel():
                    batch.append(entry)
        if not batch:
            return
        try:
            answers = self._backend.judge([entry.query for entry in batch])
            if len(answers) != len(batch):
                raise wire.BadAnswer(f"{len(answers)} answers to {len(batch)} questions")
        except Exception as error:  # noqa: BLE001 - handed to every caller of this batch
            for entry in batch:
                entry.answer.set_exception(error)
            return
        spent = time.monotonic() - begun
        for entry, answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                entry.answer.set_exception(answer)
                continue
            try:
                opinion = wire.check_opinion(answer, entry.query.original_size)
            except wire.BadAnswer as error:
                entry.answer.set_exception(error)
                continue
            stages = {"queue": (begun - entry.arrived) * 1e3, "backend": spent * 1e3}
            entry.answer.set_result(replace(opinion, timing_ms={**opinion.timing_ms, **stages}))
