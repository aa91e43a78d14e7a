"""A state is all that a learning step may change; written and read again it is the same, and nothing else changes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from edge_parts import SETTINGS
from learn_parts import PRODUCT, fitted, new_parts
from learn_states import STRANGE, adapter, learnt, taught
from saec.data.decode import read_with_hash
from saec.edge import replay
from saec.edge.station import Station, folder_name, read_manifest
from saec.errors import BadInput
from saec.learn.detector import teach_product
from saec.learn.growth import Lesson
from saec.learn.state import LEARNT, State, adapter_state, station_state, write_adapter, write_station
from saec.learn.teaching import teach
from saec.vlm.trained import adapter_id, check_adapter


@pytest.fixture(scope="module")
def station(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "station"
    fitted().save(folder)
    return folder


@pytest.mark.parametrize(
    "other",
    [
        State({"a": np.zeros(4, np.float32)}, {"x": 2}),
        State({"a": np.zeros(4, np.float64)}, {"x": 1}),
        State({"a": np.zeros((2, 2), np.float32)}, {"x": 1}),
        State({"b": np.zeros(4, np.float32)}, {"x": 1}),
        State({"a": np.ones(4, np.float32)}, {"x": 1}),
        State({}, {"x": 1}),
    ],
)
def test_states_that_differ_in_anything_have_other_hashes(other):
    assert State({"a": np.zeros(4, np.float32)}, {"x": 1}).sha256 != other.sha256


def test_the_hash_is_that_of_the_values_not_of_their_place_in_memory():
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    one = State({"a": value, "s": np.array(1.0)}, {"x": 1, "y": 2})
    turned = State({"s": np.array(1.0), "a": np.asfortranarray(value)}, {"y": 2, "x": 1})
    assert one.sha256 == turned.sha256 == State({"a": value.astype(">f4"), "s": np.array(1.0)}, one.document).sha256


# -- adapters


def test_an_adapter_written_from_its_state_is_the_same_adapter(tmp_path):
    folder = adapter(tmp_path / "adapter")
    state = adapter_state(folder)
    write_adapter(state, tmp_path / "copy")
    check_adapter(tmp_path / "copy")
    assert adapter_state(tmp_path / "copy").sha256 == state.sha256
    assert adapter_id(tmp_path / "copy") == adapter_id(folder)
    assert state.tensors["base_model.model.projector.scale"].shape == ()
    assert not (tmp_path / "copy" / "MODEL_CARD.md").exists()


def test_the_record_and_the_images_of_a_training_run_above_its_adapter_belong_to_it(tmp_path):
    folder = adapter(tmp_path / "run" / "last")
    there = adapter_state(folder)
    for name in ("train.json", "trained_on.txt"):
        shutil.move(folder / name, folder.parent / name)
    assert adapter_state(folder).sha256 == there.sha256


def test_a_taught_adapter_names_the_images_that_taught_it(tmp_path):
    write_adapter(taught(adapter_state(adapter(tmp_path / "adapter"))), tmp_path / "new")
    lines = (tmp_path / "new" / "trained_on.txt").read_text().split()
    assert lines == [row.tobytes().hex() for row in learnt("a", "new 1")]


def test_a_folder_without_an_adapter_or_with_a_damaged_list_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no adapter here"):
        adapter_state(tmp_path)
    folder = adapter(tmp_path / "adapter")
    (folder / "trained_on.txt").write_text("no hash\n")
    with pytest.raises(BadInput, match="not a list of images"):
        adapter_state(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(BadInput, match="cannot be read"):
        adapter_state(folder)


def files_under(folder):
    return sorted(str(file) for file in folder.rglob("*"))


@pytest.mark.parametrize("name", STRANGE)
def test_a_state_whose_names_lead_elsewhere_is_never_written(station, tmp_path, name):
    of_adapter, of_product = adapter_state(adapter(tmp_path / "adapter")), station_state(station, PRODUCT)
    before = files_under(tmp_path.parent)
    for state in (of_adapter, of_product):
        more = State({**state.tensors, f"{name}/x": np.zeros(3, np.float32)}, state.document)
        for bad in (more, State(state.tensors, {**state.document, name: "owned"})):
            with pytest.raises(BadInput, match="has this name"):
                write_adapter(bad, tmp_path / "out")
            with pytest.raises(BadInput, match="has this name"):
                write_station(station, {PRODUCT: bad}, tmp_path / "out")
    assert files_under(tmp_path.parent) == before


@pytest.mark.parametrize("odd", [np.array(1), np.zeros((2, 31), np.uint8), np.zeros((2, 32), np.float32)])
def test_a_list_of_images_that_is_none_is_never_written(station, tmp_path, odd):
    for state, write in (
        (adapter_state(adapter(tmp_path / "adapter")), lambda state: write_adapter(state, tmp_path / "out")),
        (station_state(station, PRODUCT), lambda state: write_station(station, {PRODUCT: state}, tmp_path / "out")),
    ):
        with pytest.raises(BadInput, match="not a list of images"):
            write(State({**state.tensors, LEARNT: odd}, state.document))
    assert not (tmp_path / "out").exists()


# -- stations


def test_a_station_written_from_its_own_state_is_the_same_station(station, tmp_path):
    state = station_state(station, PRODUCT)
    write_station(station, {PRODUCT: state}, tmp_path / "copy")
    assert station_state(tmp_path / "copy", PRODUCT).sha256 == state.sha256
    assert Station.load(tmp_path / "copy", settings=SETTINGS).models == Station.load(station, settings=SETTINGS).models


def test_a_changed_product_is_written_and_all_else_stays_byte_for_byte(station, tmp_path):
    state = station_state(station, PRODUCT)
    tree = {**state.document["model.json"], "heat_threshold": 7.5}
    write_station(station, {PRODUCT: State(state.tensors, {"model.json": tree})}, tmp_path / "new")
    before, after = read_manifest(station).files, read_manifest(tmp_path / "new").files
    assert {name for name in after if after[name] != before.get(name)} == {f"{folder_name(PRODUCT)}/model.json"}
    assert Station.load(tmp_path / "new", settings=SETTINGS).model(PRODUCT).heat_threshold == 7.5


def test_images_that_taught_a_station_are_among_those_that_it_was_fitted_on(station, tmp_path):
    state = station_state(station, PRODUCT)
    old = read_manifest(station)
    more = {name: value for name, value in state.tensors.items() if name.startswith("replay/")}
    grown = {name: np.concatenate([value, value[:1]]) for name, value in more.items()}
    grown[LEARNT][-1:] = learnt("new")
    write_station(station, {PRODUCT: State({**state.tensors, **grown}, state.document)}, tmp_path / "new")
    new = read_manifest(tmp_path / "new")
    assert set(new.train_sha256) - set(old.train_sha256) == {learnt("new").tobytes().hex()}
    assert new.calibration_sha256 == old.calibration_sha256


def test_images_that_a_full_replay_has_dropped_stay_among_those_that_taught_the_station(station, tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 30)  # two more than the fit's own
    lessons = []
    for part in new_parts(tmp_path / "parts", 12):
        sha256, image = read_with_hash(part.path)
        lessons.append(Lesson(sha256, image, part.label))
    hashes = {lesson.sha256 for lesson in lessons}
    folder = station
    for version, some in ((1, lessons[:6]), (2, lessons[6:])):
        words = {"version": version, "previous": version - 1, "key": None, "provenance": {}}
        _, state = teach(folder, PRODUCT, some, SETTINGS, **words)
        folder = tmp_path / str(version)
        write_station(station, {PRODUCT: state}, folder)  # each time from the first: the state itself must know
    assert hashes <= set(read_manifest(folder).train_sha256)
    model = Station.load(folder, settings=SETTINGS).model(PRODUCT)
    assert len(model.replay) == 30
    with pytest.raises(BadInput, match="nothing to learn"):
        teach_product(model, lessons, SETTINGS)


def test_a_product_that_is_not_there_and_a_damaged_station_are_refused(station, tmp_path):
    with pytest.raises(BadInput, match="does not know this product"):
        station_state(station, "screw")
    shutil.copytree(station, tmp_path / "broken")
    (tmp_path / "broken" / folder_name(PRODUCT) / "memory.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="damaged"):
        station_state(tmp_path / "broken", PRODUCT)
