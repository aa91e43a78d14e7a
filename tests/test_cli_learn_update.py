"""saec learn diff, apply, rollback, versions: by hand what rounds do by themselves, with exit codes for scripts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cli_run import saec
from edge_parts import SETTINGS, defects, good_parts
from learn_parts import PRODUCT, desk_of, fitted
from learn_states import adapter, naming, taught
from saec.edge.head import fit_edge_head
from saec.edge.replay import Replay
from saec.edge.station import Station
from saec.evaluate.bench_update import Way, bench_update
from saec.evaluate.probe import AdapterProbe
from saec.evaluate.report_words import percent
from saec.fleet.slots import current_folder
from saec.learn.state import State, adapter_state, station_state, write_adapter, write_station
from saec.learn.teaching import state_of_model
from saec.types import Evidence, Observation, Opinion


@pytest.fixture
def station(tmp_path) -> Path:
    fitted().save(tmp_path / "station")
    return tmp_path / "station"


def changed(station: Path, out: Path, *, tau: float) -> Path:
    """The same station with another threshold: at 0 everything is a defect."""
    state = station_state(station, PRODUCT)
    model = json.loads(json.dumps(state.document["model.json"]))
    model["calibration"]["thresholds"]["tau_edge"] = tau
    write_station(station, {PRODUCT: State(state.tensors, {"model.json": model})}, out)
    return out


@pytest.fixture
def key(tmp_path) -> Path:
    (tmp_path / "key").write_text("token\n")
    return tmp_path / "key"


def test_a_station_is_updated_and_taken_back_by_hand(station, key, tmp_path):
    new = changed(station, tmp_path / "new", tau=0.51)
    made = saec("learn", "diff", station, new, "-o", tmp_path / "u", "--key-file", key, "--json")
    assert made.code == 0
    assert json.loads(made.out)["bytes"] == (tmp_path / "u").stat().st_size < 5000
    done = saec("learn", "apply", tmp_path / "u", "-s", station, "--key-file", key)
    assert done.code == 0
    assert "Version 1 counts now; on the probe set" in done.out
    assert Station.load(station, settings=SETTINGS).calibration(PRODUCT).thresholds.tau_edge == 0.51
    assert "What was fitted counts again." in saec("learn", "rollback", "-s", station).out
    assert Station.load(station, settings=SETTINGS).calibration(PRODUCT).thresholds.tau_edge == 0.5
    history = json.loads(saec("learn", "versions", "-s", station, "--json").out)
    assert history["current"] == 0
    assert [entry["what"] for entry in history["history"]] == ["applied", "taken back"]
    assert "taken back" in saec("learn", "versions", "-s", station).out


@pytest.mark.parametrize("labelled", [True, False])
def test_an_update_that_is_worse_on_the_probe_set_is_dropped_with_exit_code_1(station, tmp_path, labelled):
    new = changed(station, tmp_path / "new", tau=0.0)
    assert saec("learn", "diff", station, new, "-o", tmp_path / "u").code == 0
    good_parts(tmp_path / "probe", 3, first=300)
    defects(tmp_path / "probe", 3, first=300)
    probe = ["--probe", tmp_path / "probe"] if labelled else []
    done = saec("learn", "apply", tmp_path / "u", "-s", station, *probe)
    assert done.code == 1
    assert "it was dropped" in done.err
    assert current_folder(station) == station
    assert "was here already" in saec("learn", "apply", tmp_path / "u", "-s", station).error()


@pytest.fixture
def headed(station, tmp_path) -> Path:
    """A station with a head: bank scores that say nothing, pooled features that tell good from bad."""
    model = fitted().model(PRODUCT)
    rng, bad = np.random.default_rng(0), np.arange(60) < 25
    rows = Replay.of(
        [f"{number:064x}" for number in range(60)],
        list(rng.normal(size=(60, model.replay.pooled.shape[1])) + 2 * bad[:, None]),
        [Observation(float(score), None) for score in rng.normal(size=60)],
        [0.3] * 60,
        list(bad.astype(float)),
        [math.nan] * 60,
        list(range(60)),
    )
    head, score = fit_edge_head(rows.bank, rows.pooled.astype(float), rows.p_defect)
    rows = replace(rows, score=score)
    calibration = rows.calibrated(SETTINGS.calibration, cross_fitted=True)
    taught = replace(model, head=head, replay=rows, calibration=calibration)
    write_station(station, {PRODUCT: state_of_model(PRODUCT, taught)}, tmp_path / "headed")
    return tmp_path / "headed"


def test_what_an_update_says_of_itself_does_not_count_on_the_probe_set(headed, tmp_path):
    base = station_state(headed, PRODUCT)
    turned = {n: -v for n, v in base.tensors.items() if n.startswith("head/")}
    bad = State({**base.tensors, **turned}, base.document)
    write_station(headed, {PRODUCT: bad}, tmp_path / "new")
    assert saec("learn", "diff", headed, tmp_path / "new", "-o", tmp_path / "u").code == 0
    done = saec("learn", "apply", tmp_path / "u", "-s", headed)
    assert done.code == 1
    assert "it was dropped" in done.err
    assert current_folder(headed) == headed


@pytest.mark.parametrize("what", ["others", "strange", "none"])
def test_the_probe_set_is_what_the_station_remembers_whatever_an_update_remembers(headed, tmp_path, what):
    base = station_state(headed, PRODUCT)
    own = {n: v for n, v in base.tensors.items() if n.startswith("replay/")}
    new = {
        "others": {**own, "replay/sha256": own["replay/sha256"] ^ 255},
        "strange": {**own, "replay/score": -own["replay/score"], "replay/p_defect": 1 - own["replay/p_defect"]},
        "none": {n: v[:0] for n, v in own.items()},
    }[what]
    write_station(headed, {PRODUCT: State({**base.tensors, **new}, base.document)}, tmp_path / "new")
    assert saec("learn", "diff", headed, tmp_path / "new", "-o", tmp_path / "u").code == 0
    done = json.loads(saec("learn", "apply", tmp_path / "u", "-s", headed, "--json").out)
    assert (done["kept"], done["after"], done["bank_measured"]) == (True, done["before"], True)
    assert done["before"] > 0.9


def test_a_bank_that_changed_is_said_not_to_be_measured_without_images(station, tmp_path):
    base = station_state(station, PRODUCT)
    bank = {"0.bank": base.tensors["0.bank"][::-1].copy(), "0.weight": base.tensors["0.weight"][::-1].copy()}
    write_station(station, {PRODUCT: State({**base.tensors, **bank}, base.document)}, tmp_path / "new")
    assert saec("learn", "diff", station, tmp_path / "new", "-o", tmp_path / "u").code == 0
    said = " ".join(saec("learn", "apply", tmp_path / "u", "-s", station).out.split())
    assert "the bank's own change is not measured: pass --probe" in said


def test_a_head_that_is_not_a_number_or_does_not_fit_never_counts(headed, tmp_path):
    base = station_state(headed, PRODUCT)
    weights = base.tensors["head/weights"]
    for number, (value, code) in enumerate(((np.full_like(weights, np.nan), 1), (weights[:-1].copy(), 2))):
        new = tmp_path / f"new-{number}"
        write_station(headed, {PRODUCT: State({**base.tensors, "head/weights": value}, base.document)}, new)
        assert saec("learn", "diff", headed, new, "-o", tmp_path / "u").code == 0
        assert saec("learn", "apply", tmp_path / "u", "-s", headed).code == code
        assert current_folder(headed) == headed


def test_what_must_not_be_applied_is_refused_with_exit_code_2(station, key, tmp_path):
    new = changed(station, tmp_path / "new", tau=0.51)
    saec("learn", "diff", station, new, "-o", tmp_path / "u", "--key-file", key)
    data = (tmp_path / "u").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-9])
    (tmp_path / "empty").write_text("")
    assert "no key to check it" in saec("learn", "apply", tmp_path / "u", "-s", station).error()
    assert "cut off" in saec("learn", "apply", tmp_path / "cut", "-s", station, "--key-file", key).error()
    assert "another base" in saec("learn", "apply", tmp_path / "u", "-s", new, "--key-file", key).error()
    assert "key is empty" in saec("learn", "apply", tmp_path / "u", "-s", new, "--key-file", tmp_path / "empty").error()
    assert "cannot read" in saec("learn", "apply", tmp_path / "none", "-s", station).error()
    assert "nothing named" in saec("learn", "rollback").error()
    assert "nothing to take back" in saec("learn", "rollback", "-s", station).error()


@pytest.mark.parametrize("where", ["absolute", "up"])
@pytest.mark.parametrize("of", ["adapter", "station"])
def test_an_update_writes_no_file_outside_of_what_it_updates(station, tmp_path, where, of):
    victim = tmp_path / "victim.txt"
    name = str(victim) if where == "absolute" else "../../../victim.txt"
    if of == "adapter":
        root = adapter(tmp_path / "adapter")
        base, target = adapter_state(root), "adapter"
    else:
        root, base, target = station, station_state(station, PRODUCT), f"product:{PRODUCT}"
    (tmp_path / "u").write_bytes(naming(base, target, document=name))
    assert "must not be applied" in saec("learn", "apply", tmp_path / "u", f"--{of}", root).error()
    assert not list(tmp_path.rglob("victim*"))
    assert current_folder(root) == root


def test_versions_of_an_untaught_station_and_adapter_say_that_nothing_was_applied(station, tmp_path):
    for named in (("-s", station), ("--adapter", adapter(tmp_path / "adapter"))):
        found = saec("learn", "versions", *named)
        assert (found.code, found.out) == (0, "Nothing applied yet: what was fitted counts.\n")
        assert json.loads(saec("learn", "versions", *named, "--json").out) == {"current": 0, "history": []}


@pytest.mark.parametrize("command", [("versions",), ("rollback",), ("apply", "u")])
def test_a_folder_that_is_not_what_its_option_says_is_refused_and_left_alone(station, tmp_path, command):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "predictions.jsonl").write_text("")
    (tmp_path / "u").write_bytes(naming(station_state(station, PRODUCT), f"product:{PRODUCT}", document="model.json"))
    call = ("learn", command[0], *(tmp_path / name for name in command[1:]))
    assert "no station here" in saec(*call, "--station", tmp_path / "run").error()
    assert "no station here" in saec(*call, "--station", adapter(tmp_path / "adapter")).error()
    assert "no station here" in saec(*call, "--station", tmp_path / "nowhere").error()
    assert "no adapter here" in saec(*call, "--adapter", station).error()
    assert "no adapter here" in saec(*call, "--adapter", tmp_path / "run").error()
    both = saec(*call, "--station", station, "--adapter", tmp_path / "adapter").error()
    assert ("makes the maps of --probe" if command[0] == "apply" else "two things") in both
    assert not list(tmp_path.rglob("slots"))


def test_a_rollback_of_nothing_leaves_nothing(station):
    assert "nothing to take back" in saec("learn", "rollback", "-s", station).error()
    assert not (station / "slots").exists()


def test_an_update_that_cannot_be_made_is_one_line(station, tmp_path):
    new = changed(station, tmp_path / "new", tau=0.51)
    root = adapter(tmp_path / "adapter")
    u = ("-o", tmp_path / "u")
    assert "nothing to send" in saec("learn", "diff", station, station, *u).error()
    assert "nothing to send" in saec("learn", "diff", root, root, *u).error()
    assert "an adapter's changes" in saec("learn", "diff", station, new, *u, "--probe", tmp_path / "nope").error()
    assert "no such folder" in saec("learn", "diff", station, new, "-o", tmp_path / "nowhere" / "u").error()
    assert "this is a folder" in saec("learn", "diff", station, new, "-o", tmp_path).error()
    assert "no adapter here" in saec("learn", "diff", tmp_path, new, *u).error()
    assert "no products" in saec("learn", "diff", root, root, *u, "--product", "x").error()
    assert not (tmp_path / "u").exists()


def test_a_file_that_is_no_update_is_called_so(station, tmp_path):
    (tmp_path / "u.json").write_text("{}")
    told = saec("learn", "apply", tmp_path / "u.json", "-s", station).error()
    assert "no update (not a frame)" in told
    assert "pass what saec learn diff or the cloud made" in told


def test_percentages_are_written_as_elsewhere(station, tmp_path):
    new = changed(station, tmp_path / "new", tau=0.51)
    made = saec("learn", "diff", station, new, "-o", tmp_path / "u")
    assert "in its tensor's units" in made.out
    done = saec("learn", "apply", tmp_path / "u", "-s", station)
    rate = percent(json.loads(saec("learn", "versions", "-s", station, "--json").out)["history"][0]["after"])
    assert f"on the probe set {rate}" in done.out
    assert rate in saec("learn", "versions", "-s", station).out


def test_a_taught_adapter_in_its_run_is_compressed_by_its_gradients(tmp_path):
    root = adapter(tmp_path / "adapter")
    new = taught(adapter_state(root))
    write_adapter(new, tmp_path / "run" / "last")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    floats = {name: value for name, value in new.tensors.items() if "lora" in name}
    moments = {f"{n}|exp_avg_sq": np.full(v.shape, "lora_B" in n, np.float32) for n, v in floats.items()}
    save_file(moments, checkpoint / "optimizer.safetensors")
    assert saec("learn", "diff", root, tmp_path / "run" / "last", "-o", tmp_path / "u").code == 0
    assert saec("learn", "apply", tmp_path / "u", "--adapter", root).code == 0
    before, after = adapter_state(root).tensors, adapter_state(current_folder(root)).tensors
    assert {name for name in floats if not np.array_equal(before[name], after[name])} == {
        name for name in floats if "lora_B" in name
    }


def test_an_adapter_is_updated_by_its_most_important_changes(tmp_path):
    root = adapter(tmp_path / "adapter")
    write_adapter(taught(adapter_state(root)), tmp_path / "new")
    made = saec("learn", "diff", root, tmp_path / "new", "-o", tmp_path / "u", "--set", "learn.keep=0.1", "--json")
    figures = json.loads(made.out)
    assert figures["target"] == "adapter"
    assert figures["bytes"] < figures["dense_bytes"]
    assert saec("learn", "apply", tmp_path / "u", "--adapter", root).code == 0
    assert len(adapter_state(current_folder(root)).tensors["replay/sha256"]) == 2


class PullsTogether:
    """A model whose answer is how far its adapter has gone the taught one's way."""

    model_id = "pulled"

    def __init__(self, old: State, new: State) -> None:
        self._old, self._way, self._p = old, {n: v - old.tensors[n] for n, v in new.tensors.items() if "lora" in n}, 0.0

    def swap_adapter(self, folder: Path | None) -> None:
        assert folder is not None
        now = adapter_state(folder).tensors
        gone = sum(float(np.sum((now[n] - self._old.tensors[n]) * way)) for n, way in self._way.items())
        self._p = min(1.0, 0.5 * gone / sum(float(np.sum(way * way)) for way in self._way.values()))

    def judge(self, queries):
        return [Opinion(self._p, Evidence(), "pulled") for _ in queries]


