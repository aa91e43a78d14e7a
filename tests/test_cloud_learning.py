"""What the service answers to learning, without a network: status codes, limits, metrics, and who comes first."""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloud_fakes import FakeBackend, query
from learn_fakes import JOB, Runner, frames, settings
from saec.cloud import desk_endpoints, wire
from saec.cloud.desk import DeskFull
from saec.cloud.service import create_app
from saec.config import ServeSettings
from saec.fleet.frame import CONTENT_TYPE, Frame, encode_frame, frame_id
from saec.learn.desk import FolderDesk

FRAME = {"Content-Type": CONTENT_TYPE}
JSON = {"Content-Type": "application/json"}


@asynccontextmanager
async def service(
    desk: Any = None, backend: FakeBackend | None = None, **more: object
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(backend or FakeBackend(), ServeSettings(**{"max_wait_ms": 1.0, **more}), desk)  # type: ignore[arg-type]
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cloud") as client,
    ):
        while (await client.get("/healthz")).json()["status"] == "starting":
            await asyncio.sleep(0.005)
        yield client


@pytest.fixture
def desk(tmp_path) -> FolderDesk:
    return FolderDesk(tmp_path / "desk", Runner(tmp_path / "log"), settings())


async def put(client: httpx.AsyncClient, name: str, data: bytes, **more: Any) -> httpx.Response:
    return await client.put(f"/v1/learn/frames/{name}", content=data, headers=FRAME, **more)


async def ended(client: httpx.AsyncClient, job_id: str = JOB) -> dict[str, Any]:
    while (job := (await client.get(f"/v1/learn/jobs/{job_id}")).json())["status"] not in ("done", "failed"):
        await asyncio.sleep(0.005)
    return job


def refusal(response: httpx.Response) -> tuple[int, str]:
    assert response.json()["fix"], "every refusal says what to do"
    return response.status_code, response.json()["error"]


async def test_a_service_without_a_desk_says_so(tmp_path):
    async with service() as client:
        for method, path in (
            ("PUT", "frames/" + "0" * 64),
            ("POST", "missing"),
            ("PUT", f"jobs/{JOB}"),
            ("GET", f"jobs/{JOB}"),
            ("GET", "updates/" + "0" * 64),
        ):
            response = await client.request(method, f"/v1/learn/{path}", content=b"{}")
            assert refusal(response) == (404, "this service does not learn")


async def test_frames_go_up_once_and_a_job_brings_an_update_down(desk):
    some = frames(3)
    async with service(desk) as client:
        assert [(await put(client, *each)).status_code for each in some.items()] == [201] * 3
        assert [(await put(client, *each)).status_code for each in some.items()] == [200] * 3
        asked = {"frames": ["0" * 64, *some]}
        missing = await client.post("/v1/learn/missing", json=asked)
        assert missing.json() == {"frames": ["0" * 64]}
        for status in (201, 200):
            response = await client.put(f"/v1/learn/jobs/{JOB}", json={"frames": list(some)})
            assert response.status_code == status
        job = await ended(client)
        assert (job["status"], job["done"], job["result"]["numbers"]) == ("done", 3, [0, 1, 2])
        update = await client.get(f"/v1/learn/updates/{job['result']['update']}")
        assert frame_id(update.content) == job["result"]["update"]
        text = (await client.get("/metrics")).text
    for line in (
        'saec_cloud_frames_total{new="true"} 3.0',
        'saec_cloud_frames_total{new="false"} 3.0',
        f"saec_cloud_frame_bytes_total {float(sum(map(len, some.values())))}",
        "saec_cloud_update_bytes_total 100000.0",
        'saec_cloud_jobs{status="done"} 1.0',
        'saec_cloud_jobs{status="failed"} 0.0',
    ):
        assert line in text


