"""One whole version counts, whatever happens: kills, full disks, damage, two at once; and every change can go back."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saec.errors import BadInput
from saec.fleet import slots as slots_module
from saec.fleet.slots import POINTER, SLOTS, Slots, Version, current_folder

KILLED = Path(__file__).with_name("slots_killed.py")
FILES = ("a/weights", "b/weights", "index")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "station"
    folder.mkdir()
    (folder / "index").write_text("fitted")
    return folder


def write(folder: Path, version: int) -> None:
    (folder / "index").write_text(str(version))


def put(root: Path, version: int) -> Path:
    slots = Slots(root)
    with slots.alone():
        slots.stage(lambda folder: write(folder, version))
        return slots.switch(version, f"{version:08}")


def test_a_plain_folder_is_its_own_version_and_stays_untouched(root):
    assert current_folder(root) == root
    assert Slots(root).pointer.current == Version(0)
    assert [path.name for path in root.iterdir()] == ["index"]
    put(root, 1)
    assert (root / "index").read_text() == "fitted"


def test_what_was_staged_counts_only_after_the_switch(root):
    slots = Slots(root)
    slots.stage(lambda folder: write(folder, 1))
    assert slots.current() == root
    assert slots.switch(1, "abcdef0123") == slots.current() == root / SLOTS / "1-abcdef01"
    assert (slots.current() / "index").read_text() == "1"


def test_back_goes_to_the_version_before_and_then_to_the_plain_folder(root):
    put(root, 1)
    put(root, 2)
    slots = Slots(root)
    assert slots.back() == Version(1, "00000001")
    assert (slots.current() / "index").read_text() == "1"
    assert slots.back() == Version(0)
    assert slots.current() == root
    with pytest.raises(BadInput, match="nothing to take back"):
        slots.back()


def test_two_versions_are_kept_and_the_history_tells_of_all(root):
    for version in (1, 2, 3):
        put(root, version)
    assert {path.name for path in (root / SLOTS).iterdir() if path.is_dir()} == {"2-00000002", "3-00000003"}
    Slots(root).back()
    assert [(e["what"], e["version"]) for e in Slots(root).pointer.history] == [
        ("applied", 1),
        ("applied", 2),
        ("applied", 3),
        ("taken back", 3),
    ]


def test_a_version_never_comes_twice_not_even_after_it_was_taken_back_or_refused(root):
    put(root, 1)
    slots = Slots(root)
    slots.back()
    slots.stage(lambda folder: None)
    with pytest.raises(BadInput, match="version 1 is not above 1"):
        slots.switch(1, "00000001")
    slots.refuse(2, "00000002", {"after": 0.5})
    assert slots.current() == root
    assert slots.pointer.highest == 2
    assert not (root / SLOTS / ".staged").exists()


def test_the_mark_changes_with_the_pointer_and_with_nothing_else(root):
    slots = Slots(root)
    marks = [slots.mark()]
    put(root, 1)
    marks.append(slots.mark())
    slots.stage(lambda folder: None)
    assert slots.mark() == marks[-1]
    slots.back()
    marks.append(slots.mark())
    assert len(set(marks)) == 3


def test_one_process_at_a_time_may_change_the_slots(root):
    code = (
        "import sys, pathlib; from saec.fleet.slots import Slots; Slots(pathlib.Path(sys.argv[1])).alone().__enter__()"
    )
    command = [sys.executable, "-c", code, str(root)]
    with Slots(root).alone():
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "cannot be changed now" in found.stderr
    assert subprocess.run(command, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text("{"),
        lambda file: file.write_text("[]"),
        lambda file: file.write_text(file.read_text().replace('"version": 1', '"version": 0')),
        lambda file: file.write_text(file.read_text().replace('"seal"', '"soul"')),
    ],
)
def test_a_damaged_pointer_is_told_and_not_guessed_at(root, damage):
    put(root, 1)
    damage(root / SLOTS / POINTER)
    with pytest.raises(BadInput, match="the versions are damaged"):
        current_folder(root)


def test_a_version_that_is_gone_is_told(root):
    folder = put(root, 1)
    folder.rename(root / "elsewhere")
    with pytest.raises(BadInput, match="is gone"):
        current_folder(root)


@pytest.mark.parametrize("at", range(12))
def test_a_disk_that_refuses_at_any_step_leaves_one_whole_version_and_the_next_try_works(root, monkeypatch, at):
    put(root, 1)
    steps = {"left": at}

    def failing(real):
        def call(*arguments, **words):
            steps["left"] -= 1
            if steps["left"] < 0:
                raise OSError(28, "No space left on device")
            return real(*arguments, **words)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(Path, "rename", failing(Path.rename))
        patch.setattr(Path, "replace", failing(Path.replace))
        patch.setattr(slots_module, "sync_folder", failing(slots_module.sync_folder))
        failed = False
        try:
            put(root, 2)
        except OSError:
            failed = True
    version = Slots(root).pointer.current.version
    assert failed or version == 2
    assert (current_folder(root) / "index").read_text() == str(version)
    put(root, 3)
    assert (current_folder(root) / "index").read_text() == "3"


def whole(root: Path) -> int:
    """The version that counts, after checking that every file of it is whole."""
    version = Slots(root).pointer.current.version
    folder = current_folder(root)
    if version:
        assert {(folder / name).read_text() for name in FILES} == {f"{version}\n" * 2000}
    else:
        assert (folder / "index").read_text() == "fitted"
    return version


def test_a_kill_at_any_moment_leaves_one_whole_version(root):
    lot = random.Random(0)
    told = reached = 0
    for _ in range(25):
        with subprocess.Popen([sys.executable, str(KILLED), str(root)], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            first = child.stdout.readline()  # it is at work
            time.sleep(lot.uniform(0, 0.05))
            child.kill()
            told = max([told, *(int(line) for line in (first, *child.stdout))])
        whole(root)
        reached = Slots(root).pointer.highest
        assert reached in (told, told + 1)
    assert reached >= 25
    put(root, reached + 1)
    assert len([path for path in (root / SLOTS).iterdir() if path.is_dir()]) <= 2
