"""The client: what each failure means for the edge, what it counts, and the backend in the same process."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from cloud_fakes import FakeBackend, query
from saec.cloud import wire
from saec.cloud.client import HttpCloudClient, probe
from saec.cloud.embedded import EmbeddedClient
from saec.config import CloudSettings
from saec.errors import BadInput
from saec.types import Box, CloudClient, CloudError, Evidence, Opinion, Query, Reason

URL = "http://127.0.0.1:9"
ANSWER = wire.encode_opinion(Opinion(0.75, Evidence(), "m-1", {"forward": 3.0}), (64, 64))
Handler = Callable[[httpx.Request], httpx.Response]


def client_of(handler: Handler, **settings: object) -> HttpCloudClient:
    return HttpCloudClient(URL, CloudSettings(**settings), transport=httpx.MockTransport(handler))  # type: ignore[arg-type]


def failure(client: CloudClient, asked: Query | None = None, deadline_s: float = 5.0) -> CloudError:
    with pytest.raises(CloudError) as caught:
        client.judge(asked or query(), deadline_s=deadline_s)
    return caught.value


def test_an_opinion_carries_exactly_the_bytes_that_went_up() -> None:
    bodies: list[bytes] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(request.read())
        assert request.headers["content-length"] == str(len(bodies[-1]))
        assert request.headers["authorization"] == "Bearer secret"
        assert 0 < float(request.headers[wire.DEADLINE_HEADER]) <= 5000
        return httpx.Response(200, content=ANSWER)

    client = client_of(handler, token="secret")
    opinion = client.judge(query(), deadline_s=5)
    assert (opinion.p_defect, opinion.model_id, client.model_id) == (0.75, "m-1", "m-1")
    assert opinion.uplink_bytes == client.uplink_bytes == len(bodies[0])
    assert set(opinion.timing_ms) == {"forward", "encode"}
    client.judge(query(size=32), deadline_s=5)
    assert client.uplink_bytes == sum(map(len, bodies))


@pytest.mark.parametrize(
    ("response", "reason", "wait"),
    [
        (httpx.Response(429, json={"error": "full", "retry_after_s": 0.125}), Reason.CLOUD_REFUSED, 0.125),
        (httpx.Response(429, headers={"Retry-After": "3"}), Reason.CLOUD_REFUSED, 3.0),
        (httpx.Response(503, headers={"Retry-After": "soon"}), Reason.CLOUD_REFUSED, None),
        (httpx.Response(503, content=b'{"retry_after_s": Infinity}'), Reason.CLOUD_REFUSED, None),
        (httpx.Response(504, json={"error": "late"}), Reason.CLOUD_TIMEOUT, None),
        (httpx.Response(401, json={"error": "token"}), Reason.CLOUD_BAD_ANSWER, None),
        (httpx.Response(404, text="<html>"), Reason.CLOUD_BAD_ANSWER, None),
        (httpx.Response(302, headers={"Location": "http://elsewhere"}), Reason.CLOUD_BAD_ANSWER, None),
        (httpx.Response(413, json={"error": "large"}), Reason.CLOUD_BAD_ANSWER, None),
        (httpx.Response(500, json=["not", "an", "object"]), Reason.CLOUD_BAD_ANSWER, None),
        (httpx.Response(200, text="ok"), Reason.CLOUD_BAD_ANSWER, None),
        (httpx.Response(200, content=ANSWER.replace(b"0.75", b"NaN")), Reason.CLOUD_BAD_ANSWER, None),
        (httpx.Response(200, content=ANSWER.replace(b"0.75", b"75")), Reason.CLOUD_BAD_ANSWER, None),
        (httpx.Response(200, content=b" " * 5_000_000), Reason.CLOUD_BAD_ANSWER, None),
    ],
)
def test_every_answer_but_an_opinion_is_a_reason_to_fall_back(
    response: httpx.Response, reason: Reason, wait: float | None
) -> None:
    error = failure(client_of(lambda request: (request.read(), response)[1]))
    assert (error.reason, error.retry_after_s) == (reason, wait)
    assert error.uplink_bytes > 0


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (httpx.ConnectError("refused"), Reason.CLOUD_UNREACHABLE),
        (httpx.ReadError("reset"), Reason.CLOUD_UNREACHABLE),
        (httpx.RemoteProtocolError("closed"), Reason.CLOUD_UNREACHABLE),
        (httpx.ConnectTimeout("slow"), Reason.CLOUD_TIMEOUT),
        (httpx.ReadTimeout("slow"), Reason.CLOUD_TIMEOUT),
        (httpx.PoolTimeout("busy"), Reason.CLOUD_TIMEOUT),
    ],
)
def test_every_failure_of_the_network_is_a_reason_to_fall_back(raised: Exception, reason: Reason) -> None:
    class Broken(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            raise raised

    error = failure(HttpCloudClient(URL, CloudSettings(), transport=Broken()))
    assert error.reason is reason
    assert error.uplink_bytes == 0


def test_a_dripping_answer_is_cut_at_the_deadline() -> None:
    class Drip(httpx.SyncByteStream):
        def __iter__(self):  # type: ignore[no-untyped-def]
            while True:
                time.sleep(0.02)
                yield b" "

    begun = time.monotonic()
    error = failure(client_of(lambda request: httpx.Response(200, stream=Drip())), deadline_s=0.1)
    assert error.reason is Reason.CLOUD_TIMEOUT
    assert time.monotonic() - begun < 1.5


def test_a_spent_deadline_sends_nothing() -> None:
    client = client_of(lambda request: httpx.Response(200, content=ANSWER))
    assert failure(client, deadline_s=0.0).reason is Reason.CLOUD_TIMEOUT
    assert client.uplink_bytes == 0


class ReferenceServer:
    """Knows references as the service does; ``forget`` is a restart."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.log: list[str] = []
        self.bytes = 0

    def forget(self) -> None:
        self.known.clear()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = request.read()
        self.bytes += len(body)
        self.log.append(request.method)
        if request.method == "PUT":
            assert request.url.path == f"/v1/references/{hashlib.sha256(body).hexdigest()}"
            self.known.add(hashlib.sha256(body).hexdigest())
            return httpx.Response(204)
        missing = [name for name in wire.parse_question(body).references if name not in self.known]
        return httpx.Response(409, json={"missing": missing}) if missing else httpx.Response(200, content=ANSWER)


