"""The service's answers, without a network: status codes, reasons, limits, metrics."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from cloud_fakes import FakeBackend, query
from saec.cloud import wire
from saec.cloud.images import encode_jpeg
from saec.cloud.service import create_app, serve
from saec.config import ServeSettings
from saec.errors import BadInput
from saec.types import Box, CloudError, Evidence, Opinion, Query, Reason

TYPE = {"Content-Type": wire.CONTENT_TYPE}


def body_of(part_id: str = "p1", *references: str, size: int = 64) -> bytes:
    return wire.encode_question(query(part_id, size), references, max_side=1024, jpeg_quality=92)


@asynccontextmanager
async def service(backend: FakeBackend | None = None, **settings: object) -> AsyncIterator[httpx.AsyncClient]:
    made = create_app(backend or FakeBackend(), ServeSettings(**{"max_wait_ms": 1.0, **settings}))  # type: ignore[arg-type]
    async with (
        made.router.lifespan_context(made),
        httpx.AsyncClient(transport=httpx.ASGITransport(made), base_url="http://cloud") as client,
    ):
        while (await client.get("/healthz")).json()["status"] == "starting":
            await asyncio.sleep(0.005)
        yield client


async def post(client: httpx.AsyncClient, body: bytes, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post("/v1/judge", content=body, headers={**TYPE, **names})


def refusal(response: httpx.Response) -> tuple[int, str]:
    problem = response.json()
    assert problem["fix"], "every refusal says what to do"
    return response.status_code, problem["error"]


async def test_a_question_gets_an_opinion_with_the_times_of_its_stages() -> None:
    async with service() as client:
        response = await post(client, body_of())
        assert response.status_code == 200
        opinion = wire.decode_opinion(response.content, (64, 64))
        assert opinion.p_defect == 0.25
        assert opinion.model_id == "fake-1"
        assert set(opinion.timing_ms) == {"forward", "receive", "decode", "queue", "backend"}


async def test_an_adapter_is_swapped_by_who_has_the_token_and_the_answer_names_the_model() -> None:
    class Swaps(FakeBackend):
        def swap_adapter(self, folder: Path | None) -> None:
            if folder == Path("wrong"):
                raise BadInput("no adapter here", where=folder)
            self.model_id = f"fake-1+{folder}"

    token = {"Authorization": "Bearer s3cret"}
    async with service(Swaps(), token="s3cret") as client:
        for body, status, model in (
            ('{"adapter": "a"}', 200, "fake-1+a"),
            ('{"adapter": "wrong"}', 422, "fake-1+a"),
            ('{"adapter": 7}', 422, "fake-1+a"),
            ("{}", 422, "fake-1+a"),
            ('{"adapter": null}', 200, "fake-1+None"),
        ):
            response = await client.put("/v1/adapter", content=body, headers=token)
            assert response.status_code == status
            if status == 200:
                assert response.json()["model_id"] == model
            assert (await client.get("/v1/model", headers=token)).json()["model_id"] == model
        assert (await client.put("/v1/adapter", content='{"adapter": null}')).status_code == 401
    for backend, settings in ((Swaps(), {}), (FakeBackend(), {"token": "s3cret"})):
        async with service(backend, **settings) as client:
            response = await client.put("/v1/adapter", content='{"adapter": null}', headers=token)
            assert refusal(response) == (403, "adapters are not swapped here")


async def test_a_backend_that_prepares_gets_its_questions_before_their_batch() -> None:
    class Early(FakeBackend):
        def prepare(self, query: Query) -> Query:
            return replace(query, edge_p_defect=0.75)

    async with service(Early()) as client:
        assert wire.decode_opinion((await post(client, body_of())).content, (64, 64)).p_defect == 0.75


async def test_health_names_the_model_and_the_queue() -> None:
    async with service() as client:
        health = wire.Health.model_validate_json((await client.get("/healthz")).content)
        assert (health.status, health.model_id, health.queue_depth, health.wire) == ("ready", "fake-1", 0, 1)


async def test_the_service_is_ready_only_after_the_backends_warm_up() -> None:
    loaded = threading.Event()

    class Slow(FakeBackend):
        model_id = "unknown"

        def warm_up(self) -> None:
            assert loaded.wait(5)
            self.model_id = "loaded"

    app = create_app(Slow(), ServeSettings())
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cloud") as client,
    ):
        health = await client.get("/healthz")
        assert (health.status_code, health.json()["status"]) == (503, "starting")
        refused = await post(client, body_of())
        assert refusal(refused) == (503, "the service is starting")
        assert refused.headers["retry-after"] == "1"
        loaded.set()
        while (await client.get("/healthz")).status_code != 200:
            await asyncio.sleep(0.005)
        assert wire.decode_opinion((await post(client, body_of())).content, (64, 64)).p_defect == 0.25
        assert (await client.get("/v1/model")).json()["model_id"] == "loaded"


async def test_a_wrong_or_missing_token_is_refused_and_health_needs_none() -> None:
    async with service(token="secret") as client:
        for shown in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}, {"Authorization": "Bearer "}):
            response = await client.post("/v1/judge", content=body_of(), headers={**TYPE, **shown})
            assert refusal(response) == (401, "the token is missing or wrong")
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/healthz")).status_code == 200
        assert (await post(client, body_of(), Authorization="Bearer secret")).status_code == 200


async def test_a_body_that_is_too_large_is_refused_announced_or_not() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 100

    backend = FakeBackend()
    async with service(backend, max_body_bytes=1000) as client:
        assert refusal(await post(client, b"x" * 1001)) == (413, "the body exceeds 1000 bytes")
        assert refusal(await client.post("/v1/judge", content=pieces(), headers=TYPE))[0] == 413
        assert refusal(await client.put(f"/v1/references/{'0' * 64}", content=b"x" * 1001))[0] == 413
    assert backend.seen == []


async def test_what_is_not_a_question_is_refused() -> None:
    async with service(max_pixels=64 * 64) as client:
        plain = await client.post("/v1/judge", content=body_of(), headers={"Content-Type": "image/jpeg"})
        assert refusal(plain)[0] == 415
        assert refusal(await post(client, b"hello, world"))[0] == 422
        damaged = wire.encode_question(query(), (), max_side=1024, jpeg_quality=92)[:-200]
        assert refusal(await post(client, damaged)) == (422, "the body ends inside the image")
        assert refusal(await post(client, body_of(size=65)))[0] == 422
        assert refusal(await post(client, body_of(), **{wire.DEADLINE_HEADER: "soon"}))[0] == 422
        assert refusal(await client.get("/v2/judge"))[0] == 404
        assert refusal(await client.get("/v1/judge"))[0] == 405


async def test_a_corrupt_jpeg_in_a_sound_frame_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = encode_jpeg(query().image, 92)
    backend = FakeBackend()
    async with service(backend) as client:
        for jpeg in (sound[: len(sound) // 2], b"\xff\xd8\xff\xe0" + sound[40:], b"GIF89a", b"\0" * 50):
            monkeypatch.setattr(wire, "encode_jpeg", lambda image, quality, jpeg=jpeg: jpeg)
            status, error = refusal(await post(client, body_of()))
            assert status == 422
            assert error.startswith("the image ")
    assert backend.seen == []


async def test_an_expired_deadline_is_504_or_429_where_the_queue_took_it_and_the_backend_never_saw_it() -> None:
    backend = FakeBackend(seconds=0.3)
    async with service(backend, max_batch=1) as client:
        assert (await post(client, body_of("late"), **{wire.DEADLINE_HEADER: "0"})).status_code == 504
        assert (await post(client, body_of("late"), **{wire.DEADLINE_HEADER: "-5"})).status_code == 504
        busy = asyncio.create_task(post(client, body_of("busy")))
        await asyncio.sleep(0.05)
        waited = await post(client, body_of("late"), **{wire.DEADLINE_HEADER: "60"})
        assert refusal(waited) == (429, "the queue is too long for the deadline, come back in 1.00 s"), (
            "load is no fault"
        )
        assert (await busy).status_code == 200
        slow = await post(client, body_of("slow"), **{wire.DEADLINE_HEADER: "60"})
        assert refusal(slow) == (504, "the deadline passed before there was an answer")
        assert (await post(client, body_of("next"))).status_code == 200
    assert [each.part_id for each in backend.seen] == ["busy", "slow", "next"]


async def test_a_full_queue_is_429_with_retry_after() -> None:
    async with service(FakeBackend(seconds=0.4), max_batch=1, max_queue=1) as client:
        asked = []
        for _ in range(2):  # one is being judged, one waits
            asked.append(asyncio.create_task(post(client, body_of())))
            await asyncio.sleep(0.05)
        refused = await post(client, body_of())
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["retry_after_s"] > 0
        assert [each.status_code for each in await asyncio.gather(*asked)] == [200, 200]
        assert (await post(client, body_of())).status_code == 200


async def test_one_bad_question_fails_alone_and_a_crash_fails_only_its_batch() -> None:
    backend = FakeBackend()
    async with service(backend, max_batch=3, max_wait_ms=50.0) as client:
        answers = await asyncio.gather(*(post(client, body_of(name)) for name in ("p1", "bad", "p2")))
        assert [each.status_code for each in answers] == [200, 500, 200]
        assert refusal(answers[1])[1] == "the question failed (ValueError: no such product)"
        crashed = await asyncio.gather(*(post(client, body_of(name)) for name in ("p1", "crash")))
        assert {each.status_code for each in crashed} == {503}
        assert "out of memory" in refusal(crashed[0])[1]
        assert (await post(client, body_of())).status_code == 200
    assert backend.batches == [3, 2, 1]


async def test_an_opinion_that_is_no_probability_never_leaves_the_service() -> None:
    async with service() as client:
        status, error = refusal(await post(client, body_of("nan")))
    assert status == 502
    assert "p_defect" in error


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.CLOUD_TIMEOUT, 504),
        (Reason.CLOUD_REFUSED, 429),
        (Reason.CLOUD_UNREACHABLE, 503),
        (Reason.CLOUD_BAD_ANSWER, 502),
    ],
)
async def test_a_failure_of_the_backends_own_server_keeps_its_meaning(reason: Reason, status: int) -> None:
    class Upstream(FakeBackend):
        def _one(self, query: Query) -> Opinion | Exception:
            return CloudError(reason, "upstream", retry_after_s=2.5)

    async with service(Upstream()) as client:
        response = await post(client, body_of())
    assert refusal(response) == (status, "upstream")
    assert response.json()["retry_after_s"] == 2.5


async def test_a_client_that_leaves_takes_its_question_along() -> None:
    backend = FakeBackend(seconds=0.4)
    async with service(backend, max_batch=1) as client:
        busy = asyncio.create_task(post(client, body_of("busy")))
        await asyncio.sleep(0.05)
        body = body_of("gone")
        messages = iter([{"type": "http.request", "body": body}, {"type": "http.disconnect"}])
        sent: list[dict[str, object]] = []

        async def receive() -> dict[str, object]:
            return next(messages)

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/judge",
            "query_string": b"",
            "headers": [(b"content-type", wire.CONTENT_TYPE.encode())],
        }
        await client._transport.app(scope, receive, send)  # type: ignore[attr-defined]
        assert sent[0]["status"] == 499
        assert (await busy).status_code == 200
        assert (await post(client, body_of("next"))).status_code == 200
    assert [each.part_id for each in backend.seen] == ["busy", "next"]


async def test_references_are_uploaded_once_and_handed_to_the_backend() -> None:
    jpeg = encode_jpeg(np.full((8, 8, 3), 7, np.uint8), 92)
    name = hashlib.sha256(jpeg).hexdigest()
    backend = FakeBackend()
    async with service(backend) as client:
        unknown = await post(client, body_of("p1", name))
        assert refusal(unknown) == (409, "unknown reference images")
        assert unknown.json()["missing"] == [name]
        assert (await client.put(f"/v1/references/{name}", content=jpeg)).status_code == 204
        for part_id in ("p1", "p2"):
            assert (await post(client, body_of(part_id, name))).status_code == 200
        wrong = await client.put(f"/v1/references/{'0' * 64}", content=jpeg)
        assert refusal(wrong) == (422, "the image does not have this hash")
    assert backend.seen[0].references[0] is backend.seen[1].references[0]
    assert backend.seen[0].references[0].shape == (8, 8, 3)


async def test_the_reference_cache_is_bounded_and_drops_the_least_recently_used() -> None:
    jpegs = [encode_jpeg(np.full((8, 8, 3), value, np.uint8), 92) for value in (10, 20, 30)]
    names = [hashlib.sha256(jpeg).hexdigest() for jpeg in jpegs]
    async with service(reference_cache_bytes=2 * 8 * 8 * 3) as client:
        for name, jpeg in zip(names[:2], jpegs[:2], strict=True):
            await client.put(f"/v1/references/{name}", content=jpeg)
        assert (await post(client, body_of("p", names[0]))).status_code == 200
        await client.put(f"/v1/references/{names[2]}", content=jpegs[2])
        assert (await post(client, body_of("p", *names))).json()["missing"] == [names[1]]


async def test_metrics_count_requests_batches_bytes_and_stages() -> None:
    body = body_of()
    async with service() as client:
        await post(client, body)
        await post(client, b"junk")
        text = (await client.get("/metrics")).text
    assert 'saec_cloud_requests_total{status="200"} 1.0' in text
    assert 'saec_cloud_requests_total{status="422"} 1.0' in text
    assert "saec_cloud_batch_size_count 1.0" in text
    assert f"saec_cloud_received_bytes_total {float(len(body) + 4)}" in text
    assert 'saec_cloud_stage_seconds_count{stage="decode"} 1.0' in text


async def test_a_product_that_the_model_does_not_know_is_the_questions_fault() -> None:
    async with service(FakeBackend()) as client:
        answer = await post(client, body_of("stranger"))
        assert answer.status_code == 422
        assert refusal(answer)[1] == "the expert does not know this product: cell"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "cloud.example"])
def test_a_reachable_address_without_a_token_is_refused(host: str) -> None:
    with pytest.raises(BadInput, match=r"without a token only loopback addresses are served.*--token-file"):
        serve(FakeBackend(), ServeSettings(host=host, port=0))


def test_a_backend_that_does_not_start_ends_the_service_with_one_line() -> None:
    class Broken(FakeBackend):
        def warm_up(self) -> None:
            raise RuntimeError("no weights")

    with pytest.raises(BadInput, match=r"the backend does not start \(RuntimeError: no weights\): fake-1"):
        serve(Broken(), ServeSettings(port=0))


async def test_boxes_outside_the_original_are_a_bad_answer() -> None:
    class Outside(FakeBackend):
        def _one(self, query: Query) -> Opinion | Exception:
            return Opinion(0.9, Evidence((Box(0, 0, 65, 64),)), "m")

    async with service(Outside()) as client:
        status, error = refusal(await post(client, body_of()))
    assert status == 502
    assert "not inside an image of 64 x 64" in error
