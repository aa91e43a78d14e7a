"""The commands around a run: help, settings, data sets, the cloud service, benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

import cli_fakes
from cli_fakes import cell, put, tree
from cli_run import command, environment, saec
from cloud_fakes import service_process
from data_trees import ksdd, ksdd2, mvtec
from saec import __version__
from saec.config import Settings


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    cli_fakes.install(monkeypatch)


def test_help_is_there_at_once_and_loads_nothing_heavy():
    code = (
        "import sys, saec.cli\n"
        "try: saec.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'cv2', 'onnxruntime', 'fastapi', 'httpx', 'pydantic', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    begun = time.monotonic()
    found = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=30)
    assert found.returncode == 0, found.stderr
    assert "Usage: saec" in found.stdout
    assert time.monotonic() - begun < 2  # 0.2 s on a quiet machine


def test_the_module_runs_as_the_command():
    found = subprocess.run([sys.executable, "-m", "saec", "--version"], capture_output=True, text=True, timeout=30)
    assert found.stdout == f"saec {__version__}\n"


COMMANDS = [
    *(("demo",), ("fit",), ("inspect",), ("evaluate",), ("sweep",), ("report",), ("config", "show")),
    *(("data", name) for name in ("elpv", "mvtec-holdout", "ksdd2", "ksdd", "folder", "sft", "verify")),
    *(("cloud", name) for name in ("serve", "ping")),
    *(("bench", name) for name in ("scene", "pipeline", "cloud")),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_and_its_options(words):
    found = saec(*words, "--help")
    assert found.code == 0
    assert f"saec {' '.join(words)}" in found.out.replace("\n", " ")


def test_config_show_names_every_setting_with_its_meaning():
    found = saec("config", "show")
    for section, model in Settings().model_dump().items():
        for key in model:
            assert f"{section}.{key}" in found.out
    tree = json.loads(saec("config", "show", "--json").out)
    assert all(entry["meaning"] for fields in tree.values() for entry in fields.values())


def test_config_show_marks_what_was_changed_and_hides_secrets(tmp_path, monkeypatch):
    (tmp_path / "saec.toml").write_text("[route]\ndeadline_ms = 50\n")
    monkeypatch.setenv("SAEC_CLOUD__TOKEN", "s3cret")
    found = saec("config", "show", "--config", tmp_path / "saec.toml", "--set", "edge.threads=1")
    assert "50.0 *" in found.out
    assert "1 *" in found.out
    assert "(hidden) *" in found.out
    assert "s3cret" not in found.out
    assert "no such section" in saec("config", "show", "rooute").error()


def test_a_holdout_is_built_counted_and_proven_disjoint(tmp_path):
    source = mvtec(tmp_path / "mvtec")
    found = saec("data", "mvtec-holdout", source, tmp_path / "holdout", "--n-good", "4", "--n-defect", "4")
    assert found.code == 0
    assert str(tmp_path / "holdout") in found.out
    counts = json.loads(
        saec("data", "mvtec-holdout", source, tmp_path / "holdout", "--n-good", "4", "--n-defect", "4", "--json").out
    )["counts"]
    assert sum(product["test"].get("good", 0) for product in counts.values()) == 4
    train = source / "bolt" / "train"
    assert saec("data", "verify", tmp_path / "holdout", train).code == 0
    assert (
        "the output folder holds another data set"
        in saec("data", "mvtec-holdout", source, tmp_path / "holdout", "--n-good", "3").error()
    )


@pytest.mark.parametrize(("name", "make"), [("ksdd", ksdd), ("ksdd2", ksdd2)])
def test_the_kolektor_sets_are_built(tmp_path, name, make):
    found = saec("data", name, make(tmp_path / "source"), tmp_path / "out", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["counts"]


def test_own_folders_are_split_and_one_set_proves_itself(tmp_path):
    for i in range(10):
        put(tmp_path / "mine" / "good" / f"{i}.png", _own(i))
        put(tmp_path / "mine" / "defect" / f"{i}.png", _own(100 + i))
    assert saec("data", "folder", tmp_path / "mine", tmp_path / "split", "--train", "0.6").code == 0
    found = saec("data", "verify", tmp_path / "split", "--json")
    assert json.loads(found.out)["disjoint"] is True
    assert saec("data", "sft", tmp_path / "split", tmp_path / "sft").code == 0
    assert (tmp_path / "sft" / "train.jsonl").is_file()


def test_an_image_on_both_sides_fails_the_proof_with_exit_code_1(tmp_path):
    put(tmp_path / "a" / "1.png", _own(1))
    put(tmp_path / "b" / "1.png", _own(1))
    found = saec("data", "verify", tmp_path / "a", tmp_path / "b")
    assert found.code == 1
    assert found.err.startswith("gate failed: 1 overlaps; the first is the same image twice: ")
    assert len(found.err.splitlines()) == 1


def test_a_built_set_that_was_touched_fails_its_proof(tmp_path):
    for i in range(8):
        put(tmp_path / "mine" / "good" / f"{i}.png", _own(i))
    assert saec("data", "folder", tmp_path / "mine", tmp_path / "split").code == 0
    victim = next((tmp_path / "split").rglob("*.png"))
    put(victim, _own(999))
    found = saec("data", "verify", tmp_path / "split")
    assert found.code == 1
    assert "was changed" in found.err


def _own(number: int) -> cli_fakes.Image:
    from data_trees import picture

    return picture(number)


def test_a_cloud_service_is_served_pinged_asked_and_stopped(tmp_path):
    """Two processes, as on a line: the service behind a token, the edge that asks it."""
    root = tree(tmp_path / "parts", other=14)
    assert saec("fit", root, "--out", tmp_path / "station", "--expert").code == 0
    (tmp_path / "token").write_text("s3cret\n")
    ready = tmp_path / "ready.json"
    serving = subprocess.Popen(
        command("cloud", "serve", "-s", tmp_path / "station", "--port", "0", "--token-file", tmp_path / "token",
                "--ready-file", ready),
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        give_up = time.monotonic() + 30
        while not ready.exists():
            assert serving.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.02)
        url = json.loads(ready.read_text())["url"]
        token = ("--set", "cloud.token=s3cret")
        assert "expert-fake, ready" in saec("cloud", "ping", url, *token).out
        assert "refuses the token" in saec("cloud", "ping", url).error()
        found = saec(
            "evaluate", root, "-s", tmp_path / "station", "-o", tmp_path / "run", "--cloud", url, *token, "--json"
        )
        summary = json.loads(found.out)
        assert summary["routing"]["cloud"] > 0
        assert summary["routing"]["fallback"] == 0
        assert summary["uplink_bytes"] > 0
    finally:
        serving.terminate()
        _, err = serving.communicate(timeout=30)
    assert serving.returncode == 0
    assert err.splitlines() == [f"serving expert-fake at {url}"]


def test_a_token_file_must_hold_a_token(tmp_path):
    (tmp_path / "token").write_text("\n")
    line = saec("cloud", "serve", "--backend", "openai", "--token-file", tmp_path / "token").error()
    assert "the token file is empty" in line
    assert "cannot read the token" in saec("cloud", "serve", "--token-file", tmp_path / "none").error()
    assert "needs its station" in saec("cloud", "serve").error()


def test_the_scene_benchmark_prints_a_table_and_saves_json(tmp_path):
    put(tmp_path / "images" / "1.png", cell(1))
    found = saec("bench", "scene", "--images", tmp_path / "images", "--rounds", "2", "--json", tmp_path / "b.json")
    assert "transcription_ms" in found.out
    saved = json.loads((tmp_path / "b.json").read_text())
    assert saved["tables"][0]["rows"][0]["images"] == 1
    assert saved["environment"]["cpus"] >= 1


def test_the_pipeline_benchmark_runs(tmp_path):
    found = saec(
        "bench", "pipeline", "--parts", "20", "--edge-ms", "1", "--cloud-ms", "2", "--repeats", "1", "--json", "-"
    )
    rows = json.loads(found.out)["tables"][0]["rows"]
    assert [row["run"] for row in rows][-1] == "cascade"


def test_the_cloud_benchmark_asks_a_running_service(tmp_path):
    with service_process(tmp_path) as (_, url):
        found = saec("bench", "cloud", url, "--concurrency", "1,2", "--seconds", "0.2", "--limit", "2", "--json", "-")
    speed, batches = json.loads(found.out)["tables"]
    assert [row["concurrency"] for row in speed["rows"]] == [1, 2]
    assert all(row["answered"] > 0 for row in speed["rows"])
    assert batches["rows"]
    assert "not a list of sizes" in saec("bench", "cloud", "http://127.0.0.1:9", "--concurrency", "1,none").error()


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("saec.config.load_settings", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        saec("config", "show")
