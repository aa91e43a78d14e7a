"""Profiles that devices wrote: quantiles of every quantity, wrapped numbers repaired, layers without times flagged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from saec.cli.vlm_compile import profile
from saec.errors import BadInput
from saec.vlm.compile.profile import read_profiles, repaired


def _genie(first_us: float, rate: float) -> dict[str, Any]:
    """A profile as genie-t2t-run writes it (Genie Profile, header 0.1.0)."""
    version = {"major": 0, "minor": 1, "patch": 0}
    query = {
        "type": "GenieDialog_query",
        "duration": 5726945,
        "start": 391863466531,
        "stop": 391869193476,
        "num-prompt-tokens": {"value": 823, "unit": ""},
        "time-to-first-token": {"value": first_us, "unit": "us"},
        "token-generation-rate": {"value": rate, "unit": "toks/sec"},
    }
    create = {"type": "GenieDialog_create", "duration": 1124864, "init-time": {"value": 1124713, "unit": "us"}}
    return {
        "header": {"header_version": version, "version": version, "artifact_type": "GENIE_PROFILE"},
        "metadata": {"timestamp": 391862341312},
        "components": [{"name": "dialog0", "type": "dialog", "events": [create, query]}],
    }


def _hub(**summary: Any) -> dict[str, Any]:
    """A profile as qai_hub's ``download_profile`` returns it."""
    layers = [
        {"name": "a", "type": "Conv", "compute_unit": "NPU", "execution_time": 0},
        {"name": "b", "type": "Gemm", "compute_unit": "NPU", "execution_time": 0},
        {"name": "c", "type": "Cast", "compute_unit": "CPU", "execution_time": 0},
    ]
    times = {"estimated_inference_time": 86_000, "all_inference_times": [86_000, 89_000, 94_000]}
    return {"execution_summary": times | {"compile_time": None} | summary, "execution_detail": layers}


def _written(folder: Path, *trees: Any) -> list[Path]:
    files = [folder / f"{number}.json" for number in range(len(trees))]
    for file, tree in zip(files, trees, strict=True):
        file.write_text(json.dumps(tree))
    return files


def test_runs_of_genie_are_summed_up(tmp_path: Path) -> None:
    found = read_profiles(_written(tmp_path, _genie(150_000, 40), _genie(170_000, 30), _genie(160_000, 38.5)))

    first = found.measured["query time-to-first-token"]
    assert (first.unit, first.runs, first.min, first.median, first.p90) == ("ms", 3, 150, 160, pytest.approx(168))
    rate = found.measured["query token-generation-rate"]
    assert (rate.unit, rate.min, rate.median) == ("tokens/s", 30, 38.5)
    assert found.measured["create init-time"].median == pytest.approx(1124.713)
    assert found.measured["query num-prompt-tokens"].median == 823
    assert found.source == "genie"


def test_an_ai_hub_profile_is_read_with_its_distribution_and_not_its_minimum(tmp_path: Path) -> None:
    found = read_profiles(_written(tmp_path, _hub(first_load_time=35_000_000, warm_load_time=310_000)))

    inference = found.measured["inference"]
    assert (inference.runs, inference.min, inference.median, inference.p90) == (3, 86, 89, pytest.approx(93))
    assert found.measured["first load"].median == 35_000
    assert "compile" not in found.measured
    assert found.layers == {"NPU": 2, "CPU": 1}


def test_a_minimum_alone_is_called_one(tmp_path: Path) -> None:
    found = read_profiles(_written(tmp_path, _hub(all_inference_times=[])))

    assert found.measured["inference"].runs == 1
    assert any("only the shortest" in note for note in found.notes)


def test_layers_whose_times_are_all_zero_are_flagged(tmp_path: Path) -> None:
    measured = _hub()
    measured["execution_detail"][0]["execution_time"] = 12

    assert any("all 3 layers are 0" in note for note in read_profiles(_written(tmp_path, _hub())).notes)
    assert not read_profiles(_written(tmp_path, measured)).notes


def test_memory_that_lost_its_sign_gets_it_back(tmp_path: Path) -> None:
    summary = {
        "inference_memory_increase_range": [2**64 - 4_000_000, 2_658_496],
        "estimated_inference_peak_memory": 540_000_000,
    }

    found = read_profiles(_written(tmp_path, _hub(**summary)))

    assert found.measured["inference memory increase low"].median == pytest.approx(-4)
    assert found.measured["inference memory increase high"].median == pytest.approx(2.658496)
    assert found.measured["estimated inference peak memory"].median == 540
    assert sum("without its sign" in note for note in found.notes) == 1


@pytest.mark.parametrize(
    ("stored", "meant"),
    [(2**64 - 1, -1), (2**64 - 2**40, -(2**40)), (2**32 - 4096, -4096), (2**32, 2**32), (4e9, 4e9), (2**40, 2**40)],
)
def test_only_figures_at_the_end_of_the_range_are_wrapped(stored: float, meant: float) -> None:
    assert repaired(stored) == (meant, meant < 0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[]", "neither a profile"),
        ('{"components": []}', "nothing was measured"),
        ('{"components": [{"name": "dialog0"}]}', "damaged.*events"),
        ('{"execution_summary": {"all_inference_times": ["fast"]}}', "damaged"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "p.json").write_text(content)

    with pytest.raises(BadInput, match=said):
        read_profiles([tmp_path / "p.json"])


def test_profiles_of_two_tools_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="do not add up"):
        read_profiles(_written(tmp_path, _genie(1, 1), _hub()))


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(profile)
    (file,) = _written(tmp_path, _hub())

    table = CliRunner().invoke(app, [str(file)])
    tree = json.loads(CliRunner().invoke(app, [str(file), "--json"]).output)

    assert "2 NPU, 1 CPU" in table.output
    assert "89" in table.output
    assert tree["measured"]["inference"]["p90"] == pytest.approx(93)