def test_what_is_sent_is_amplified_until_the_adapter_answers_about_the_desks_parts_as_the_taught_one(
    tmp_path, monkeypatch
):
    root = adapter(tmp_path / "adapter")
    old = adapter_state(root)
    write_adapter(taught(old), tmp_path / "new")
    model = PullsTogether(old, adapter_state(tmp_path / "new"))
    monkeypatch.setattr("saec.cli.learn_diff.mllm_backend", lambda settings: model)
    desk, _ = desk_of(tmp_path)
    few = ("learn", "diff", root, tmp_path / "new", "--set", "learn.keep=0.2")
    plain, louder = saec(*few, "-o", tmp_path / "plain"), saec(*few, "--desk", desk, "-o", tmp_path / "louder")
    assert "not amplified: pass --desk or --probe" in plain.out
    assert "not amplified" not in louder.out
    assert (tmp_path / "louder").stat().st_size < (tmp_path / "plain").stat().st_size + 200
    assert saec("learn", "apply", tmp_path / "louder", "--adapter", root).code == 0
    model.swap_adapter(current_folder(root))
    assert model._p == pytest.approx(0.5, abs=0.15)
    assert "no desk with opinions" in saec(*few, "--desk", tmp_path, "-o", tmp_path / "u").error()


class Taught:
    """A model that is right as often as its adapter's weights are near those that were taught."""

    model_id = "taught"

    def __init__(self, wanted: State) -> None:
        self._wanted, self._off = wanted, 0.0

    def swap_adapter(self, folder: Path | None) -> None:
        assert folder is not None
        now = adapter_state(folder)
        self._off = sum(float(np.abs(now.tensors[n].astype(float) - v).max()) for n, v in self._wanted.tensors.items())

    def judge(self, queries):
        p = [0.9 if query.part_id.startswith("defect") else 0.1 for query in queries]
        return [Opinion(value + (0.5 - value) * min(1.0, self._off), Evidence(), "taught") for value in p]