async def test_all_of_it_needs_the_token(desk):
    async with service(desk, token="secret") as client:
        for method, path in (
            ("PUT", "frames/x"),
            ("POST", "missing"),
            ("PUT", "jobs/x"),
            ("GET", "jobs/x"),
            ("GET", "updates/x"),
        ):
            for headers in ({}, {"Authorization": "Bearer guess"}):
                response = await client.request(method, f"/v1/learn/{path}", headers=headers)
                assert refusal(response) == (401, "the token is missing or wrong")
        shown = {"Authorization": "Bearer secret"}
        assert (await client.post("/v1/learn/missing", json={"frames": []}, headers=shown)).status_code == 200


async def test_a_frame_that_cannot_be_used_is_refused_and_not_stored(desk):
    ((name, data),) = frames(1).items()
    other = encode_frame(Frame("update"))
    async with service(desk, max_body_bytes=10_000) as client:
        assert refusal(await put(client, name, data[:-1] + b"x"))[0] == 422
        assert refusal(await put(client, "f" * 64, data))[0] == 422
        assert refusal(await put(client, frame_id(b"?"), b"?")) == (422, "not a frame")
        assert refusal(await put(client, frame_id(other), other)) == (422, "a frame of kind 'update', not sample")
        assert refusal(await put(client, name, bytes(10_001))) == (413, "the body exceeds 10000 bytes")
        for headers in ({}, JSON):
            response = await client.put(f"/v1/learn/frames/{name}", content=data, headers=headers)
            assert refusal(response)[0] == 415
        asked = {"frames": [name, "f" * 64, frame_id(b"?"), frame_id(other)]}
        assert (await client.post("/v1/learn/missing", json=asked)).json() == asked


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


async def test_a_malicious_file_is_refused_by_every_endpoint_and_never_run(desk, tmp_path):
    poison = pickle.dumps(Malicious(tmp_path / "was here"))
    async with service(desk) as client:
        assert refusal(await put(client, frame_id(poison), poison)) == (422, "not a frame")
        for method, path in (("POST", "missing"), ("PUT", f"jobs/{JOB}")):
            response = await client.request(method, f"/v1/learn/{path}", content=poison, headers=JSON)
            assert refusal(response)[0] == 422
        assert (await client.post("/v1/learn/missing", json={"frames": [frame_id(poison)]})).json()["frames"]
    assert not (tmp_path / "was here").exists()
    pickle.loads(poison)
    assert (tmp_path / "was here").exists(), "the file would have done harm"


async def test_a_request_that_is_no_job_is_refused(desk):
    async with service(desk) as client:

        async def start(body: object, job_id: str = JOB, headers: Mapping[str, str] = JSON) -> tuple[int, str]:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return refusal(await client.put(f"/v1/learn/jobs/{job_id}", content=content, headers=headers))

        assert (await start({}, "no-hex"))[0] == 422
        assert (await start({}, "abc"))[0] == 422
        assert (await start([]))[0] == 422
        assert (await start(b"[" * 100_000))[0] == 422
        assert (await start(b'{"p": NaN}'))[0] == 422
        assert (await start({"frames": "all"}))[0] == 422
        assert (await start({"frames": ["../x"]}))[0] == 422
        assert (await start({}, headers=FRAME))[0] == 415
        assert (await start(b" " * 1_000_001))[0] == 413
        assert await start({"frames": ["0" * 64]}) == (409, "1 of the job's frames are not here")
        assert refusal(await client.get(f"/v1/learn/jobs/{JOB}")) == (404, "no such job")
        assert (await client.post("/v1/learn/missing", json={"frames": ["x"]})).status_code == 422


async def test_another_request_under_a_jobs_id_is_refused(desk):
    async with service(desk) as client:
        await client.put(f"/v1/learn/jobs/{JOB}", json={"frames": [], "seed": 1})
        response = await client.put(f"/v1/learn/jobs/{JOB}", json={"frames": [], "seed": 2})
        assert refusal(response) == (409, f"job {JOB} was begun with another request")


async def test_a_full_desk_is_507(desk, monkeypatch):
    def full(name: str, data: bytes) -> bool:
        raise DeskFull("the desk is full")

    monkeypatch.setattr(desk, "put", full)
    ((name, data),) = frames(1).items()
    async with service(desk) as client:
        assert refusal(await put(client, name, data)) == (507, "the desk is full")


