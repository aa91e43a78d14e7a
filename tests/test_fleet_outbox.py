"""The outbox keeps every frame until it is acknowledged, through kills, and refuses what it has no room for."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from saec.errors import BadInput
from saec.fleet.frame import frame_id
from saec.fleet.ledger import Ledger
from saec.fleet.outbox import Outbox, OutboxFull


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "outbox.sqlite"


def opened(path, most: int = 1000) -> Outbox:
    return Outbox(path, most_bytes=most)


def test_frames_wait_in_their_order_until_they_are_acknowledged(path):
    frames = [b"c", b"a", b"b"]
    with opened(path) as outbox:
        names = [outbox.put(data) for data in frames]
        assert names == [frame_id(data) for data in frames]
        assert outbox.pending() == names
        assert [outbox.read(name) for name in names] == frames
        outbox.acknowledge([names[0], "unknown"])
        assert (outbox.pending(), outbox.size) == (names[1:], 2)
        with pytest.raises(KeyError):
            outbox.read(names[0])
    with opened(path) as outbox:
        assert (outbox.pending(), outbox.size) == (names[1:], 2)


def test_frames_that_nobody_wants_to_go_up_any_more_go(path):
    with opened(path) as outbox:
        names = [outbox.put(data) for data in (b"a", b"bb", b"ccc")]
        outbox.keep_only([names[1], "unknown"])
        assert (outbox.pending(), outbox.size) == ([names[1]], 2)
        outbox.keep_only(())
        assert (outbox.pending(), outbox.size) == ([], 0)


def test_the_same_frame_waits_once(path):
    with opened(path) as outbox:
        assert outbox.put(b"frame") == outbox.put(b"frame")
        assert (len(outbox.pending()), outbox.size) == (1, 5)
        outbox.acknowledge(outbox.pending())
        outbox.put(b"frame")
        assert len(outbox.pending()) == 1


def test_a_full_outbox_refuses_what_is_new_and_keeps_all_that_waits(path):
    with opened(path, most=10) as outbox:
        first = outbox.put(b"123456")
        for again in range(2):
            with pytest.raises(OutboxFull, match="6 of 10 bytes wait, and 5 more do not fit"):
                outbox.put(b"%d2345" % again)
        assert outbox.put(b"123456") == first, "what waits already needs no room"
        outbox.put(b"1234")
        assert outbox.size == 10
        outbox.acknowledge([first])
        outbox.put(b"012345")
    with opened(path, most=10) as outbox, pytest.raises(OutboxFull):
        outbox.put(b"x")


def test_it_belongs_to_one_process_at_a_time(path):
    with opened(path), pytest.raises(BadInput, match="the outbox is in use by another run"):
        opened(path)
    opened(path).close()


def test_a_file_that_is_no_outbox_is_refused_and_left_alone(path):
    path.parent.mkdir()
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(BadInput, match="the outbox is damaged"):
        opened(path)
    path.unlink()
    Ledger(path).close()
    with pytest.raises(BadInput, match="not an outbox"):
        opened(path)
    with sqlite3.connect(path) as db:
        assert not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'frames'").fetchall()
    db.close()


def test_a_file_that_cannot_be_written_is_one_clear_line(path):
    path.mkdir(parents=True)
    with pytest.raises(BadInput, match="the outbox cannot be read or written"):
        opened(path)


def test_threads_may_put_and_acknowledge_at_once(path):
    with opened(path, most=10_000) as outbox:

        def work(thread: int) -> None:
            for number in range(20):
                name = outbox.put(b"%d/%d" % (thread, number))
                if number % 2:
                    outbox.acknowledge([name])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outbox.pending()) == 40
        assert outbox.size == sum(len(outbox.read(name)) for name in outbox.pending())


PUT_UNTIL_KILLED = """
import sys
from pathlib import Path
from saec.fleet.outbox import Outbox
outbox = Outbox(Path(sys.argv[1]), most_bytes=10**9)
number = 0
while True:
    name = outbox.put(b"%d" % number * 500)
    print("put", name, flush=True)
    if number % 3 == 0:
        outbox.acknowledge([name])
        print("acknowledged", name, flush=True)
    number += 1
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is a POSIX matter")
@pytest.mark.parametrize("lines", [1, 20, 61])
def test_kill_9_loses_no_frame_that_was_put_and_brings_none_back(path, lines):
    path.parent.mkdir()
    process = subprocess.Popen([sys.executable, "-c", PUT_UNTIL_KILLED, path], stdout=subprocess.PIPE, text=True)
    said = [process.stdout.readline().split() for _ in range(lines)]
    os.kill(process.pid, signal.SIGKILL)
    said += [line.split() for line in process.stdout.read().splitlines()]
    process.stdout.close()
    process.wait()
    put = [name for what, name in said if what == "put"]
    gone = {name for what, name in said if what == "acknowledged"}
    with opened(path, most=10**9) as outbox:
        waits = outbox.pending()
        assert [name for name in waits if name in put] == [n for n in put if n not in gone and n in waits]
        assert not set(waits) & gone
        # The last one may be on the disk, or acknowledged there, without having been told.
        assert len(set(waits) - set(put)) <= 1
        assert set(put) - gone - set(waits) <= {put[-1]}
        assert all(frame_id(outbox.read(name)) == name for name in waits)
