"""What cannot be used is refused with exit code 2 and one line that says what, where, and what to do."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import cli_fakes
from cli_fakes import cell, flat, put, tree
from cli_run import command, environment, process, saec
from saec.fleet.ledger import read_verdicts
from saec.types import Label


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    cli_fakes.install(monkeypatch)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("data") / "parts")


@pytest.fixture(scope="module")
def station(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stations") / "bolt"
    found = process("fit", root, "--out", out)
    assert found.code == 0, found.err
    return out


def bomb(path: Path, side: int = 60_000) -> Path:
    """A PNG of a few kilobytes that claims 3.6 gigapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100_000)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def truncated(path: Path) -> Path:
    put(path, cell(77))
    path.write_bytes(path.read_bytes()[:300])
    return path


def empty(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def prose(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("no image at all")
    return path


def test_an_empty_folder(tmp_path, station):
    (tmp_path / "images").mkdir()
    line = saec("inspect", tmp_path / "images", "--station", station, "--out", tmp_path / "run").error()
    assert "no images found" in line
    assert str(tmp_path / "images") in line
    assert not (tmp_path / "run").exists()
    assert "no images found" in saec("fit", tmp_path / "images", "--out", tmp_path / "s").error()


@pytest.mark.parametrize(
    ("make", "why"),
    [(truncated, "truncated"), (empty, "empty"), (prose, "not an image"), (bomb, "more than the limit")],
)
def test_a_folder_of_unusable_images_is_recorded_part_by_part_and_refused(tmp_path, station, make, why):
    for name in ("a.png", "b.png", "c.png"):
        make(tmp_path / "images" / name)
    line = saec("inspect", tmp_path / "images", "--station", station, "--out", tmp_path / "run").error()
    assert "none of the 3 images could be read" in line
    verdicts = list(read_verdicts(tmp_path / "run" / "ledger.sqlite"))
    assert [v.part_id for v in verdicts] == ["a.png", "b.png", "c.png"]
    assert all(v.label is Label.UNREADABLE and why in v.error for v in verdicts)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["n"], summary["unreadable"]) == (3, 3)
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("make", [truncated, empty, bomb])
def test_one_unusable_image_among_others_does_not_end_the_run(tmp_path, station, make):
    flat(tmp_path / "images", 5)
    make(tmp_path / "images" / "0002x.png")
    found = saec("inspect", tmp_path / "images", "--station", station, "--out", tmp_path / "run", "--json")
    assert found.code == 0
    assert found.err == ""
    summary = json.loads(found.out)
    assert (summary["n"], summary["unreadable"]) == (6, 1)
    again = saec("inspect", tmp_path / "images", "--station", station, "--out", tmp_path / "run").out
    assert "nobody has looked at it" in again and "0002x.png: " in again


def test_a_missing_image_or_folder(tmp_path, station):
    line = saec("inspect", tmp_path / "nowhere", "--station", station, "--out", tmp_path / "run").error()
    assert "no such file or folder" in line


def test_one_product_without_good_images(tmp_path, root):
    shutil.copytree(root, tmp_path / "parts")
    put(tmp_path / "parts" / "nut" / "test" / "defect" / "0.png", cell(1, defect=True))
    line = saec("fit", tmp_path / "parts", "--out", tmp_path / "station").error()
    assert "product 'nut' has no good images" in line
    assert not (tmp_path / "station").exists()


def test_a_station_that_is_not_there_damaged_or_of_another_version(tmp_path, root, station):
    images = flat(tmp_path / "images", 2)

    def line(path: Path) -> str:
        return saec("inspect", images, "--station", path, "--out", tmp_path / "run").error()

    assert "station" in line(tmp_path / "nowhere")
    other = shutil.copytree(station, tmp_path / "other")
    file = next(path for path in other.iterdir() if path.suffix == ".json")
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    assert "damaged" in line(other)
    file.write_text(whole.replace("0.1.0", "9.9.9"))
    assert "another version" in line(other)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("edge.speed=11", "unknown setting: edge.speed"),
        ("speed=11", "not a setting: speed=11"),
        ("route.deadline_ms=soon", "bad setting"),
        ("calibration.escape=2", "bad setting"),
    ],
)
def test_an_unknown_or_impossible_setting(tmp_path, root, setting, said):
    line = saec("fit", root, "--out", tmp_path / "station", "--set", setting).error()
    assert said in line
    assert not (tmp_path / "station").exists()


def test_a_settings_file_that_is_no_toml(tmp_path, root):
    (tmp_path / "saec.toml").write_text("[route\nmode = 3")
    line = saec("fit", root, "--out", tmp_path / "station", "--config", tmp_path / "saec.toml").error()
    assert "not TOML" in line


def test_not_enough_defects_for_the_escape_rate_asked(tmp_path, root):
    line = saec("fit", root, "--out", tmp_path / "station", "--escape", "0.01").error()
    assert "not enough data: 12 defects can prove at best" in line
    assert not (tmp_path / "station").exists()


