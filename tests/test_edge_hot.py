"""A station that is at work takes up its next version between two parts, and goes back the same way."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from edge_parts import SETTINGS, plate
from edge_parts import put as put_image
from learn_parts import PRODUCT, fitted
from saec.config import RouteSettings
from saec.data.decode import read_with_hash
from saec.edge.hot import HotStation
from saec.edge.station import Station
from saec.fleet.ledger import Ledger, read_verdicts
from saec.fleet.slots import SLOTS, VERSION_ROLE, Slots
from saec.learn.state import State, station_state, write_station
from saec.route.pipeline import inspect_stream, station_fingerprint
from saec.scene import scene_complexity
from saec.types import Part, Verdict


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "station"
    fitted().save(folder)
    return folder


def put(root: Path, version: int, heat: float) -> str:
    """Apply a version whose maps have another level."""
    slots = Slots(root)
    state = station_state(slots.current(), PRODUCT)
    new = State(state.tensors, {"model.json": {**state.document["model.json"], "heat_threshold": heat}})
    base = slots.current()
    with slots.alone():
        slots.stage(lambda out: write_station(base, {PRODUCT: new}, out))
        return slots.switch(version, new.sha256).name


def settled(hot: HotStation, clock: Clock, done: Callable[[], bool]) -> None:
    """Judge parts, a second after the other, until something has come about."""
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        clock.now += 1
        hot.predict(plate(0), PRODUCT)
        time.sleep(0.01)


def test_a_new_version_is_taken_up_while_parts_are_judged_and_taken_back_likewise(root):
    clock = Clock()
    hot = HotStation(root, SETTINGS, clock=clock)
    plain = hot.predict(plate(0), PRODUCT)
    assert VERSION_ROLE not in hot.models
    name = put(root, 1, 1e-3)
    settled(hot, clock, lambda: VERSION_ROLE in hot.models)
    assert hot.models[VERSION_ROLE] == name
    assert hot.predict(plate(0), PRODUCT).heatmap.max() > plain.heatmap.max()
    assert hot.manifest.sha256 == Station.load(root, settings=SETTINGS).manifest.sha256
    Slots(root).back()
    settled(hot, clock, lambda: VERSION_ROLE not in hot.models)
    assert hot.predict(plate(0), PRODUCT).heatmap.max() == plain.heatmap.max()


def test_the_pointer_is_looked_at_no_more_than_once_a_second(root, monkeypatch):
    clock = Clock()
    hot = HotStation(root, SETTINGS, clock=clock)
    looks = []
    monkeypatch.setattr(Slots, "mark", lambda self: looks.append(1) or (0, 0))
    for _ in range(20):
        clock.now += 0.1
        hot.predict(plate(0), PRODUCT)
    assert 1 <= len(looks) <= 2


def test_the_run_is_the_same_run_whatever_version_judges(root):
    before = HotStation(root, SETTINGS)
    put(root, 1, 5.0)
    after = HotStation(root, SETTINGS)
    assert after.models != before.models
    plain = root.with_name("plain")
    fitted().save(plain)
    assert station_fingerprint(Station.load(plain, settings=SETTINGS)) == station_fingerprint(before)
    assert station_fingerprint(after) == station_fingerprint(before)


def test_a_version_that_cannot_be_loaded_is_reported_and_the_one_at_work_goes_on(root, caplog):
    clock = Clock()
    hot = HotStation(root, SETTINGS, clock=clock)
    name = put(root, 1, 5.0)
    (root / SLOTS / name / "station.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        settled(hot, clock, lambda: bool(caplog.records))
    assert "the one at work goes on" in caplog.text
    assert VERSION_ROLE not in hot.models
    assert hot.predict(plate(0), PRODUCT).score == fitted().predict(plate(0), PRODUCT).score


def test_other_routing_settings_leave_the_version_alone(root):
    put(root, 1, 5.0)
    hot = HotStation(root, SETTINGS)
    routed = hot.with_route(RouteSettings(mode="edge_only"))
    assert routed.models == hot.models
    assert routed.policy(PRODUCT).mode == "edge_only"
    assert hot.policy(PRODUCT).mode == "cascade"
    assert routed.products == hot.products == (PRODUCT,)


def test_a_run_goes_on_with_the_next_version_and_every_verdict_says_which_one_judged(root, tmp_path):
    ledger = tmp_path / "run" / "ledger.sqlite"
    path = put_image(tmp_path / "part.png", plate(0))
    swapped = threading.Event()

    def on_verdict(verdict: Verdict, final: bool) -> None:
        if verdict.models.get(VERSION_ROLE, "").startswith("1-"):
            swapped.set()

    def parts() -> Iterator[Part]:
        for number in range(500):
            if swapped.is_set():
                return
            if number == 3:
                put(root, 1, 5.0)
            yield Part(str(number), PRODUCT, path)

    def run(source: Iterable[Part]) -> list[str]:
        with Ledger(ledger) as opened:
            inspect_stream(
                source,
                HotStation(root, SETTINGS, every_s=0),
                decode=read_with_hash,
                scene=scene_complexity,
                cloud=None,
                settings=SETTINGS,
                ledger=opened,
                on_verdict=on_verdict,
            )
        return [verdict.models.get(VERSION_ROLE, "0") for verdict in read_verdicts(ledger)]

    one = run(parts())
    assert one == sorted(one)
    assert (one[0], one[-1][:2]) == ("0", "1-")
    name = put(root, 2, 6.0)
    # Resumed by another process, with the next version: what was recorded stays.
    assert run([Part("0", PRODUCT, path), Part("more", PRODUCT, path)]) == [*one, name]
