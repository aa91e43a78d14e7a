"""Edge and cloud as two real processes."""

from __future__ import annotations

import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from cloud_fakes import FakeBackend, query, service_process
from saec.cloud.client import HttpCloudClient, probe
from saec.cloud.service import serve
from saec.config import CloudSettings, ServeSettings
from saec.errors import BadInput
from saec.types import CloudError, Opinion, Reason

REFERENCE = query("good").image


def settings(**more: object) -> CloudSettings:
    return CloudSettings(**{"in_flight": 80, **more})  # type: ignore[arg-type]


def ask(client: HttpCloudClient, part_id: str, deadline_s: float = 10.0) -> Opinion | CloudError:
    try:
        return client.judge(query(part_id, references=(REFERENCE,)), deadline_s=deadline_s)
    except CloudError as error:
        return error


def test_a_burst_of_72_is_answered_or_refused_and_none_is_lost(tmp_path: Path) -> None:
    with service_process(tmp_path, seconds=0.1, max_queue=8, max_batch=4) as (_, url):
        client = HttpCloudClient(url, settings())
        with ThreadPoolExecutor(72) as pool:
            answers = list(pool.map(lambda i: ask(client, f"p{i}"), range(72)))
        assert len(answers) == 72
        refused = [each for each in answers if isinstance(each, CloudError)]
        assert {each.reason for each in refused} == {Reason.CLOUD_REFUSED}
        assert all("429" in str(each) and each.retry_after_s and each.retry_after_s > 0 for each in refused)
        assert 8 <= len(answers) - len(refused) < 72

        time.sleep(min(each.retry_after_s or 0 for each in refused))
        assert isinstance(ask(client, "afterwards"), Opinion)
        statuses = Counter(type(each).__name__ for each in answers)
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
        assert f'saec_cloud_requests_total{{status="429"}} {float(statuses["CloudError"])}' in metrics
        assert f'saec_cloud_requests_total{{status="200"}} {float(statuses["Opinion"] + 1)}' in metrics
        assert "saec_cloud_queue_depth 0.0" in metrics
        client.close()


def test_kill_9_of_the_service_makes_it_unreachable_and_a_new_one_takes_over(tmp_path: Path) -> None:
    with service_process(tmp_path, seconds=5.0) as (process, url), ThreadPoolExecutor(4) as pool:
        client = HttpCloudClient(url, settings())
        asked = [pool.submit(ask, client, f"p{i}") for i in range(4)]
        time.sleep(0.3)
        process.kill()
        in_flight = [each.result() for each in asked]
        assert {each.reason for each in in_flight if isinstance(each, CloudError)} == {Reason.CLOUD_UNREACHABLE}
        assert all(isinstance(each, CloudError) and each.uplink_bytes > 0 for each in in_flight)
        process.wait()
        after = ask(client, "later")
        assert isinstance(after, CloudError)
        assert after.reason is Reason.CLOUD_UNREACHABLE
        assert after.uplink_bytes == 0
    with service_process(tmp_path, port=int(url.rsplit(":", 1)[1])):
        # The new process has forgotten the reference image: the client uploads it again.
        assert isinstance(ask(client, "again"), Opinion)
    client.close()


def test_sigterm_finishes_the_questions_at_hand_and_exits_cleanly(tmp_path: Path) -> None:
    with service_process(tmp_path, seconds=0.4, max_batch=1) as (process, url), ThreadPoolExecutor(3) as pool:
        client = HttpCloudClient(url, settings())
        asked = [pool.submit(ask, client, f"p{i}") for i in range(3)]
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert all(isinstance(each.result(), Opinion) for each in asked)
        assert process.wait(timeout=5) == 0
        client.close()


def test_a_stalled_service_costs_no_more_than_the_deadline(tmp_path: Path) -> None:
    with service_process(tmp_path) as (process, url):
        client = HttpCloudClient(url, settings())
        assert isinstance(ask(client, "warm"), Opinion)
        process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        answer = ask(client, "stalled", deadline_s=0.3)
        assert isinstance(answer, CloudError)
        assert answer.reason is Reason.CLOUD_TIMEOUT
        assert time.monotonic() - begun < 1.5
        client.close()


def test_a_round_trip_does_not_wait_for_a_delayed_acknowledgement(tmp_path: Path) -> None:
    with service_process(tmp_path, max_wait_ms=0) as (_, url):
        client = HttpCloudClient(url, settings())
        times = []
        for i in range(10):
            begun = time.monotonic()
            assert isinstance(ask(client, f"p{i}"), Opinion)
            times.append(time.monotonic() - begun)
        client.close()
    # Nagle's algorithm against the kernel's delayed acknowledgement costs 40 ms every time; a busy machine not always.
    assert min(times) < 0.03


def test_a_probe_names_the_model_and_says_plainly_what_is_wrong(tmp_path: Path) -> None:
    with service_process(tmp_path, token="secret") as (_, url):
        assert probe(url, settings(token="secret")).model_id == "fake-1"
        with pytest.raises(BadInput, match="refuses the token"):
            probe(url, settings(token="guess"))
        client = HttpCloudClient(url, settings())
        refused = ask(client, "p1")
        client.close()
        assert isinstance(refused, CloudError)
        assert refused.reason is Reason.CLOUD_BAD_ANSWER
        assert "401: the token is missing or wrong" in str(refused)
    with pytest.raises(BadInput, match="does not answer"):
        probe(url, settings())


def test_a_port_in_use_is_bad_input(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(BadInput, match="cannot listen"):
        serve(FakeBackend(), ServeSettings(port=taken.getsockname()[1]))
