"""What rounds of learning were asked for and are made of: kept beside them, so that nobody goes on otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saec.errors import BadInput

if TYPE_CHECKING:
    from saec.config import Settings

PLAN, MADE, STATION = "plan.json", "made.json", "station"

_DECIDE = ("data", "edge", "calibration", "route", "cloud", "openai", "mllm", "tokens", "learn")
_ADDRESSES = frozenset({"cloud.url", "cloud.token", "openai.base_url", "openai.api_key"})
_OTHER = "pass the same, or another --out"


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for; part of the result. ``settings`` are :func:`changed`'s, ``stream`` the hash of its parts."""

    data: str
    first: str
    then: str | None
    drift: str | None
    product: str
    backend: str
    teacher: str
    uplink: str
    rounds: int
    parts: int
    link_mbit: float
    seed: int
    stream: str
    settings: Mapping[str, Any]


def changed(settings: Settings) -> dict[str, Any]:
    """Return the settings that can decide a figure and are not the default: ``{"learn.samples": 5}``.

    Addresses, tokens and keys are left out.
    """
    from saec.config import Settings as Tree

    default, tree = Tree().model_dump(mode="json"), settings.model_dump(mode="json")
    return {
        name: value
        for section in _DECIDE
        for key, value in tree[section].items()
        if value != default[section][key] and (name := f"{section}.{key}") not in _ADDRESSES
    }


def begin(plan: Plan, out: Path) -> None:
    """Write the plan into ``out``, or see that the rounds there were begun with the same one.

    A plan that nothing has come of may be replaced.

    Raises:
        BadInput: they were begun otherwise, ``out`` holds something else, or it cannot be written.
    """
    from saec.evaluate.summary import write_atomically
    from saec.vlm.trained import read_record

    file, tree = out / PLAN, asdict(plan)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = error.strerror or "check the path"
        raise BadInput("cannot make the folder of the rounds", where=out, fix=fix) from None
    was = read_record(file) if file.is_file() else None
    if not (out / STATION).exists():
        write_atomically(file, json.dumps(tree, indent=1))
        return
    if was is None:
        raise BadInput("a station that no rounds have fitted", where=out / STATION, fix="pass another --out")
    if "settings" not in was:
        what = "these rounds were begun by an older version, which kept no settings"
        raise BadInput(what, where=file, fix="pass another --out")
    _refuse_other("these rounds were begun with other options", was, tree, file)


def made_of(cloud: str, station: str, out: Path) -> dict[str, str]:
    """Return ``{"cloud": model id, "station": hash}``; see that the rounds in ``out`` were begun with these.

    Raises:
        BadInput: they were begun with another model or station.
    """
    from saec.evaluate.summary import write_atomically
    from saec.vlm.trained import read_record

    file, made = out / MADE, {"cloud": cloud, "station": station}
    if file.is_file():
        _refuse_other("these rounds were begun with another model or station", read_record(file), made, file)
    else:
        write_atomically(file, json.dumps(made, indent=1))
    return made


def _refuse_other(what: str, was: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> None:
    old, new = dict(_leaves(was)), dict(_leaves(json.loads(json.dumps(now))))
    for name in (*new, *old):
        if old.get(name) != new.get(name):
            said = f"{what}: {name} was {_said(old, name)}, now {_said(new, name)}"
            raise BadInput(said, where=file, fix=_OTHER)


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all entries; the settings' names say where they are already."""
    for name, value in tree.items():
        yield from value.items() if isinstance(value, dict) else ((name, value),)


def _said(entries: Mapping[str, Any], name: str) -> object:
    return entries.get(name, "the default")
