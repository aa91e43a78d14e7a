"""A run folder: finished or resumable, never wrong, never mixed up."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli_fakes import ExpertBackend, Station, cell, fit_station, flat, put, tree
from saec.cloud.embedded import EmbeddedClient
from saec.config import Settings
from saec.data.readers import read_dataset
from saec.errors import BadInput
from saec.evaluate import runner
from saec.evaluate.meter import Meter
from saec.evaluate.report_run import RunFolder
from saec.evaluate.runner import Outcome, run_parts
from saec.types import CloudClient, Label, Part, Verdict, Where

SETTINGS = Settings()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("data") / "parts")


@pytest.fixture(scope="module")
def station(root: Path) -> Station:
    return fit_station(read_dataset(root), SETTINGS)


@pytest.fixture(scope="module")
def expert() -> Iterator[CloudClient]:
    client = EmbeddedClient(ExpertBackend())
    yield client
    client.close()


@pytest.fixture
def parts(root: Path) -> list[Part]:
    return list(read_dataset(root).select(split="test"))


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edge that cannot be through with everything before Ctrl-C is noticed."""
    monkeypatch.setenv("FAKE_EDGE_S", "0.01")


def run(parts: Any, station: Station, out: Path, cloud: CloudClient | None = None, **more: Any) -> Outcome:
    return run_parts(parts, station, SETTINGS, cloud=cloud, out=out, meter=lambda: Meter(()), **more)


def stopping_after(count: int) -> Any:
    """A Ctrl-C of the user after so many parts."""
    seen = []

    def progress(verdict: Verdict, final: bool) -> None:
        seen.append(verdict)
        if len(seen) == count:
            raise KeyboardInterrupt

    return progress


def test_a_finished_run_holds_all_that_the_report_reads(tmp_path, parts, station, expert):
    outcome = run(parts, station, tmp_path / "run", expert, command=["inspect", "parts"], name="line 4")
    loaded = RunFolder.load(outcome.folder)
    assert loaded.name == "line 4"
    assert loaded.summary == outcome.summary
    assert len(loaded.verdicts) == len(parts) == outcome.stats.parts
    assert {v.where for v in loaded.verdicts} == {Where.EDGE, Where.CLOUD}
    assert all(loaded.heatmap(v).is_file() for v in loaded.verdicts)
    assert (outcome.folder / "report.html").is_file()
    assert loaded.manifest["mode"] == "cascade"
    assert loaded.manifest["station"]["sha256"] == station.manifest.sha256
    assert loaded.manifest["command"] == ["inspect", "parts"]
    assert loaded.manifest["heatmaps_failed"] == 0
    assert loaded.summary["calibration"]["products"]["bolt"]["statement"].startswith("Overkill: 12 good parts")
    assert loaded.summary["time"]["wall_s"] > 0
    assert loaded.summary["status"].keys() == {"energy"}


def test_repeating_a_finished_run_changes_nothing(tmp_path, parts, station, expert):
    first = run(parts, station, tmp_path / "run", expert)
    before = {p.name: p.read_bytes() for p in first.folder.iterdir() if p.suffix in (".json", ".jsonl", ".html")}
    again = run(parts, station, tmp_path / "run", expert)
    assert (again.stats.parts, again.stats.skipped, again.before) == (0, len(parts), len(parts))
    assert again.summary == first.summary
    assert {name: (first.folder / name).read_bytes() for name in before} == before


def test_an_interrupted_run_has_no_summary_and_the_resumed_one_equals_an_undisturbed_one(
    tmp_path, parts, station, expert, slowly
):
    whole = run(parts, station, tmp_path / "whole", expert)
    broken = run(parts, station, tmp_path / "run", expert, progress=stopping_after(5))
    assert broken.summary is None
    assert broken.stats.interrupted
    assert not (tmp_path / "run" / "manifest.json").exists()
    with pytest.raises(BadInput, match="unfinished"):
        RunFolder.load(tmp_path / "run")

    resumed = run(parts, station, tmp_path / "run", expert)
    assert resumed.before == broken.stats.parts < len(parts)
    left, right = RunFolder.load(tmp_path / "run"), RunFolder.load(tmp_path / "whole")
    assert [replace(v, timings_ms={}) for v in left.verdicts] == [replace(v, timings_ms={}) for v in right.verdicts]
    assert all(left.heatmap(v).read_bytes() == right.heatmap(v).read_bytes() for v in left.verdicts)
    assert resumed.summary is not None
    assert whole.summary is not None
    for key in ("n", "accuracy", "auroc", "confusion", "routing", "per_product", "uplink_bytes"):
        assert resumed.summary[key] == whole.summary[key]


def test_times_of_a_resumed_run_are_null_with_the_reason(tmp_path, parts, station, slowly):
    run(parts, station, tmp_path / "run", progress=stopping_after(3))
    summary = run(parts, station, tmp_path / "run").summary
    assert summary is not None
    assert summary["time"]["wall_s"] is None
    assert summary["memory"]["rss_mean_mb"] is None
    assert summary["energy"]["joules"] is None
    assert summary["status"]["time"] == summary["energy"]["detail"] == "the run was resumed: nobody measured all of it"
    assert summary["latency_ms"]["p50"] > 0  # every verdict carries its own


def test_new_images_are_added_to_a_finished_run(tmp_path, station):
    folder = flat(tmp_path / "images", 6)
    run(_plain(folder), station, tmp_path / "run")
    put(folder / "later.png", cell(900, defect=True))
    outcome = run(_plain(folder), station, tmp_path / "run")
    assert outcome.summary is not None
    assert (outcome.stats.parts, outcome.summary["n"]) == (1, 7)
    assert len(RunFolder.load(tmp_path / "run").verdicts) == 7