def test_a_cloud_address_that_does_not_answer(tmp_path, station):
    images = flat(tmp_path / "images", 2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    line = saec(
        "inspect", images, "--station", station, "--out", tmp_path / "run", "--cloud", f"http://127.0.0.1:{port}"
    ).error()
    assert "the cloud service does not answer" in line
    assert "--cloud off" in line
    assert not (tmp_path / "run").exists()
    line = saec("inspect", images, "--station", station, "--out", tmp_path / "run", "--cloud", "everywhere").error()
    assert "not an http address" in line
    assert "does not answer" in saec("cloud", "ping", f"http://127.0.0.1:{port}").error()


def test_a_station_without_expert_cannot_be_its_own_cloud(tmp_path, station):
    images = flat(tmp_path / "images", 2)
    line = saec("inspect", images, "--station", station, "--out", tmp_path / "run", "--cloud", "embedded").error()
    assert "no expert model" in line
    assert "--expert" in line
    assert "no expert model" in saec("cloud", "serve", "--station", station, "--port", "0").error()


def test_a_product_nobody_was_told_about(tmp_path, root, station):
    images = tmp_path / "images"
    put(images / "nut" / "good" / "1.png", cell(1))
    put(images / "bolt" / "good" / "1.png", cell(2))
    line = saec("inspect", images, "--station", station, "--out", tmp_path / "run").error()
    assert "does not know the product 'nut'" in line
    assert "it knows bolt" in line
    line = saec("inspect", images, "--station", station, "--out", tmp_path / "run", "--product", "screw").error()
    assert "does not know this product: screw" in line


def test_evaluating_on_training_or_calibration_images(tmp_path, root, station):
    for split in ("train", "calibration"):
        line = saec("evaluate", root / "bolt" / split, "--station", station, "--out", tmp_path / "run").error()
        assert "also used for" in line
        assert str(root / "bolt" / split) in line
    assert not (tmp_path / "run").exists()


def test_evaluating_without_labels_or_without_a_test_split(tmp_path, station):
    line = saec("evaluate", flat(tmp_path / "x", 3), "--station", station, "--out", tmp_path / "run").error()
    assert "no labelled parts" in line
    put(tmp_path / "bolt" / "train" / "good" / "1.png", cell(9001))
    line = saec("evaluate", tmp_path / "bolt", "--station", station, "--out", tmp_path / "run").error()
    assert "no test split" in line


def test_two_ways_at_once_and_a_gate_that_is_none(tmp_path, root, station):
    base = ("evaluate", root, "--station", station, "--out", tmp_path / "run")
    assert "choose one" in saec(*base, "--edge-only", "--cloud-only").error()
    assert "there is none" in saec(*base, "--cloud-only").error()
    assert "there is none" in saec("sweep", *base[1:]).error()
    assert "not a gate" in saec(*base, "--gate", "accuracy is fine").error()


def test_a_run_folder_inside_the_images_or_that_is_something_else(tmp_path, station):
    images = flat(tmp_path / "images", 2)
    assert "inside the images" in saec("inspect", images, "--station", station, "--out", images / "run").error()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    line = saec("inspect", images, "--station", station, "--out", tmp_path / "mine").error()
    assert "neither empty nor a run" in line


def test_a_report_of_what_is_no_run(tmp_path, station):
    assert "no such run folder" in saec("report", tmp_path / "nowhere").error()
    assert "unfinished or not a run" in saec("report", station).error()


def test_usage_errors_exit_with_2_as_well():
    assert saec("inspect").code == 2
    assert saec("fly").code == 2


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_was_recorded(tmp_path, station):
    """The run folder lies on a file system of half a megabyte."""
    images = flat(tmp_path / "images", 400)
    disk = tmp_path / "disk"
    disk.mkdir()
    args = ("inspect", images, "--station", station, "--out", disk / "run")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root; the next test does without")
    try:
        line = process(*args).error()
        assert "full" in line or "No space" in line
        kept = list(read_verdicts(disk / "run" / "ledger.sqlite"))
        assert 0 < len(kept) < 400
        assert all(v.label in (Label.GOOD, Label.DEFECT) for v in kept)
        subprocess.run(["mount", "-o", "remount,size=64m", "tmpfs", disk], check=True)
        found = process(*args, "--json")
        assert found.code == 0, found.err
        assert json.loads(found.out)["n"] == 400
        assert [v.part_id for v in read_verdicts(disk / "run" / "ledger.sqlite")][: len(kept)] == [
            v.part_id for v in kept
        ]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file sizes")
def test_a_ledger_that_cannot_grow_ends_the_run_in_one_line(tmp_path, station):
    """The same for users who may not mount: no file may grow beyond 150 kB."""
    images = flat(tmp_path / "images", 400)
    args = ("inspect", images, "--station", station, "--out", tmp_path / "run")

    def limit() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    found = subprocess.run(
        command(*args), capture_output=True, text=True, timeout=60, preexec_fn=limit, env=environment()
    )
    assert found.returncode == 2, found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert found.stderr.startswith("error: ")
    kept = len(list(read_verdicts(tmp_path / "run" / "ledger.sqlite")))
    assert 0 < kept < 400
    again = process(*args, "--json")
    assert json.loads(again.out)["n"] == 400


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_folder_without_permission(tmp_path, station):
    images = flat(tmp_path / "images", 2)
    (tmp_path / "locked").mkdir(mode=0o500)
    line = saec("inspect", images, "--station", station, "--out", tmp_path / "locked" / "run").error()
    assert "Permission denied" in line
