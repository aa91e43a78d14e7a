"""Files that arrive in a folder: each is taken once, complete, and what is not taken is counted."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from saec.cli.watch import Watcher, product_chooser
from saec.errors import BadInput
from saec.types import Part


class Stopped(Exception):
    pass


class Folder:
    """A watched folder whose time stands still between the looks."""

    def __init__(self, root: Path, **recorded: set[str]) -> None:
        self.root = root
        self.now = 0.0
        self.watcher = Watcher(
            root, lambda path: "bolt", recorded, poll_s=1.0, patience_s=3.0, sleep=self._sleep, clock=lambda: self.now
        )
        self._looks = 0

    def put(self, name: str, content: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(content)

    def look(self, times: int = 1) -> list[str]:
        """Let the watcher look so many times; return the ids of what it took."""
        self._looks = times
        taken: list[Part] = []
        with suppress(Stopped):
            taken.extend(self.watcher.parts())
        return [part.part_id for part in taken]

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        self._looks -= 1
        if self._looks == 0:
            raise Stopped


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_a_file_is_taken_once_it_has_stopped_growing(folder):
    folder.put("a.png", "half")
    assert folder.look() == []
    folder.put("a.png", "half and more")
    assert folder.look() == []
    assert folder.look() == ["a.png"]
    assert folder.look(5) == []


def test_files_in_subfolders_keep_their_path(folder):
    folder.put("line1/cam2/a.png", "x")
    assert folder.look(2) == ["line1/cam2/a.png"]


def test_several_arrivals_are_taken_in_order(folder):
    for name in ("c.png", "a.png", "b.png"):
        folder.put(name, name)
    assert folder.look(2) == ["a.png", "b.png", "c.png"]


def test_hidden_files_and_folders_are_work_in_progress(folder):
    folder.put(".a.png", "x")
    folder.put(".tmp/b.png", "x")
    assert folder.look(3) == []
    assert not folder.watcher.skipped


def test_a_name_with_new_content_is_a_new_part(folder):
    folder.put("latest.png", "first")
    assert folder.look(2) == ["latest.png"]
    folder.put("latest.png", "second, longer")
    assert folder.look(2) == ["latest.png@2"]
    folder.put("latest.png", "third, still longer")
    assert folder.look(2) == ["latest.png@3"]


def test_a_file_that_was_only_touched_is_not_inspected_again(folder):
    folder.put("a.png", "same")
    assert folder.look(2) == ["a.png"]
    (folder.root / "a.png").touch()
    assert folder.look(3) == []


def test_what_the_run_has_recorded_is_known_by_its_content(tmp_path):
    import hashlib

    def sha256(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    recorded = {"a.png": {sha256("one")}, "a.png@2": {sha256("two")}, "b.png": {sha256("bee")}}
    folder = Folder(tmp_path, **recorded)
    folder.put("a.png", "two")
    folder.put("b.png", "bee")
    assert folder.look(3) == []
    folder.put("a.png", "three")
    folder.put("b.png", "beetle")
    assert folder.look(2) == ["a.png@3", "b.png@2"]


def test_an_empty_file_is_given_time_to_be_filled(folder):
    folder.put("slow.png", "")
    assert folder.look(2) == []
    folder.put("slow.png", "filled")
    assert folder.look(2) == ["slow.png"]


def test_a_file_that_stays_empty_is_taken_to_be_recorded_as_unreadable(folder):
    folder.put("dead.png", "")
    assert folder.look(3) == []
    assert folder.look(2) == ["dead.png"]


def test_what_is_not_taken_is_counted_once(folder):
    told = []
    folder.watcher.on_skip = lambda: told.append(1)
    folder.put("notes.txt", "x")
    folder.put("gone.png", "x")
    assert folder.look() == []
    (folder.root / "gone.png").unlink()
    assert folder.look(3) == []
    assert folder.watcher.skipped == {"no image": 1, "gone before it was complete": 1}
    assert len(told) == 2


def test_a_watched_folder_that_goes_away_ends_the_run(folder):
    folder.look()
    shutil.rmtree(folder.root)
    with pytest.raises(BadInput, match="the watched folder is gone"):
        folder.look()


def test_only_a_folder_can_be_watched(tmp_path):
    with pytest.raises(BadInput, match="no such folder to watch"):
        Watcher(tmp_path / "nowhere", lambda path: "bolt", {})


def test_the_product_is_the_one_named_the_only_one_or_the_first_folder():
    assert product_chooser(["bolt", "nut"], "nut")(Path("x/1.png")) == "nut"
    assert product_chooser(["bolt"], None)(Path("x/1.png")) == "bolt"
    assert product_chooser(["bolt", "nut"], None)(Path("nut/1.png")) == "nut"
    with pytest.raises(BadInput, match="does not know this product: screw"):
        product_chooser(["bolt", "nut"], "screw")