def test_a_name_recorded_with_other_content_is_refused_rather_than_skipped(tmp_path, station):
    folder = flat(tmp_path / "images", 4)
    run(_plain(folder), station, tmp_path / "run")
    put(folder / "0002.png", cell(901))
    with pytest.raises(BadInput, match=r"another image under this name: .*0002\.png \(pass another --out\)"):
        run(_plain(folder), station, tmp_path / "run")


def test_an_image_that_is_gone_keeps_its_verdict(tmp_path, station):
    parts = _plain(flat(tmp_path / "images", 4))
    run(parts, station, tmp_path / "run")
    parts[1].path.unlink()
    assert run(parts, station, tmp_path / "run").summary["n"] == 4


def test_an_unreadable_image_is_recorded_and_never_good(tmp_path, station):
    folder = flat(tmp_path / "images", 3)
    (folder / "broken.png").write_bytes((folder / "0000.png").read_bytes()[:200])
    (folder / "empty.png").touch()
    summary = run(_plain(folder), station, tmp_path / "run").summary
    assert summary["unreadable"] == 2
    verdicts = {v.part_id: v for v in RunFolder.load(tmp_path / "run").verdicts}
    assert verdicts["broken.png"].label is verdicts["empty.png"].label is Label.UNREADABLE
    assert "truncated" in verdicts["broken.png"].error
    assert "empty" in verdicts["empty.png"].error


def test_an_iterator_ends_by_ctrl_c_with_a_finished_run(tmp_path, parts, station, slowly):
    outcome = run(iter(parts), station, tmp_path / "run", progress=stopping_after(4))
    assert outcome.stats.interrupted
    assert outcome.summary is not None
    assert len(RunFolder.load(tmp_path / "run").verdicts) == outcome.summary["n"] < len(parts)


def test_a_source_without_a_part_still_makes_a_run(tmp_path, station):
    assert run(iter(()), station, tmp_path / "run").summary["n"] == 0


@pytest.mark.parametrize("stranger", ["file", "folder"])
def test_what_is_no_run_folder_is_left_alone(tmp_path, parts, station, stranger):
    out = tmp_path / "out"
    if stranger == "file":
        out.write_text("mine")
    else:
        put(out / "holiday.png", cell(1))
    with pytest.raises(BadInput, match=r"the run folder is a file|neither empty nor a run"):
        run(parts, station, out)
    assert out.is_file() or [p.name for p in out.iterdir()] == ["holiday.png"]


def test_a_run_of_another_station_or_other_settings_is_refused(tmp_path, parts, station, root):
    run(parts, station, tmp_path / "run")
    other = Settings.model_validate({"route": {"mode": "edge_only"}})
    with pytest.raises(BadInput, match="the run had other settings"):
        run_parts(parts, station, other, cloud=None, out=tmp_path / "run")
    refitted = fit_station(read_dataset(root), SETTINGS)
    refitted.models = {"edge": "blocks@other"}
    with pytest.raises(BadInput, match="begun with another station"):
        run(parts, refitted, tmp_path / "run")
    assert (tmp_path / "run" / "manifest.json").is_file()  # a refused call leaves the finished run finished


def test_a_product_that_the_station_does_not_know_is_refused_before_anything_is_judged(tmp_path, parts, station):
    parts[-1] = replace(parts[-1], product="nut")
    with pytest.raises(BadInput, match=r"does not know the product 'nut': .* \(it knows bolt"):
        run(parts, station, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_heatmap_that_cannot_be_written_costs_no_verdict(tmp_path, parts, station, monkeypatch):
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        outcome = run(parts, station, tmp_path / "run")
    assert outcome.summary["unreadable"] == 0
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["heatmaps_failed"] == len(parts)


def test_the_manifest_holds_no_secrets(tmp_path, parts, station):
    settings = Settings.model_validate({"cloud": {"token": "s3cret"}, "openai": {"api_key": "k3y"}})
    run_parts(parts[:2], station, settings, cloud=None, out=tmp_path / "run")
    text = (tmp_path / "run" / "manifest.json").read_text()
    assert "s3cret" not in text
    assert "k3y" not in text
    assert json.loads(text)["settings"]["cloud"]["token"] == "(hidden)"


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path, parts, station):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot make the run folder"):
        run(parts, station, tmp_path / "file" / "run")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_among_the_images_does_not_block_the_run(tmp_path, station):
    folder = flat(tmp_path / "images", 2)
    os.mkfifo(folder / "pipe.png")
    summary = run(_plain(folder), station, tmp_path / "run").summary
    assert (summary["n"], summary["unreadable"]) == (3, 1)


def test_a_run_killed_before_its_ledger_had_a_table_is_taken_up(tmp_path, parts, station):
    (tmp_path / "run" / "heatmaps").mkdir(parents=True)
    (tmp_path / "run" / "ledger.sqlite.lock").touch()
    assert run(parts[:2], station, tmp_path / "run").summary["n"] == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "ledger.sqlite").touch()
    assert runner.recorded(tmp_path / "other") == []
    assert run(parts, station, tmp_path / "other").summary["n"] == len(parts)


def test_recorded_is_empty_without_a_run(tmp_path):
    assert runner.recorded(tmp_path / "nothing") == []


def _plain(folder: Path) -> list[Part]:
    return [replace(part, product="bolt") for part in read_dataset(folder)]
