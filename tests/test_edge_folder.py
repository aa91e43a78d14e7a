"""Writing a folder in one step: a kill or a failure at any moment leaves the old one or the new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from saec.edge import folder
from saec.edge.folder import read_checked, read_index, write_folder
from saec.errors import BadInput

FILES = {"a/one.bin": b"1" * 5000, "b/two.bin": b"2" * 5000}

KILLED = """
import os, signal, sys
from pathlib import Path
from saec.edge import folder

path, moment = Path(sys.argv[1]), int(sys.argv[2])
steps = 0

def step(function):
    def counted(*args):
        global steps
        if steps == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1
        result = function(*args)
        if steps == moment and function is put:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return counted

put = folder.put_folder
os.fsync, folder.put_folder = step(os.fsync), step(put)
new = {"a/one.bin": b"new" * 4000, "c/three.bin": b"new" * 4000}
folder.write_folder(path, new, "index.json", {"format": 1, "state": "new"}, kind="thing")
"""


def write(path: Path, state: str = "old") -> None:
    write_folder(path, FILES, "index.json", {"format": 1, "state": state}, kind="thing")


def state_of(path: Path) -> str:
    """Which of the two folders lies there, after checking that it is whole."""
    state = read_index(path, "index.json", kind="thing", version=1)["state"]
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert names == {"index.json", *({"a/one.bin", "c/three.bin"} if state == "new" else FILES)}
    if state == "new":
        assert {(path / name).read_bytes() for name in names - {"index.json"}} == {b"new" * 4000}
    else:
        assert all((path / name).read_bytes() == data for name, data in FILES.items())
    return state


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux swaps two folders in one step")
@pytest.mark.parametrize("moment", range(5), ids=["first", "second", "index", "before the swap", "after the swap"])
def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path, moment):
    path = tmp_path / "thing"
    write(path)
    found = subprocess.run([sys.executable, "-c", KILLED, str(path), str(moment)], check=False, timeout=60)
    assert found.returncode == -9
    assert state_of(path) == ("new" if moment == 4 else "old")
    write(path, "old")
    assert state_of(path) == "old"


def test_without_a_swap_two_renames_do(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    write(tmp_path / "thing", "old")
    write(tmp_path / "thing", "older")
    assert state_of(tmp_path / "thing") == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_a_failing_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "thing"
    write(path)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BadInput, match=r"cannot write the thing: .*Input/output error"):
        write(path, "new")
    assert state_of(path) == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["thing"]


def test_every_file_is_on_the_disk_before_the_folder_is_in_its_place(tmp_path, monkeypatch):
    happened: list[str] = []
    put = folder.put_folder
    monkeypatch.setattr(os, "fsync", lambda descriptor: happened.append("sync"))
    monkeypatch.setattr(folder, "put_folder", lambda new, path: (happened.append("put"), put(new, path)))
    write(tmp_path / "thing")
    assert happened == ["sync"] * 3 + ["put"]


def test_a_file_that_is_not_the_saved_one_is_named(tmp_path):
    write(tmp_path / "thing")
    with pytest.raises(BadInput, match=r"not the one that was saved.*one\.bin"):
        read_checked(tmp_path / "thing", "a/one.bin", "0" * 64, kind="thing")
    with pytest.raises(BadInput, match=r"cannot be read.*none\.bin.*No such file"):
        read_checked(tmp_path / "thing", "a/none.bin", "0" * 64, kind="thing")


@pytest.mark.parametrize(
    "name", ["/tmp/saec-was-here", "../x", "a/../../x", "a//b", "a\\b", "C:x", "a\0", "", ".x", "a/.x", "a/"]
)
def test_a_name_that_leads_out_of_the_folder_is_neither_written_nor_read(tmp_path, name):
    write(tmp_path / "thing")
    for tried in (
        lambda: write_folder(tmp_path / "thing", {"ok": b"", name: b"x"}, "index.json", {"format": 1}, kind="thing"),
        lambda: read_checked(tmp_path / "thing", name, "0" * 64, kind="thing"),
    ):
        with pytest.raises(BadInput, match="outside of its folder"):
            tried()
    assert state_of(tmp_path / "thing") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["thing"]