async def test_an_update_can_be_had_in_pieces(desk):
    async with service(desk) as client:
        await client.put(f"/v1/learn/jobs/{JOB}", json={"frames": []})
        name = (await ended(client))["result"]["update"]
        path = f"/v1/learn/updates/{name}"
        whole = await client.get(path)
        assert (whole.status_code, whole.headers["etag"], whole.headers["accept-ranges"]) == (200, f'"{name}"', "bytes")
        for asked, start, stop in (
            ("bytes=0-", 0, 100_000),
            ("bytes=99999-", 99_999, 100_000),
            ("bytes=10-19", 10, 20),
            ("bytes=99990-200000", 99_990, 100_000),
        ):
            piece = await client.get(path, headers={"Range": asked})
            assert piece.status_code == 206
            assert piece.content == whole.content[start:stop]
            assert piece.headers["content-range"] == f"bytes {start}-{stop - 1}/100000"
        for asked in ("bytes=100000-", "bytes=20-10", f"bytes={10**17}-"):
            assert refusal(await client.get(path, headers={"Range": asked}))[0] == 416
        for asked in ("bytes=-5", "bytes=0-1,3-4", "lines=1-", "bytes=x-"):  # which a server may pass over
            assert (await client.get(path, headers={"Range": asked})).content == whole.content
        assert refusal(await client.get("/v1/learn/updates/" + "0" * 64)) == (404, "no such update")


async def test_learning_asks_one_question_at_a_time_and_only_while_no_live_one_waits(tmp_path):
    class Watched(FakeBackend):
        def judge(self, queries):
            seen.append([each.part_id for each in queries])
            return super().judge(queries)

    seen: list[list[str]] = []
    desk = FolderDesk(tmp_path / "desk", Runner(tmp_path / "log"), settings())
    async with service(desk, Watched(0.02), max_batch=1, max_wait_ms=0) as client:
        some = frames(30)
        for each in some.items():
            await put(client, *each)
        await client.put(f"/v1/learn/jobs/{JOB}", json={"frames": list(some)})
        while not seen:
            await asyncio.sleep(0.001)
        question = wire.encode_question(query("live"), [], max_side=64, jpeg_quality=90)
        headers = {"Content-Type": wire.CONTENT_TYPE}
        answers = await asyncio.gather(*(client.post("/v1/judge", content=question, headers=headers) for _ in range(8)))
        assert [answer.status_code for answer in answers] == [200] * 8
        asked = list(itertools.chain(*seen))
        first = asked.index("live")
        last = len(asked) - 1 - asked[::-1].index("live")
        assert asked[first : last + 1].count("live") == 8
        assert last - first + 1 - 8 <= 1, "a live question waits for one of learning at most"
        assert (await ended(client))["status"] == "done"
        assert all(len(batch) == 1 for batch in seen)


async def test_learning_asks_nothing_between_two_live_questions_that_follow_each_other(tmp_path):
    class Watched(FakeBackend):
        def judge(self, queries):
            seen.append(queries[0].part_id)
            return super().judge(queries)

    seen: list[str] = []
    asks = threading.Event()

    def run(request: Any, frame_of: Any, judge: Any, progress: Any) -> dict[str, Any]:
        asks.wait()
        judge([query("learning")])
        return {}

    async with service(FolderDesk(tmp_path / "desk", run, settings()), Watched(0.2), max_batch=1) as client:
        await client.put(f"/v1/learn/jobs/{JOB}", json={})
        question = wire.encode_question(query("live"), [], max_side=64, jpeg_quality=90)

        async def live() -> int:
            headers = {"Content-Type": wire.CONTENT_TYPE}
            return (await client.post("/v1/judge", content=question, headers=headers)).status_code

        first = asyncio.create_task(live())
        while not seen:
            await asyncio.sleep(0.001)
        asks.set()  # the queue is empty now, but the model is at work
        await asyncio.sleep(0.05)
        assert await asyncio.gather(first, live()) == [200, 200]
        assert (await ended(client))["status"] == "done"
        assert seen == ["live", "live", "learning"]


