"""A station on the disk: the same after loading, proven whole, and safe whatever its products are called."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import saec
from edge_parts import SETTINGS, blotted, dataset, defects, good_parts, plate, station
from saec.edge.fit import fit_station
from saec.edge.folder import write_folder
from saec.edge.station import EXPERT, INDEX, Station, folder_name, read_manifest, station_files
from saec.errors import BadInput
from saec.types import Label


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "station"
    station().save(path)
    return path


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "station")


def refusal(path: Path) -> str:
    """The one line that says why a station is not loaded."""
    with pytest.raises(BadInput) as caught:
        Station.load(path, settings=SETTINGS)
    line = str(caught.value)
    assert "\n" not in line
    assert path.name in line
    assert len(line) < 500
    return line


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def resealed(path: Path, **changes: object) -> None:
    """Change the index as a program would that knows how to seal it."""
    tree = json.loads((path / INDEX).read_text())
    del tree["sha256"]
    files = contents(path)
    del files[INDEX]
    write_folder(path, files, INDEX, tree | changes, kind="station")


# -- round trip


def test_a_loaded_station_says_what_the_saved_one_said(saved):
    loaded = Station.load(saved, settings=SETTINGS)
    assert loaded.products == ("plate",)
    assert loaded.models == station().models
    assert loaded.manifest == station().manifest
    assert loaded.calibration("plate") == station().calibration("plate")
    assert loaded.policy("plate") == station().policy("plate")
    assert loaded.fusion("plate") == station().fusion("plate")
    assert np.array_equal(loaded.references("plate")[0], station().references("plate")[0])
    for image in (plate(600), blotted(1), plate(601, size=(97, 230))):
        one, other = station().predict(image, "plate"), loaded.predict(image, "plate")
        assert other.score == pytest.approx(one.score, abs=1e-5)
        assert replace(other, heatmap=None) == replace(one, heatmap=None)
        assert np.allclose(one.heatmap, other.heatmap, atol=1e-5)


def test_a_station_saved_again_is_the_same_bytes(saved, tmp_path):
    Station.load(saved, settings=SETTINGS).save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


def test_a_station_can_be_saved_over_itself(copied):
    before = contents(copied)
    Station.load(copied, settings=SETTINGS).save(copied)
    assert contents(copied) == before


def test_the_folder_holds_safetensors_json_and_a_picture_and_every_hash(saved):
    files = contents(saved)
    names = {"memory.safetensors", "model.json", "reference.png", "replay.safetensors"}
    assert set(files) == {INDEX, *(f"plate/{name}" for name in names)}
    index = json.loads(files.pop(INDEX))
    assert index["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert index["version"] == saec.__version__
    assert len(index["train_sha256"]) == len(set(index["train_sha256"])) == 12
    assert index["calibration_sha256"] == index["train_sha256"]  # scored in folds
    assert read_manifest(saved) == station().manifest


def test_the_identity_of_a_station_is_its_content_not_its_date():
    manifest = station().manifest
    assert replace(manifest, created="2001-01-01T00:00:00+00:00", version="9").sha256 == manifest.sha256
    changed = dict(manifest.files) | {"plate/model.json": "0" * 64}
    assert replace(manifest, files=changed).sha256 != manifest.sha256


def test_an_unknown_product_is_one_line_that_names_the_known_ones():
    with pytest.raises(BadInput, match=r"does not know this product: nut \(it knows plate\)"):
        station().predict(plate(0), "nut")


def test_routing_settings_change_the_policy_and_nothing_else():
    other = station().with_route(SETTINGS.route.model_copy(update={"mode": "cloud_only"}))
    assert other.policy("plate").mode == "cloud_only"
    assert other.fusion("plate") is None
    assert other.models == station().models
    assert station().policy("plate").mode == "cascade"


def test_threads_that_share_a_station_get_what_one_gets():
    images = [plate(600 + number) for number in range(8)]
    alone = [station().predict(image, "plate").score for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: station().predict(image, "plate").score, images * 3))
    assert together == pytest.approx(alone * 3, abs=1e-5)


# -- damage


def test_any_damaged_byte_of_any_file_is_noticed(copied):
    for name, whole in contents(copied).items():
        for at in np.random.default_rng(0).integers(0, len(whole), 8):
            bad = bytearray(whole)
            bad[at] ^= 0x10
            if name == INDEX and json_of(bytes(bad)) == json.loads(whole):
                continue  # white space
            (copied / name).write_bytes(bytes(bad))
            refusal(copied)
        (copied / name).write_bytes(whole)
    Station.load(copied, settings=SETTINGS)


def json_of(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


@pytest.mark.parametrize("name", [INDEX, "plate/memory.safetensors", "plate/model.json", "plate/reference.png"])
@pytest.mark.parametrize("keep", [0, 40, -1], ids=["empty", "cut", "a byte short"])
def test_a_truncated_file_is_noticed(copied, name, keep):
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[:keep])
    assert "damaged" in refusal(copied)


@pytest.mark.parametrize("name", ["plate/memory.safetensors", "plate/model.json", "plate/reference.png"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    line = refusal(copied)
    assert "damaged" in line
    assert name in line


def test_no_station_says_how_to_make_one(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none", tmp_path, tmp_path / "file"):
        assert "no station here" in refusal(path)


def test_a_station_of_another_format_is_refused(copied):
    for format_ in (3, 0, None, "1"):
        resealed(copied, format=format_)
        assert f"format {format_}, this version reads 2" in refusal(copied)


def test_a_station_of_another_backbone_is_refused(copied):
    resealed(copied, detector="memory efficientnet-lite2@000000000000")
    line = refusal(copied)
    assert "fitted with memory efficientnet-lite2@000000000000" in line
    assert "this version carries efficientnet-lite2@" in line


@pytest.mark.parametrize(
    "changes",
    [
        {"products": ["plate", "nut"]},
        {"products": []},
        {"products": "plate"},
        {"files": {}},
        {"files": {"../../etc/hostname": "0" * 64}},
        {"detector": "classifier x"},
        {"surplus": 1},
        {"train_sha256": None},
    ],
    ids=str,
)
def test_an_index_that_makes_no_sense_is_refused_even_if_it_is_sealed(copied, changes):
    resealed(copied, **changes)
    assert "damaged" in refusal(copied)


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", "[" * 100_000, '{"format": 1}', "\ud800".encode(errors="surrogatepass")]
)
def test_an_index_that_is_no_index_is_refused(copied, text):
    (copied / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    refusal(copied)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("plate/model.json", b"[]"),
        ("plate/model.json", b"{}"),
        ("plate/model.json", b"not json"),
        ("plate/memory.safetensors", b"\x80\x04K\x01."),
        ("plate/reference.png", b"no picture"),
    ],
)
def test_a_file_of_another_kind_is_refused_even_if_its_hash_is_right(copied, name, data):
    (copied / name).write_bytes(data)
    files = json.loads((copied / INDEX).read_text())["files"]
    resealed(copied, files=files | {name: hashlib.sha256(data).hexdigest()})
    assert "damaged" in refusal(copied)


# -- saving


def test_saving_over_what_is_no_station_is_refused_and_leaves_it(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"y")
    for path in (photos, tmp_path / "file"):
        with pytest.raises(BadInput, match="this exists and is not a saved station"):
            station().save(path)
    assert contents(tmp_path) == {"photos/holiday.jpg": b"x", "file": b"y"}


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "station"):
        station().save(path)
        assert Station.load(path, settings=SETTINGS).products == ("plate",)


@pytest.mark.parametrize("number", range(4))
def test_a_full_disk_leaves_the_old_station_and_no_rubbish(copied, monkeypatch, number):
    before = contents(copied)
    calls = []

    def full(_descriptor: int) -> None:
        calls.append(1)
        if len(calls) > number:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match=r"cannot write the station: .*No space left on device"):
        station().save(copied)
    assert contents(copied) == before
    assert [path.name for path in copied.parent.iterdir()] == ["station"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="cannot write the station"):
        station().save(tmp_path / "file" / "station")


# -- product names

HOSTILE = (
    "../x",
    "..",
    ".",
    "/etc/passwd",
    "a/b",
    "a\\b",
    " ",
    "x" * 400,
    "Schraube ß",
    "螺丝",
    "nul\0byte",
    "a\nb",
    "not utf-8 \udcff",
    INDEX,
    EXPERT,
)


def test_hostile_product_names_stay_inside_the_station(tmp_path):
    model = station()._products["plate"]
    models = dict.fromkeys(HOSTILE, model)
    files = {name: hashlib.sha256(data).hexdigest() for name, data in station_files(models).items()}
    assert len(files) == 4 * len(HOSTILE)
    manifest = replace(station().manifest, products=HOSTILE, files=files)
    Station(models, manifest).save(tmp_path / "deep" / "station")
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["station"]
    assert not (tmp_path / "deep" / "station" / EXPERT).exists()
    loaded = Station.load(tmp_path / "deep" / "station", settings=SETTINGS)
    score = station().predict(plate(3), "plate").score
    assert loaded.products == HOSTILE
    assert all(loaded.predict(plate(3), name).score == pytest.approx(score, abs=1e-5) for name in HOSTILE)


@given(st.sets(st.text(min_size=1, max_size=12), min_size=2, max_size=8))
@settings(deadline=None, max_examples=100)
def test_different_products_have_different_safe_folders(products):
    names = {folder_name(product) for product in products}
    assert len(names) == len(products)
    for name in names:
        assert Path(name).name == name
        assert name not in ("", ".", "..", INDEX, EXPERT)
        assert name.isascii()
        assert len(name) < 100


def test_plain_names_are_kept():
    assert [folder_name(name) for name in ("screw", "part-12_b", "M3.5")] == ["screw", "part-12_b", "M3.5"]


def test_a_station_of_two_products_keeps_them_apart(tmp_path):
    both = fit_station(
        dataset(
            tmp_path,
            good_parts(tmp_path, 4, product="a b"),
            good_parts(tmp_path, 4, first=50, product="a_b"),
            defects(tmp_path, 2, product="a_b"),
        ),
        SETTINGS,
    )
    both.save(tmp_path / "station")
    loaded = Station.load(tmp_path / "station", settings=SETTINGS)
    assert loaded.products == both.products == ("a b", "a_b")
    for product in both.products:
        one, other = both.predict(plate(0), product), loaded.predict(plate(0), product)
        assert one.score == pytest.approx(other.score, abs=1e-5)
    assert loaded.predict(plate(0), "a b").score != loaded.predict(plate(0), "a_b").score
    assert loaded.calibration("a b").n_defect == 0
    assert loaded.calibration("a_b").n_defect == len(dataset(tmp_path, defects(tmp_path, 2)).select(label=Label.DEFECT))