def test_a_reference_image_goes_up_once_and_again_after_a_restart() -> None:
    server = ReferenceServer()
    client = client_of(server)
    good = np.full((64, 64, 3), 9, np.uint8)
    first = client.judge(query(references=(good,)), deadline_s=5)
    second = client.judge(query(references=(good, good)), deadline_s=5)
    assert server.log == ["PUT", "POST", "POST"]
    assert first.uplink_bytes > second.uplink_bytes
    server.forget()
    third = client.judge(query(references=(good,)), deadline_s=5)
    assert server.log[3:] == ["POST", "PUT", "POST"]
    assert first.uplink_bytes + second.uplink_bytes + third.uplink_bytes == client.uplink_bytes == server.bytes


def test_many_questions_at_once_upload_their_common_reference_once() -> None:
    server = ReferenceServer()
    client = client_of(server)
    good = np.full((64, 64, 3), 9, np.uint8)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: client.judge(query(f"p{i}", references=(good,)), deadline_s=5), range(16)))
    assert server.log.count("PUT") == 1


def test_a_service_that_never_keeps_a_reference_is_a_bad_answer_not_a_loop() -> None:
    server = ReferenceServer()

    def forgetful(request: httpx.Request) -> httpx.Response:
        response = server(request)
        server.forget()
        return response

    client = client_of(forgetful)
    error = failure(client, query(references=(np.zeros((8, 8, 3), np.uint8),)))
    assert error.reason is Reason.CLOUD_BAD_ANSWER
    assert server.log == ["PUT", "POST", "PUT", "POST"]
    assert error.uplink_bytes == client.uplink_bytes == server.bytes


def test_a_question_that_cannot_be_put_sends_nothing() -> None:
    client = client_of(lambda request: httpx.Response(200, content=ANSWER))
    error = failure(client, query(anomaly_map=np.full((2, 2), np.nan, np.float32)))
    assert error.reason is Reason.CLOUD_REFUSED
    assert client.uplink_bytes == 0


@pytest.mark.parametrize("url", ["", "cloud:8765", "ftp://cloud", "http://", "http://[::1", "http://cloud:99999"])
def test_an_address_that_is_none_is_bad_input(url: str) -> None:
    with pytest.raises(BadInput, match="not an http address"):
        HttpCloudClient(url, CloudSettings())