async def test_a_service_that_is_always_busy_gets_to_learning_too_one_question_after_each_wait(tmp_path, monkeypatch):
    class Watched(FakeBackend):
        def judge(self, queries):
            seen.append(queries[0].part_id)
            return super().judge(queries)

    monkeypatch.setattr(desk_endpoints, "PATIENCE_S", 0.3)
    seen: list[str] = []
    done = asyncio.Event()

    def run(request: Any, frame_of: Any, judge: Any, progress: Any) -> dict[str, Any]:
        judge([query("learning"), query("learning")])
        return {}

    async with service(FolderDesk(tmp_path / "desk", run, settings()), Watched(0.02), max_batch=1) as client:
        question = wire.encode_question(query("live"), [], max_side=64, jpeg_quality=90)

        async def line() -> None:
            while not done.is_set():
                answer = await client.post("/v1/judge", content=question, headers={"Content-Type": wire.CONTENT_TYPE})
                assert answer.status_code == 200

        lines = [asyncio.create_task(line()) for _ in range(3)]  # never a moment without a question
        while not seen:
            await asyncio.sleep(0.001)
        await client.put(f"/v1/learn/jobs/{JOB}", json={})
        async with asyncio.timeout(20):
            assert (await ended(client))["status"] == "done"
        done.set()
        await asyncio.gather(*lines)
        first, second = (number for number, part in enumerate(seen) if part == "learning")
        assert first >= 5, "live questions come first"
        assert second - first >= 5, "and again before the next one"


@asynccontextmanager
async def stalled(client: httpx.AsyncClient, count: int, announced: int) -> AsyncIterator[None]:
    """Uploads of which a few bytes have come, and the rest does not."""
    begun, never = asyncio.Semaphore(0), asyncio.Event()

    async def piece() -> AsyncIterator[bytes]:
        yield b"abc"
        begun.release()
        await never.wait()

    headers = {**FRAME, "Content-Length": str(announced)}
    paths = [f"/v1/learn/frames/{number:064x}" for number in range(count)]
    puts = [asyncio.create_task(client.put(path, content=piece(), headers=headers)) for path in paths]
    try:
        for _ in puts:
            await begun.acquire()
        yield
    finally:
        for each in puts:
            each.cancel()
        await asyncio.gather(*puts, return_exceptions=True)


async def test_uploads_that_stall_stop_nobody_else(desk):
    some = frames(2)
    async with service(desk) as client, asyncio.timeout(20), stalled(client, 20, 1000):
        for each in some.items():
            assert (await put(client, *each)).status_code == 201
        assert (await client.post("/v1/learn/missing", json={"frames": []})).status_code == 200
        assert (await client.put(f"/v1/learn/jobs/{JOB}", json={"frames": list(some)})).status_code == 201
        update = (await ended(client))["result"]["update"]
        assert (await client.get(f"/v1/learn/updates/{update}")).status_code == 200


async def test_bytes_on_their_way_are_bounded_and_job_reads_need_none(desk):
    ((name, data),) = frames(1).items()
    async with service(desk, max_body_bytes=1_000_000) as client:
        async with asyncio.timeout(20), stalled(client, 8, 1_000_000):
            answer = await put(client, name, data)
            assert refusal(answer) == (429, "too many bytes of learning are on their way")
            assert answer.json()["retry_after_s"] > 0
            assert refusal(await client.get(f"/v1/learn/jobs/{JOB}")) == (404, "no such job")
        assert (await put(client, name, data)).status_code == 201, "what was cut off holds nothing"


async def test_a_backend_that_fails_under_a_job_fails_that_question_only(tmp_path):
    def run(request: Any, frame_of: Any, judge: Any, progress: Any) -> dict[str, Any]:
        answers = judge([query("p1"), query("crash"), query("bad"), query("p2")])
        return {"kinds": [type(answer).__name__ for answer in answers]}

    async with service(FolderDesk(tmp_path / "desk", run, settings())) as client:
        await client.put(f"/v1/learn/jobs/{JOB}", json={})
        assert (await ended(client))["result"]["kinds"] == ["Opinion", "RuntimeError", "ValueError", "Opinion"]
