"""Learning over a real wire: two processes, either of which may be killed at any moment."""

from __future__ import annotations

import itertools
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from learn_fakes import JOB, frames, learning_service
from saec.cloud.learning import LearnClient
from saec.config import CloudSettings
from saec.fleet.frame import CONTENT_TYPE, decode_frame, frame_id
from saec.fleet.outbox import Outbox
from saec.types import CloudError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is a POSIX matter")

FRAMES = frames(50, size=20_000)


def client_of(url: str, **more: object) -> LearnClient:
    return LearnClient(url, CloudSettings(**{"timeout_s": 5.0, **more}))  # type: ignore[arg-type]


@contextmanager
def outbox_with(folder: Path, content: dict[str, bytes]) -> Iterator[Outbox]:
    with Outbox(folder / "outbox.sqlite", most_bytes=10**8) as outbox:
        for data in content.values():
            outbox.put(data)
        yield outbox


def stored(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "desk" / "frames").glob("*/*")}


def arrived(folder: Path) -> int:
    return len(list((folder / "desk" / "frames").glob("*/[!.]*")))


def test_a_service_killed_in_the_middle_has_every_frame_once_in_the_end(tmp_path):
    port = 0
    with outbox_with(tmp_path, FRAMES) as outbox:
        sending = threading.Thread()
        for life, allowed in enumerate((8, 25, 51)):
            with learning_service(tmp_path, port=port) as (process, url):
                port = int(url.rsplit(":", 1)[1])
                if not life:
                    client = client_of(url)
                    # One call outlives two services.
                    sending = threading.Thread(target=client.send, args=(outbox,), kwargs={"deadline_s": 60})
                    sending.start()
                while sending.is_alive() and arrived(tmp_path) < allowed:
                    time.sleep(0.001)
                process.kill() if life < 2 else sending.join()
        assert outbox.pending() == []
        client.close()
    assert stored(tmp_path) == FRAMES
    whole = sum(map(len, FRAMES.values()))
    assert whole <= client.bytes_up < whole + 4 * 21_000 + 20_000, "only what was under way goes up again"


SEND = """
import sys
from pathlib import Path
from saec.cloud.learning import LearnClient
from saec.config import CloudSettings
from saec.fleet.outbox import Outbox
with Outbox(Path(sys.argv[2]), most_bytes=10**8) as outbox:
    LearnClient(sys.argv[1], CloudSettings()).send(outbox, deadline_s=60)
"""


def test_a_client_killed_in_the_middle_goes_on_in_its_next_life(tmp_path):
    with outbox_with(tmp_path, FRAMES):
        pass
    with learning_service(tmp_path) as (_, url):
        for share in (5, 20, 35, 51):
            command = [sys.executable, "-c", SEND, url, str(tmp_path / "outbox.sqlite")]
            process = subprocess.Popen(command)
            while process.poll() is None and arrived(tmp_path) < share:
                time.sleep(0.001)
            if share < len(FRAMES):
                process.kill()
            process.wait()
            assert process.returncode == (-signal.SIGKILL if share < len(FRAMES) else 0)
        text = httpx.get(f"{url}/metrics", trust_env=False).text
    assert stored(tmp_path) == FRAMES
    assert 'saec_cloud_frames_total{new="true"} 50.0' in text
    with outbox_with(tmp_path, {}) as outbox:
        assert outbox.pending() == []


def test_a_job_is_the_same_job_over_restarts_and_is_done_in_the_end(tmp_path):
    some = dict(itertools.islice(FRAMES.items(), 20))
    request = {"frames": list(some), "note": "n"}
    with learning_service(tmp_path, seconds=0.05) as (process, url), closing(client_of(url)) as client:
        with outbox_with(tmp_path, some) as outbox:
            client.send(outbox, deadline_s=30)
        client.start(JOB, request, deadline_s=5)
        log = tmp_path / "jobs.log"
        while not log.is_file() or log.read_text() != "n\n":
            time.sleep(0.01)
        process.kill()
    with learning_service(tmp_path) as (_, url), closing(client_of(url)) as client:
        job = client.finish(JOB, deadline_s=30)
        assert job.result["numbers"] == list(range(20))
        assert (tmp_path / "jobs.log").read_text() == "n\nn\n"
        assert client.start(JOB, request, deadline_s=5) == job
        with pytest.raises(CloudError, match="409"):
            client.start(JOB, {**request, "note": "other"}, deadline_s=5)
    with learning_service(tmp_path) as (_, url), closing(client_of(url)) as client:
        assert client.start(JOB, request, deadline_s=5) == job
        client.download(job.result["update"], tmp_path / "update", most=10**6, deadline_s=5)
    assert frame_id((tmp_path / "update").read_bytes()) == job.result["update"]
    assert (tmp_path / "jobs.log").read_text() == "n\nn\n", "an ended job is not begun again"


