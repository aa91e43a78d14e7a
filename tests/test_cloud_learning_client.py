"""The client of learning tries again, goes on where it was cut off, and lets nothing wrong through. No network."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest

from learn_fakes import JOB, frames
from saec.cloud.desk import FramesMissing
from saec.cloud.learning import JobFailed, LearnClient, ServiceRefused
from saec.config import CloudSettings
from saec.fleet.frame import frame_id
from saec.fleet.outbox import Outbox
from saec.types import CloudError, Reason


class Cut(httpx.SyncByteStream):
    """Sends so many bytes, then the connection breaks."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __iter__(self) -> Iterator[bytes]:
        yield self._data
        raise httpx.ReadError("connection reset")


class Script(httpx.BaseTransport):
    """Answers one request after the other as it is told, and remembers what was asked."""

    def __init__(self, answers: Sequence[httpx.Response | Exception]) -> None:
        self._answers = iter(answers)
        self.asked: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.asked.append(request)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """The client waits as it says, but quickly; returns the waits."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def client_of(*answers: httpx.Response | Exception) -> tuple[LearnClient, Script]:
    script = Script(answers)
    return LearnClient("http://cloud", CloudSettings(token="t"), transport=script), script


def filled(tmp_path, count: int) -> tuple[Outbox, list[str]]:
    outbox = Outbox(tmp_path / "outbox.sqlite", most_bytes=10**6)
    return outbox, [outbox.put(data) for data in frames(count).values()]


def missing(*names: str) -> httpx.Response:
    return httpx.Response(200, json={"frames": names})


def test_sending_tries_again_while_the_service_is_away_or_busy_and_waits_as_asked(tmp_path, hurried):
    outbox, names = filled(tmp_path, 2)
    client, script = client_of(
        httpx.ConnectError("refused"),
        missing(*names),
        httpx.Response(503),
        httpx.Response(429, headers={"Retry-After": "7"}),
        httpx.Response(201),
        httpx.ReadTimeout("slow"),
        httpx.Response(200),
    )
    told: list[tuple[int, int]] = []
    assert client.send(outbox, deadline_s=60, progress=lambda *each: told.append(each)) == 2
    assert (outbox.pending(), told) == ([], [(1, 2), (2, 2)])
    assert len(hurried) == 4
    assert hurried[2] == 7
    assert {request.headers["authorization"] for request in script.asked} == {"Bearer t"}
    assert client.bytes_up == sum(len(request.content) for request in script.asked)
    outbox.close()


def test_what_the_service_has_does_not_go_up_again(tmp_path):
    outbox, names = filled(tmp_path, 3)
    client, script = client_of(missing(names[1]), httpx.Response(201))
    assert client.send(outbox, deadline_s=60) == 1
    assert [request.url.path for request in script.asked] == ["/v1/learn/missing", f"/v1/learn/frames/{names[1]}"]
    assert outbox.pending() == []
    outbox.close()


@pytest.mark.parametrize("status", [401, 404, 413, 415, 422, 507])
def test_a_refusal_that_would_stay_one_ends_the_sending_and_the_rest_still_waits(tmp_path, status):
    outbox, names = filled(tmp_path, 3)
    client, _ = client_of(
        missing(*names), httpx.Response(201), httpx.Response(status, json={"error": "no", "fix": "x"})
    )
    with pytest.raises(CloudError, match=f"frame {names[1]}: status {status}: no") as error:
        client.send(outbox, deadline_s=60)
    assert error.value.reason is Reason.CLOUD_BAD_ANSWER
    assert outbox.pending() == names[1:]
    outbox.close()


def test_a_service_that_stays_away_is_given_up_at_the_deadline(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    outbox, names = filled(tmp_path, 1)
    client, script = client_of(*[httpx.ConnectError("refused")] * 50)
    with pytest.raises(CloudError) as error:
        client.send(outbox, deadline_s=20)
    assert error.value.reason is Reason.CLOUD_UNREACHABLE
    assert 110 < now[0] < 120
    assert 5 <= len(script.asked) < 20, "with longer and longer waits"
    assert outbox.pending() == names
    outbox.close()


def job(status: str, **more: object) -> httpx.Response:
    return httpx.Response(200, json={"id": JOB, "status": status, **more})


def test_a_job_is_waited_for_and_its_steps_are_told():
    client, _ = client_of(
        job("queued"), job("running", done=1, total=2), httpx.ConnectError("x"), job("done", result={"a": 1})
    )
    told: list[tuple[int, int]] = []
    client.start(JOB, {"frames": []}, deadline_s=5)
    assert client.finish(JOB, deadline_s=60, progress=lambda *each: told.append(each)).result == {"a": 1}
    assert told == [(1, 2), (0, 0)]


def test_a_job_that_failed_or_takes_too_long_is_an_error():
    client, _ = client_of(job("failed", error="no such product"), job("running", done=3, total=9), httpx.Response(404))
    with pytest.raises(JobFailed, match="the job failed: no such product"):
        client.finish(JOB, deadline_s=60)
    with pytest.raises(CloudError, match=r"not done after 0 s \(3 of 9 steps\)"):
        client.finish(JOB, deadline_s=0.05)
    with pytest.raises(CloudError, match="404"):
        client.finish(JOB, deadline_s=60)


@pytest.mark.parametrize("answer", [b"", b"[]", b'{"id": "x"}', b'{"id": "0123456789abcdef", "status": "odd"}'])
def test_an_answer_that_is_no_job_is_a_bad_answer(answer):
    client, _ = client_of(httpx.Response(200, content=answer))
    with pytest.raises(CloudError, match="cannot be used") as error:
        client.finish(JOB, deadline_s=60)
    assert error.value.reason is Reason.CLOUD_BAD_ANSWER


UPDATE = np.random.default_rng(7).bytes(10_000)
NAME = frame_id(UPDATE)


def piece(start: int, stop: int | None = None, **more: Any) -> httpx.Response:
    headers = {"Content-Range": f"bytes {start}-{len(UPDATE) - 1}/{len(UPDATE)}"}
    return httpx.Response(206, headers=headers, **({"content": UPDATE[start:stop]} | more))


def test_a_cut_download_goes_on_where_it_was_cut(tmp_path):
    client, script = client_of(
        piece(0, stream=Cut(UPDATE[:3000])),
        httpx.Response(503),
        piece(3000, stream=Cut(UPDATE[3000:9000])),
        piece(9000),
    )
    client.download(NAME, tmp_path / "update", most=10_000, deadline_s=60)
    assert (tmp_path / "update").read_bytes() == UPDATE
    assert [request.headers["range"] for request in script.asked] == [f"bytes={n}-" for n in (0, 3000, 3000, 9000)]
    assert client.bytes_down == len(UPDATE)
    assert [file.name for file in tmp_path.iterdir()] == ["update"]


def test_the_next_call_goes_on_too_and_a_complete_part_needs_no_byte(tmp_path):
    client, _ = client_of(piece(0, stream=Cut(UPDATE[:3000])), httpx.Response(404, json={"error": "gone", "fix": "x"}))
    with pytest.raises(CloudError, match="gone"):
        client.download(NAME, tmp_path / "update", most=10_000, deadline_s=60)
    assert (tmp_path / f"{NAME}.part").read_bytes() == UPDATE[:3000]
    assert not (tmp_path / "update").exists()
    client, script = client_of(piece(3000))
    client.download(NAME, tmp_path / "update", most=10_000, deadline_s=60)
    assert script.asked[0].headers["range"] == "bytes=3000-"
    (tmp_path / "update").rename(tmp_path / f"{NAME}.part")
    client, _ = client_of(httpx.Response(416))
    client.download(NAME, tmp_path / "update", most=10_000, deadline_s=60)
    assert (tmp_path / "update").read_bytes() == UPDATE


def test_a_service_that_knows_no_pieces_sends_the_whole(tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(b"something else")
    client, _ = client_of(httpx.Response(200, content=UPDATE))
    client.download(NAME, tmp_path / "update", most=10_000, deadline_s=60)
    assert (tmp_path / "update").read_bytes() == UPDATE


def test_a_part_that_was_wrong_is_fetched_again_from_its_beginning(tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 4000)
    client, script = client_of(piece(4000), piece(0))
    client.download(NAME, tmp_path / "update", most=10_000, deadline_s=60)
    assert [request.headers["range"] for request in script.asked] == ["bytes=4000-", "bytes=0-"]
    assert (tmp_path / "update").read_bytes() == UPDATE


def test_bytes_that_are_not_the_update_never_appear(tmp_path):
    (tmp_path / "update").write_bytes(b"former")
    for answers, why in (
        ([httpx.Response(200, content=UPDATE[:-1] + b"x")], "does not have the SHA-256"),
        ([httpx.Response(200, content=UPDATE + b"x")], "larger than 10000 bytes"),
        ([piece(5)], "another piece"),
    ):
        client, _ = client_of(*answers)
        with pytest.raises(CloudError, match=why) as error:
            client.download(NAME, tmp_path / "update", most=10_000, deadline_s=60)
        assert error.value.reason is Reason.CLOUD_BAD_ANSWER
        assert (tmp_path / "update").read_bytes() == b"former"


def test_a_look_whether_anybody_learns_there_waits_for_nobody(hurried):
    for answer, why in (
        (httpx.ConnectError("refused"), "no connection: refused"),
        (httpx.Response(404, json={"error": "this service does not learn", "fix": "start it"}), "does not learn"),
        (httpx.Response(404, text="<html>"), "status 404"),
        (httpx.Response(200, text="<html>"), "the answer cannot be used"),
    ):
        client, script = client_of(answer)
        with pytest.raises(CloudError, match=why):
            client.check()
        assert len(script.asked) == 1
    for answer in (missing(), httpx.Response(503), httpx.Response(429)):
        client_of(answer)[0].check()
    assert not hurried


def test_what_the_service_says_is_to_be_done_is_passed_on():
    client, _ = client_of(httpx.Response(401, json={"error": "the token is wrong", "fix": "set cloud.token"}))
    with pytest.raises(ServiceRefused) as error:
        client.check()
    assert (error.value.status, error.value.fix, error.value.for_good) == (401, "set cloud.token", False)


def test_a_waiting_client_says_so_once_and_until_when(hurried):
    told: list[tuple[str, float]] = []
    script = Script([httpx.ConnectError("refused"), httpx.ConnectError("refused"), job("queued")])
    client = LearnClient(
        "http://cloud", CloudSettings(), transport=script, on_wait=lambda *each: told.append((str(each[0]), each[1]))
    )
    client.start(JOB, {"frames": []}, deadline_s=60)
    ((why, seconds),) = told
    assert "refused" in why
    assert 50 < seconds <= 60


def test_frames_that_the_service_lacks_are_named():
    refusal = {"error": "2 of the job's frames are not here", "fix": "send them", "missing": ["a", "b"]}
    client, _ = client_of(httpx.Response(409, json=refusal), httpx.Response(409, json={"error": "x", "fix": "y"}))
    with pytest.raises(FramesMissing, match="2 of the job's frames") as error:
        client.start(JOB, {"frames": []}, deadline_s=5)
    assert error.value.names == ("a", "b")
    with pytest.raises(ServiceRefused):
        client.start(JOB, {"frames": []}, deadline_s=5)