def test_a_token_that_http_cannot_carry_is_bad_input() -> None:
    with pytest.raises(BadInput, match="token"):
        HttpCloudClient(URL, CloudSettings(token="geheim\n"))


HEALTH = {"status": "ready", "model_id": "m", "version": "9", "wire": 1, "queue_depth": 0, "new": True}


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(200, text="<html>"), "not a saec cloud service"),
        (httpx.Response(404, json={"detail": "Not Found"}), r"not a saec cloud service \(status 404\)"),
        (httpx.Response(200, json={**HEALTH, "wire": 2}), "speaks wire version 2, not 1"),
        (httpx.Response(503, json={**HEALTH, "status": "starting"}), "the cloud service is starting"),
        (httpx.Response(401, json={}), "refuses the token"),
    ],
)
def test_a_probe_refuses_what_is_no_ready_service(response: httpx.Response, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        probe(URL, CloudSettings(), transport=httpx.MockTransport(lambda request: response))


def test_a_probe_accepts_a_newer_service_of_the_same_wire_version() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=json.dumps(HEALTH).encode()))
    assert probe(URL, CloudSettings(), transport=transport).model_id == "m"


def test_an_embedded_backend_answers_without_uplink_and_in_batches() -> None:
    backend = FakeBackend(seconds=0.05)
    client = EmbeddedClient(backend, max_batch=4)
    with ThreadPoolExecutor(9) as pool:
        opinions = list(pool.map(lambda i: client.judge(query(f"p{i}"), deadline_s=5), range(9)))
    assert {opinion.p_defect for opinion in opinions} == {0.25}
    assert {opinion.uplink_bytes for opinion in opinions} == {0}
    assert sorted(each.part_id for each in backend.seen) == [f"p{i}" for i in range(9)]
    assert 3 <= len(backend.batches) < 9
    assert max(backend.batches) <= 4
    client.close()
    assert failure(client).reason is Reason.CLOUD_UNREACHABLE


def test_an_embedded_backend_is_warmed_up_before_it_is_asked() -> None:
    class Warm(FakeBackend):
        def warm_up(self) -> None:
            self.model_id = f"loaded in {threading.current_thread().name}"

    client = EmbeddedClient(Warm())
    assert client.model_id.startswith("loaded in saec-embedded-backend")
    client.close()


def test_an_embedded_backend_is_closed_with_its_client_and_when_it_does_not_start() -> None:
    class Holds(FakeBackend):
        closed = False

        def close(self) -> None:
            self.closed = True

    class Broken(Holds):
        def warm_up(self) -> None:
            raise BadInput("no weights")

    backend, broken = Holds(), Broken()
    EmbeddedClient(backend).close()
    with pytest.raises(BadInput):
        EmbeddedClient(broken)
    assert backend.closed
    assert broken.closed


def test_an_embedded_backend_that_fails_or_dawdles_is_a_reason_to_fall_back() -> None:
    class Odd(FakeBackend):
        def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
            if queries[0].part_id == "none":
                return [None]  # type: ignore[list-item]
            if queries[0].part_id == "few":
                return []
            if queries[0].part_id == "outside":
                return [Opinion(0.5, Evidence((Box(0, 0, 999, 1),)), "m")]
            if queries[0].part_id == "upstream":
                return [CloudError(Reason.CLOUD_REFUSED, "busy", retry_after_s=2.0)]
            return super().judge(queries)

    client = EmbeddedClient(Odd())
    for part_id in ("nan", "bad", "crash", "none", "few", "outside"):
        assert failure(client, query(part_id)).reason is Reason.CLOUD_BAD_ANSWER
    assert failure(client, query("upstream")).retry_after_s == 2.0
    client.close()

    slow = FakeBackend(seconds=0.2)
    client = EmbeddedClient(slow, max_batch=1)
    with ThreadPoolExecutor(3) as pool:
        errors = list(pool.map(lambda i: failure(client, query(f"p{i}"), 0.05), range(3)))
    assert {error.reason for error in errors} == {Reason.CLOUD_TIMEOUT}
    client.close()
    assert len(slow.seen) == 1, "questions whose deadline has passed are not judged"