def test_sigterm_stops_a_job_and_the_next_service_does_it(tmp_path):
    with learning_service(tmp_path, seconds=0.2) as (process, url), closing(client_of(url)) as client:
        with outbox_with(tmp_path, FRAMES) as outbox:
            client.send(outbox, deadline_s=30)
        client.start(JOB, {"frames": list(FRAMES)}, deadline_s=5)
        while client.start(JOB, {"frames": list(FRAMES)}, deadline_s=5).done < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=8) == 0, "ten seconds of work were left"
    with learning_service(tmp_path) as (_, url), closing(client_of(url)) as client:
        assert client.finish(JOB, deadline_s=30).done == 50


def test_the_command_serves_a_desk_with_the_teacher_and_fails_what_it_cannot_do(tmp_path):
    command = ("--learn", str(tmp_path / "desk"), "--set", "learn.max_frame_bytes=10000")
    with learning_service(tmp_path, *command) as (_, url), closing(client_of(url)) as client:
        client.start(JOB, {"frames": []}, deadline_s=5)
        with pytest.raises(CloudError, match="the job failed: not a request to learn"):
            client.finish(JOB, deadline_s=10)
        with outbox_with(tmp_path, FRAMES) as outbox, pytest.raises(CloudError, match="larger than 10000 bytes"):
            client.send(outbox, deadline_s=5)
        second = subprocess.run(
            [sys.executable, "-m", "saec", "cloud", "serve", "--backend", "openai", *command],
            capture_output=True,
            text=True,
        )
        assert second.returncode == 2
        assert second.stderr.count("\n") == 1
        assert "in use by another service" in second.stderr
    served, failed = (tmp_path / "service.log").read_text().splitlines()
    assert served == f"serving fake-1 at {url}"
    assert "not a request to learn" in failed


class Cutting:
    """A wire between client and service that breaks after so many bytes from the service, again and again."""

    def __init__(self, url: str, after: int) -> None:
        self._to = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        self._after = after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed: the test is over
                return
            with near, socket.create_connection(self._to) as far:
                up = threading.Thread(target=self._copy, args=(near, far, 1 << 40), daemon=True)
                up.start()
                self.cuts += self._copy(far, near, self._after)
                for each in (near, far):
                    each.shutdown(socket.SHUT_RDWR)
                up.join()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket, most: int) -> bool:
        try:
            while most > 0 and (data := source.recv(min(most, 65_536))):
                target.sendall(data)
                most -= len(data)
        except OSError:  # the other side of it is gone
            return False
        return most <= 0

    def close(self) -> None:
        self._listener.close()


def test_a_download_over_a_wire_that_breaks_again_and_again_is_whole_in_the_end(tmp_path):
    size = 3_000_000
    with learning_service(tmp_path, update_bytes=size) as (_, url):
        with closing(client_of(url)) as client:
            client.start(JOB, {"frames": []}, deadline_s=5)
            name = client.finish(JOB, deadline_s=30).result["update"]
        wire = Cutting(url, after=800_000)
        with closing(wire), closing(client_of(wire.url)) as client:
            client.download(name, tmp_path / "update", most=size, deadline_s=30)
        assert frame_id((tmp_path / "update").read_bytes()) == name
        assert wire.cuts == 3
        assert size <= client.bytes_down < size + 10_000, "no byte comes twice"


def test_the_wrong_token_is_refused_and_stores_nothing(tmp_path):
    with learning_service(tmp_path, token="right") as (_, url), outbox_with(tmp_path, FRAMES) as outbox:
        for token in (None, "wrong"):
            with closing(client_of(url, token=token)) as client:
                with pytest.raises(CloudError, match="401"):
                    client.send(outbox, deadline_s=5)
                with pytest.raises(CloudError, match="401"):
                    client.start(JOB, {}, deadline_s=5)
                with pytest.raises(CloudError, match="401"):
                    client.download("0" * 64, tmp_path / "update", most=10, deadline_s=5)
        assert len(outbox.pending()) == 50
        assert stored(tmp_path) == {}
        with closing(client_of(url, token="right")) as client:
            assert client.send(outbox, deadline_s=30) == 50


def test_a_replayed_frame_changes_nothing_and_corrupted_or_oversized_ones_are_refused(tmp_path):
    name, data = next(iter(FRAMES.items()))
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    with learning_service(tmp_path, max_body_bytes=100_000) as (_, url):

        def put(name: str, data: bytes) -> int:
            headers = {"Content-Type": CONTENT_TYPE}
            where = f"{url}/v1/learn/frames/{name}"
            return httpx.put(where, content=data, headers=headers, trust_env=False).status_code

        assert [put(name, data) for _ in range(3)] == [201, 200, 200]
        before = (tmp_path / "desk" / "frames" / name[:2] / name).stat()
        assert put(name, data) == 200
        assert (tmp_path / "desk" / "frames" / name[:2] / name).stat() == before
        assert put(name, damaged) == 422
        assert put(frame_id(damaged), damaged) == 422
        assert put(frame_id(bytes(100_001)), bytes(100_001)) == 413
    assert stored(tmp_path) == {name: data}
    assert decode_frame(data, kinds=("sample",), most=10**6).header == {"number": 0}
