"""Applying: a good update counts whole, a bad one is refused or dropped, and the version at work is never in danger."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from learn_states import KEY, MOST, adapter, taught, update
from saec.errors import BadInput
from saec.fleet.slots import Slots, current_folder
from saec.learn.apply import Applied, apply_update
from saec.learn.delta import compress
from saec.learn.state import State, adapter_state, write_adapter
from saec.learn.update import ADAPTER, Refused, Update, encode_update


@pytest.fixture
def root(tmp_path):
    return adapter(tmp_path / "adapter")


def put(root: Path, data: bytes, **words) -> Applied:
    return apply_update(root, data, key=KEY, most=MOST, **words)


def state_at(root: Path) -> str:
    return adapter_state(current_folder(root)).sha256


def next_update(root: Path, version: int) -> tuple[bytes, str]:
    """An update for the version that counts now."""
    base = adapter_state(current_folder(root))
    delta = compress(base, taught(base, seed=version), keep=0.1, bits=4)
    new = delta.apply(base).sha256
    previous = Slots(root).pointer.current.version
    return encode_update(Update(ADAPTER, base.sha256, new, version, previous, delta), KEY), new


def test_what_counts_after_applying_is_bit_for_bit_what_the_cloud_validated(root):
    plain = state_at(root)
    data, new = update(root, 1)
    done = put(root, data)
    assert done == Applied(1, current_folder(root), None, None, kept=True)
    assert state_at(root) == new.sha256
    assert adapter_state(root).sha256 == plain  # the plain folder is untouched


def test_updates_follow_each_other_and_each_can_be_taken_back(root):
    plain = state_at(root)
    one, first = next_update(root, 1)
    put(root, one)
    two, second = next_update(root, 2)
    put(root, two)
    assert state_at(root) == second
    Slots(root).back()
    assert state_at(root) == first
    Slots(root).back()
    assert state_at(root) == plain


def test_a_replayed_an_older_and_a_skipped_update_are_refused(root):
    data, _ = update(root, 2)
    put(root, data)
    for late in (data, update(root, 1)[0]):
        with pytest.raises(Refused, match="version 2 was here already"):
            put(root, late)
    with pytest.raises(Refused, match="continues version 0, here is version 2"):
        put(root, update(root, 3)[0])
    Slots(root).back()
    with pytest.raises(Refused, match="was here already"):
        put(root, data)
    assert put(root, update(root, 3)[0]).kept


def test_an_update_for_another_base_leaves_everything_as_it_was(root, tmp_path):
    data, _ = update(adapter(tmp_path / "other", seed=9), 1)
    plain = state_at(root)
    with pytest.raises(Refused, match="another base"):
        put(root, data)
    assert state_at(root) == plain
    assert Slots(root).pointer.highest == 0


@pytest.mark.parametrize(("after", "kept"), [(0.90, True), (0.896, True), (0.89, False), (0.0, False)])
def test_a_version_that_is_worse_on_the_probe_set_is_dropped_within_one_probe_run(root, after, kept):
    asked: list[Path] = []

    def probe(folder: Path) -> float:
        asked.append(folder)
        return 0.9 if folder == root else after

    plain = state_at(root)
    data, new = update(root, 1)
    done = put(root, data, probe=probe, tolerance=0.005)
    assert (done.before, done.after, done.kept) == (0.9, after, kept)
    assert state_at(root) == (new.sha256 if kept else plain)
    assert len(asked) == 2
    entry = Slots(root).pointer.history[-1]
    assert (entry["what"], entry["before"], entry["after"]) == ("applied" if kept else "refused", 0.9, after)
    with pytest.raises(Refused, match="was here already"):
        put(root, data)


@pytest.mark.parametrize("accuracy", [float("nan"), float("inf"), -0.1])
def test_a_probe_that_measures_nothing_lets_nothing_pass(root, accuracy):
    plain = state_at(root)
    data, _ = update(root, 1)
    for probe in (lambda folder: accuracy, lambda folder: 0.9 if folder == root else accuracy):
        with pytest.raises(Refused, match="measures nothing"):
            put(root, data, probe=probe, tolerance=1.0)
        assert state_at(root) == plain


def test_the_probe_sees_the_very_files_that_would_count(root):
    data, new = update(root, 1)
    seen = []
    put(root, data, probe=lambda folder: float(bool(seen.append(adapter_state(folder).sha256) or 1)))
    assert seen == [adapter_state(root).sha256, new.sha256]


def test_a_probe_that_fails_changes_nothing_and_the_update_may_come_again(root):
    def broken(folder: Path) -> float:
        raise BadInput("the probe set is gone")

    plain = state_at(root)
    data, new = update(root, 1)
    with pytest.raises(BadInput, match="the probe set is gone"):
        put(root, data, probe=broken)
    assert state_at(root) == plain
    assert put(root, data).kept
    assert state_at(root) == new.sha256


@pytest.mark.parametrize("at", range(0, 14, 2))
def test_a_full_disk_at_any_step_is_told_and_leaves_one_whole_version(root, monkeypatch, at):
    plain = state_at(root)
    data, new = update(root, 1)
    left = {"steps": at}

    def failing(real):
        def call(*arguments, **words):
            left["steps"] -= 1
            if left["steps"] < 0:
                raise OSError(28, "No space left on device")
            return real(*arguments, **words)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(Path, "rename", failing(Path.rename))
        patch.setattr(Path, "replace", failing(Path.replace))
        try:
            put(root, data)
        except BadInput as error:
            assert "cannot be written" in str(error)
    assert state_at(root) in (plain, new.sha256)
    again, newer = next_update(root, 2)
    put(root, again)
    assert state_at(root) == newer


def test_a_disk_that_does_not_keep_what_was_written_is_found_out(root, monkeypatch):
    data, _ = update(root, 1)
    plain = state_at(root)

    def other(base: Path, target: str, state: State, out: Path) -> None:
        write_adapter(taught(state), out)

    monkeypatch.setattr("saec.learn.apply.write_state", other)
    with pytest.raises(BadInput, match="has not kept"):
        put(root, data)
    assert state_at(root) == plain