def test_the_bench_holds_every_way_to_compress_against_the_dense_update(tmp_path):
    root = adapter(tmp_path / "adapter")
    new = taught(adapter_state(root), by=0.05)
    write_adapter(new, tmp_path / "new")
    parts = [*good_parts(tmp_path, 2), *defects(tmp_path, 2)]
    probe = AdapterProbe(Taught(new), parts, SETTINGS, None)
    ways = [*(Way(keep, 8, "magnitude") for keep in (0.05, 1.0)), Way(0.05, 8, "sensitivity")]  # of gradients unknown
    dense, none, little, much = bench_update(root, tmp_path / "new", probe, ways, answers=probe).rows
    assert (dense["same label"], dense["mean |ΔP|"]) == ("100.0%", 0.0)
    assert 0 == none["bytes"] < little["bytes"] < much["bytes"] < dense["bytes"]
    assert none["mean |ΔP|"] > much["mean |ΔP|"]


def test_an_adapter_is_asked_about_the_same_parts_once(tmp_path):
    old = adapter_state(adapter(tmp_path / "adapter"))
    new = taught(old)
    model = Taught(new)
    asked = []
    judge = model.judge
    model.judge = lambda queries: asked.extend(queries) or judge(queries)
    probe = AdapterProbe(model, good_parts(tmp_path, 3), SETTINGS, None)
    first = probe.p_of(new)
    assert np.array_equal(first, probe.p_of(new))
    assert len(asked) == 3
    assert not np.array_equal(first, probe.p_of(old))  # another one is asked
    assert len(asked) == 6
