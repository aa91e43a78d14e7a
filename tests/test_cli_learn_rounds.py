"""``saec learn rounds`` refuses what cannot be used before it has spent a minute, and never mixes two runs."""

from __future__ import annotations

import json
import shutil

import pytest

from cli_run import saec
from edge_parts import blotted, defects, good_parts, put
from saec.cli import learn_rounds
from saec.cli.learn_plan import MADE, PLAN, STATION, changed, made_of
from saec.config import Settings, load_settings
from saec.errors import BadInput
from test_evaluate_report_learn import tree

CALL = ("--first", "plate", "--then", "ribbed", "--rounds", "2", "--parts", "4", "--backend", "expert")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for first, split in ((0, "train"), (100, "calibration"), (300, "test")):
        good_parts(root, 8, first=first, split=split)
        defects(root, 8, first=first, split=split)
    for number in range(16):
        put(root / "ribbed" / "test" / ("good" if number % 2 else "cut") / f"{number}.png", blotted(500 + number))
    return root


@pytest.fixture
def ran(monkeypatch):
    """The plans that got as far as the fit; nothing is fitted here."""
    plans = []

    def run(plan, fitting, stream, arms, settings, dials, out):
        plans.append(plan)
        (out / STATION).mkdir(exist_ok=True)
        return tree()

    monkeypatch.setattr(learn_rounds, "_run", run)
    return plans


def rounds(data, out, *more):
    return saec("learn", "rounds", data, "--out", out, *CALL, *more)


def test_rounds_go_on_with_the_settings_that_they_were_begun_with_and_with_no_others(data, tmp_path, ran):
    out = tmp_path / "out"
    assert rounds(data, out, "--set", "learn.samples=30").code == 0
    assert rounds(data, out, "--set", "learn.samples=30").code == 0
    said = rounds(data, out, "--set", "learn.samples=5").error()
    assert "other options: learn.samples was 30, now 5" in said
    assert "learn.samples was 30, now the default" in rounds(data, out).error()
    assert "seed was 2025, now 7" in rounds(data, out, "--set", "learn.samples=30", "--seed", "7").error()
    assert len(ran) == 2


def test_another_stream_under_the_same_name_is_noticed(data, tmp_path, ran):
    copy, out = tmp_path / data.name, tmp_path / "out"
    shutil.copytree(data, copy)
    assert rounds(copy, out).code == 0
    assert rounds(data, out).code == 0, "where the images lie does not matter"
    for at, image in enumerate((copy / "ribbed" / "test" / "good").iterdir()):
        put(image, blotted(900 + at))
    assert "stream was" in rounds(copy, out).error()


def test_rounds_of_a_version_that_kept_no_settings_are_not_gone_on_with(data, tmp_path, ran):
    out = tmp_path / "out"
    rounds(data, out)
    plan = json.loads((out / PLAN).read_text())
    del plan["settings"]
    (out / PLAN).write_text(json.dumps(plan))
    assert "an older version, which kept no settings" in rounds(data, out).error()


def test_a_corrected_command_is_not_held_to_what_was_refused(data, tmp_path, ran):
    out = tmp_path / "out"
    nowhere = tmp_path / "nope"
    assert "nope" in rounds(nowhere, out).error()
    assert "it has plate, ribbed" in rounds(data, out, "--then", "ribed").error()
    assert not out.exists()
    assert rounds(data, out).code == 0
    shutil.rmtree(out / STATION)  # nothing had come of it
    assert rounds(data, out, "--seed", "7").code == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--rounds", "1"), "--rounds"),
        (("--parts", "1"), "--parts"),
        (("--then", "plate"), "what changes?"),
        (("--first", "plait"), "it has plate, ribbed"),
        (("--first", "ribbed", "--then", "plate"), "no part is of a train or calibration split"),
        (("--rounds", "40"), "too few unseen parts"),
        (("--arms", "magic"), "no such arm"),
        (("--arms", ""), "no such arm"),
        (("--bytes", "nope.json"), "no such file: nope.json"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_fitted_or_written(data, tmp_path, ran, more, said):
    found = rounds(data, tmp_path / "out", *more)
    assert found.code == 2
    assert said in found.err
    assert "Traceback" not in found.err
    assert not ran
    assert not (tmp_path / "out").exists()


def test_a_benchmark_that_is_none_is_refused_at_once(data, tmp_path, ran):
    (tmp_path / "b.json").write_text('{"tables": []}')
    assert "not the tables of saec bench uplink" in rounds(data, tmp_path / "o", "--bytes", tmp_path / "b.json").error()
    assert not ran


def test_a_folder_that_cannot_hold_rounds_is_refused_in_one_line(data, tmp_path, ran):
    file, damaged, foreign = tmp_path / "file", tmp_path / "damaged", tmp_path / "foreign"
    file.write_text("")
    assert "cannot make the folder" in rounds(data, file).error()
    damaged.mkdir()
    (damaged / PLAN).write_text("{")
    assert "damaged record" in rounds(data, damaged).error()
    (foreign / STATION).mkdir(parents=True)
    assert "a station that no rounds have fitted" in rounds(data, foreign).error()
    assert not ran


def test_a_part_that_is_gone_is_refused_in_one_line(data, tmp_path, ran):
    copy = tmp_path / data.name
    shutil.copytree(data, copy)
    gone = next((copy / "plate" / "train" / "good").iterdir())
    gone.unlink()
    gone.symlink_to(tmp_path / "nowhere.png")
    assert "cannot be read" in rounds(copy, tmp_path / "out").error()
    assert not ran


def test_another_model_or_station_is_refused_by_name(tmp_path):
    made = made_of("loupe@int8", "a" * 64, tmp_path)
    assert made == made_of("loupe@int8", "a" * 64, tmp_path) == json.loads((tmp_path / MADE).read_text())
    with pytest.raises(BadInput, match="cloud was loupe@int8, now loupe@int4"):
        made_of("loupe@int4", "a" * 64, tmp_path)
    with pytest.raises(BadInput, match="station was aaaa"):
        made_of("loupe@int8", "b" * 64, tmp_path)


def test_a_plan_tells_the_settings_that_decide_and_no_secret():
    given = load_settings(overrides=["learn.keep=0.1", "cloud.token=s", "openai.api_key=s", "serve.port=1"], environ={})
    assert changed(given) == {"learn.keep": 0.1}
    assert changed(Settings()) == {}
