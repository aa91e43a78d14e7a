"""The desk keeps what it has acknowledged and goes on with its jobs, whatever ends the service in between."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cli_run import saec
from cloud_fakes import FakeBackend
from learn_fakes import JOB, Runner, frames, settings
from saec.cli import cloud
from saec.cloud.desk import DeskFull, FramesMissing, Job, JobConflict, JobStatus
from saec.config import Settings
from saec.errors import BadInput
from saec.fleet.frame import BadFrame, Frame, encode_frame, frame_id
from saec.learn import storage
from saec.learn.desk import MOST_STARTS, FolderDesk


@pytest.fixture
def root(tmp_path):
    return tmp_path / "desk"


class Opened:
    """A desk that is at work, closed in the end."""

    def __init__(self, root: Path, run=None, *, work: bool = True, **more: object) -> None:
        self.desk = FolderDesk(root, run or Runner(root.parent / "log"), settings(**more))
        if work:
            self.desk.open(FakeBackend().judge)

    def __enter__(self) -> FolderDesk:
        return self.desk

    def __exit__(self, *_: object) -> None:
        self.desk.close()


def ended(desk: FolderDesk, job_id: str = JOB) -> Job:
    give_up = time.monotonic() + 10
    while (job := desk.job(job_id)) is None or not job.ended:
        assert time.monotonic() < give_up, job
        time.sleep(0.005)
    return job


def put_all(desk: FolderDesk, some: dict[str, bytes]) -> list[str]:
    for name, data in some.items():
        desk.put(name, data)
    return list(some)


def test_a_frame_is_kept_once_and_found_again_by_the_next_service(root):
    some = frames(3)
    first, second, third = some
    with Opened(root, work=False) as desk:
        assert desk.put(first, some[first])
        assert not desk.put(first, some[first])
        assert desk.missing([first, second, first]) == [second]
    with Opened(root, work=False) as desk:
        assert desk.missing(list(some)) == [second, third]
        assert not desk.put(first, some[first])
    assert (root / "frames" / first[:2] / first).read_bytes() == some[first]


def test_what_is_no_sample_is_refused_and_not_stored(root):
    ((name, data),) = frames(1).items()
    update = encode_frame(Frame("update"))
    large = encode_frame(Frame("sample", {"x": "y" * 5000}))
    with Opened(root, work=False, max_frame_bytes=4000) as desk:
        for wrong, content in (
            (name, data[:-1]),
            ("0" * 64, data),
            ("../../" + name, data),
            (frame_id(b"x"), b"x"),
            (frame_id(update), update),
            (frame_id(large), large),
        ):
            with pytest.raises(BadFrame):
                desk.put(wrong, content)
            assert desk.missing([wrong]) == [wrong]
    assert not [file for file in root.rglob("*") if file.is_file() and "desk" not in file.name]


def test_a_job_is_done_in_steps_and_its_update_can_be_had(root):
    with Opened(root) as desk:
        names = put_all(desk, frames(3))
        job, fresh = desk.start(JOB, {"frames": names})
        assert (job.id, job.status, fresh) == (JOB, JobStatus.QUEUED, True)
        job = ended(desk)
        assert (job.status, job.done, job.total, job.error) == (JobStatus.DONE, 3, 3, None)
        assert job.result is not None
        assert (job.result["numbers"], job.result["p"]) == ([0, 1, 2], [0.25] * 3)
        update = desk.update(job.result["update"])
        assert update is not None
        assert frame_id(update) == job.result["update"]
        assert desk.update("0" * 64) is None
        assert desk.update("../jobs/" + JOB + ".json") is None
        assert desk.jobs() == {JobStatus.DONE: 1}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")
def test_a_job_and_its_threads_step_back_behind_the_rest_of_the_service(root):
    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def run(request, frame_of, judge, progress):
        with ThreadPoolExecutor(1) as pool:
            return {"nice": [nice(), pool.submit(nice).result()]}

    with Opened(root, run) as desk:
        desk.start(JOB, {})
        assert ended(desk).result == {"nice": [min(nice() + 10, 19)] * 2}
    assert nice() < 19, "the test's own thread has stepped back as well"


def test_the_same_request_is_the_same_job_and_another_one_under_its_id_is_refused(root):
    for fresh in (True, False):
        with Opened(root) as desk:
            names = put_all(desk, frames(2))
            assert desk.start(JOB, {"frames": tuple(names), "note": "once"})[1] is fresh
            before = ended(desk)
            assert desk.start(JOB, {"note": "once", "frames": names}) == (before, False)
            with pytest.raises(JobConflict):
                desk.start(JOB, {"frames": names, "note": "twice"})
            assert desk.job(JOB) == before
    assert (root.parent / "log").read_text() == "once\n"


def test_a_job_about_frames_that_are_not_here_does_not_begin(root):
    some = frames(2)
    with Opened(root) as desk:
        first, second = some
        desk.put(first, some[first])
        with pytest.raises(FramesMissing) as missing:
            desk.start(JOB, {"frames": [first, second]})
        assert missing.value.names == (second,)
        assert desk.job(JOB) is None
        desk.put(second, some[second])
        assert desk.start(JOB, {"frames": [first, second]})[1]
        assert ended(desk).status is JobStatus.DONE


@pytest.mark.parametrize("job_id", ["", "abc", "../../../etc", "0123456789ABCDEF", "0" * 65, JOB + "\n"])
def test_an_id_that_is_no_id_is_refused(root, job_id):
    with Opened(root, work=False) as desk, pytest.raises(ValueError, match="should match pattern"):
        desk.start(job_id, {})


def test_a_job_that_fails_says_why_and_the_next_one_runs(root, caplog):
    with Opened(root) as desk:
        desk.start(JOB, {"fail": "no such product"})
        assert (ended(desk).status, ended(desk).error) == (JobStatus.FAILED, "ValueError: no such product")
        desk.start("f" * 8, {"frames": []})
        assert ended(desk, "f" * 8).status is JobStatus.DONE
    assert "no such product" in caplog.text
    with Opened(root) as desk:
        assert desk.job(JOB).error == "ValueError: no such product", "also after a restart"


def test_a_job_that_failed_is_begun_anew_when_it_is_started_again(root, caplog):
    answers = iter([RuntimeError("the model is away"), {"p": 1}])

    def run(request, frame_of, judge, progress):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with Opened(root, run) as desk:
        desk.start(JOB, {})
        assert ended(desk).status is JobStatus.FAILED
        job, fresh = desk.start(JOB, {})
        assert (job.status, job.error, fresh) == (JobStatus.QUEUED, None, True)
        assert ended(desk).result == {"p": 1}
        with pytest.raises(JobConflict):
            desk.start(JOB, {"note": "other"})


def test_a_result_that_json_does_not_have_fails_the_job(root):
    for number, result in enumerate(({"p": float("nan")}, {"p": object()})):
        with Opened(root, lambda *_, result=result: result) as desk:
            desk.start(f"{number:08}", {})
            assert ended(desk, f"{number:08}").status is JobStatus.FAILED


def test_jobs_run_one_at_a_time_in_the_order_of_their_start_also_after_a_restart(root):
    ids = [f"{number:08x}" for number in (9, 3, 7, 1)]
    with Opened(root, work=False) as desk:
        for job_id in ids:
            desk.start(job_id, {"note": job_id, "frames": []})
    running, most = [], []

    def run(request, frame_of, judge, progress):
        running.append(request["note"])
        most.append(len(running))
        time.sleep(0.01)
        running.pop()
        with (root.parent / "log").open("a") as log:
            log.write(request["note"] + "\n")
        return {}

    with Opened(root, run) as desk:
        for job_id in ids:
            assert ended(desk, job_id).status is JobStatus.DONE
    assert (root.parent / "log").read_text().split() == ids
    assert most == [1] * 4


def test_a_job_that_is_stopped_in_the_middle_is_begun_anew(root):
    begun = threading.Event()

    def endless(request, frame_of, judge, progress):
        for step in range(100_000):
            progress(step, 100_000)
            begun.set()
            time.sleep(0.001)
        return {}

    with Opened(root, endless) as desk:
        desk.start(JOB, {"frames": []})
        assert begun.wait(5)
        assert desk.job(JOB).status is JobStatus.RUNNING
    with Opened(root) as desk:
        assert ended(desk).status is JobStatus.DONE


def killed_over(root: Path) -> None:
    """A service that dies the moment that its job has begun, as the kernel ends one that takes all memory."""
    script = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from saec.config import LearnSettings\n"
        "from saec.learn.desk import MOST_STARTS, FolderDesk\n"
        "run = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "FolderDesk(Path(sys.argv[1]), run, LearnSettings()).open(lambda queries: [])\n"
        "time.sleep(30)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, root], timeout=60).returncode == -signal.SIGKILL


def test_a_job_that_kills_every_service_fails_in_the_end_and_the_next_one_runs(root):
    with Opened(root, work=False) as desk:
        desk.start(JOB, {"note": "greedy", "frames": []})
        desk.start("f" * 8, {"frames": []})
    for _ in range(MOST_STARTS):
        killed_over(root)
    with Opened(root) as desk:
        job = ended(desk)
        assert job.status is JobStatus.FAILED
        assert job.error == "3 services ended while they were at it: it may take more memory than there is"
        assert ended(desk, "f" * 8).status is JobStatus.DONE
        assert desk.start(JOB, {"note": "greedy", "frames": []})[1], "who asks again gets another try"
        assert ended(desk).status is JobStatus.DONE


def test_a_job_that_services_stop_in_order_is_begun_anew_as_often_as_that_happens(root):
    def endless(request, frame_of, judge, progress):
        while True:
            progress(0, 1)
            time.sleep(0.001)

    with Opened(root, work=False) as desk:
        desk.start(JOB, {"frames": []})
    for _ in range(MOST_STARTS + 1):
        with Opened(root, endless) as desk:
            while desk.job(JOB).status is not JobStatus.RUNNING:
                time.sleep(0.001)
    with Opened(root) as desk:
        assert ended(desk).status is JobStatus.DONE


def test_a_folder_belongs_to_one_service(root):
    with Opened(root), pytest.raises(BadInput, match="in use by another service"):
        FolderDesk(root, Runner(root), settings())


def test_what_a_killed_service_left_half_written_is_cleared_away(root):
    with Opened(root) as desk:
        (name,) = put_all(desk, frames(1))
        desk.start(JOB, {"frames": [name]})
        update = ended(desk).result["update"]
    for left in (f"frames/ab/.{'ab' * 32}.x1", "jobs/.y.json.z", "updates/.u", "updates/" + "0" * 64):
        (root / left).write_bytes(b"half")
    with Opened(root) as desk:
        assert desk.missing(["ab" * 32, name]) == ["ab" * 32]
        assert desk.update(update)
    assert not list(root.rglob(".*"))
    assert [file.name for file in (root / "updates").iterdir()] == [update], "of no job: nobody would ever delete it"


def test_a_job_record_that_cannot_be_read_is_one_clear_line(root):
    Opened(root, work=False).desk.close()
    (root / "jobs" / f"{JOB}.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(BadInput, match=r"cannot be read .*delete it"):
            FolderDesk(root, Runner(root), settings())


def test_a_frame_that_was_damaged_on_the_disk_fails_its_job_and_can_be_sent_again(root, caplog):
    ((name, data),) = frames(1).items()
    with Opened(root) as desk:
        desk.put(name, data)
        file = root / "frames" / name[:2] / name
        file.write_bytes(data[:-1] + b"x")
        desk.start(JOB, {"frames": [name]})
        assert ended(desk).error == "1 of the job's frames are not here"
        assert desk.missing([name]) == [name]
        assert desk.put(name, data)
    assert file.read_bytes() == data


@pytest.mark.parametrize("file", ["station.json", "adapter_config.json", "predictions.jsonl", "ledger.sqlite"])
def test_a_folder_of_something_else_or_a_file_is_refused_by_the_service_and_left_alone(tmp_path, monkeypatch, file):
    monkeypatch.setattr(cloud, "backend_of", lambda *_: FakeBackend())
    other = tmp_path / "other"
    other.mkdir()
    (other / file).write_text("{}")
    assert "this is the folder of a" in saec("cloud", "serve", "--learn", other).error()
    assert [each.name for each in other.iterdir()] == [file]
    assert "this is a file" in saec("cloud", "serve", "--learn", other / file).error()
    assert "cannot be written" in saec("cloud", "serve", "--learn", other / file / "desk").error()


def test_a_folder_in_which_people_have_put_their_labels_may_become_a_desk(root):
    (root / "teacher").mkdir(parents=True)
    (root / "teacher" / "labels.csv").write_text("part,label\n")
    desk_of = cloud.desk_of(root, None, Settings())
    desk_of.close()
    cloud.desk_of(root, None, Settings()).close()


# -- bounded


def test_a_full_desk_refuses_frames_and_keeps_those_that_wait_for_their_job(root):
    some = frames(20, size=1000)
    with Opened(root, work=False, desk_bytes=10_000) as desk:
        with pytest.raises(DeskFull, match="of 10000 bytes are taken"):
            put_all(desk, some)
        kept = [name for name in some if name not in desk.missing(list(some))]
        assert 5 <= len(kept) < 10
        assert not desk.put(kept[0], some[kept[0]]), "what is here already is acknowledged all the same"
        with pytest.raises(DeskFull):
            desk.start(JOB, {"frames": kept, "note": "x" * 3000})
        assert desk.job(JOB) is None
        assert desk.start(JOB, {"frames": kept})[1], "frames leave room for the job that is about them"
    assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file() and "desk" not in file.name) <= 10_000


def test_a_full_desk_forgets_the_oldest_ended_jobs_but_nothing_of_open_ones(root):
    first, second, third = (frames(4, size=1000, seed=seed) for seed in range(3))
    shared = next(iter(first))
    gate = threading.Event()

    def run(request, frame_of, judge, progress):
        assert request.get("note") != "wait" or gate.wait(10)
        return {"update": b"u" * 500 + request["note"].encode()}

    with Opened(root, run, desk_bytes=15_000) as desk:
        old, new, waiting = "00000001", "00000002", "00000003"
        desk.start(old, {"frames": put_all(desk, first), "note": "old"})
        updates = [ended(desk, old).result["update"]]
        desk.start(new, {"frames": put_all(desk, second), "note": "new"})
        updates.append(ended(desk, new).result["update"])
        desk.start(waiting, {"frames": [shared], "note": "wait"})
        put_all(desk, third)
        assert desk.job(old) is None
        assert desk.update(updates[0]) is None
        assert desk.missing(list(first)) == [name for name in first if name != shared]
        assert desk.job(new).status is JobStatus.DONE
        assert desk.update(updates[1])
        assert not desk.missing([*second, *third])
        gate.set()
        assert ended(desk, waiting).status is JobStatus.DONE
    assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file() and "desk" not in file.name) <= 15_000


def test_a_frame_that_no_job_has_named_for_a_week_goes_at_the_next_start(root):
    with Opened(root) as desk:
        old, named, young = put_all(desk, frames(3))
        desk.start(JOB, {"frames": [named]})
        ended(desk)
    for name in (old, named):
        os.utime(root / "frames" / name[:2] / name, (0, time.time() - 8 * 86_400))
    with Opened(root) as desk:
        assert desk.missing([old, named, young]) == [old]


def test_a_full_disk_is_said_and_changes_nothing(root, monkeypatch):
    ((name, data),) = frames(1).items()
    written = storage.write_atomic

    def full(file: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Opened(root) as desk:
        monkeypatch.setattr(storage, "write_atomic", full)
        with pytest.raises(DeskFull, match="No space left"):
            desk.put(name, data)
        with pytest.raises(DeskFull):
            desk.start(JOB, {})
        assert (desk.missing([name]), desk.job(JOB)) == ([name], None)
        monkeypatch.setattr(storage, "write_atomic", written)
        assert desk.put(name, data)
        assert desk.start(JOB, {"frames": [name]})[1]
        assert ended(desk).status is JobStatus.DONE
