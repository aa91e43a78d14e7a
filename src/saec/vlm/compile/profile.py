"""What a device measured: profiles of ``genie-t2t-run --profile`` and of Qualcomm AI Hub, read into one form.

Genie (*Genie Profile*, QAIRT documentation): of each event in ``components[].events[]`` its ``type``, its ``duration``
in µs, and all its metrics ``{"value", "unit"}``, such as ``time-to-first-token`` and ``token-generation-rate``.

AI Hub (``ProfileJob.download_profile()``): of ``execution_summary`` the µs ``all_inference_times`` (without them
``estimated_inference_time``, which is the shortest), ``first_load_time``, ``warm_load_time``, ``compile_time``; the
bytes ``*_peak_memory`` and, as [low, high], ``*_memory_*_range``; of ``execution_detail`` each layer's
``compute_unit`` and ``execution_time``.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from saec.errors import BadInput


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Spread(_Record):
    """One quantity over all runs of the profiles."""

    unit: str
    runs: int
    min: float
    median: float
    p90: float


class Profile(_Record):
    """Measurements by name (times in ms, memory in MB), numbers of layers by compute unit, and what was wrong."""

    source: Literal["genie", "ai-hub"]
    measured: Mapping[str, Spread]
    layers: Mapping[str, int]
    notes: tuple[str, ...]


def read_profiles(files: Sequence[Path]) -> Profile:
    """Return what several runs of one model measured.

    Raises:
        BadInput: not a profile, profiles of different tools, or nothing measured in them.
    """
    trees = [_tree(file) for file in files]
    sources: set[Literal["genie", "ai-hub"]] = {"genie" if "components" in tree else "ai-hub" for tree in trees}
    if len(sources) > 1:
        raise BadInput("profiles of Genie and of AI Hub do not add up", where=files[0], fix="import them one by one")
    (source,) = sources
    found = _Found()
    for file, tree in zip(files, trees, strict=True):
        try:
            found.genie(tree) if source == "genie" else found.hub(tree)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadInput(f"a damaged profile ({type(error).__name__}: {error})", where=file) from None
    if not found.samples:
        raise BadInput("nothing was measured in this profile", where=files[0])
    measured = {name: _spread(unit, values) for (name, unit), values in found.samples.items()}
    return Profile(source=source, measured=measured, layers=dict(found.layers), notes=tuple(dict.fromkeys(found.notes)))


def repaired(value: float) -> tuple[float, bool]:
    """Return a figure as it was meant: a negative number stored without its sign, in 64 or 32 bits, is negative again.

    A device's memory difference is negative when memory was given back. No memory is as large as 2^63 bytes; just
    below 2^32 a real one may be, so only the last 64 MiB there count as wrapped.
    """
    if value >= 1 << 63:
        return value - (1 << 64), True
    if (1 << 32) - (1 << 26) <= value < 1 << 32:
        return value - (1 << 32), True
    return value, False


class _Found:
    def __init__(self) -> None:
        self.samples: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.layers: Counter[str] = Counter()
        self.notes: list[str] = []

    def genie(self, tree: Mapping[str, Any]) -> None:
        for component in tree["components"]:
            for event in component["events"]:
                kind = event["type"].rpartition("_")[2]
                if "duration" in event:
                    self._add(kind, event["duration"], "us")
                for name, metric in event.items():
                    if isinstance(metric, dict) and "value" in metric:
                        self._add(f"{kind} {name}", metric["value"], metric.get("unit", ""))

    def hub(self, tree: Mapping[str, Any]) -> None:
        summary = tree["execution_summary"]
        times = summary.get("all_inference_times") or []
        if not times and summary.get("estimated_inference_time"):
            times = [summary["estimated_inference_time"]]
            self.notes.append("only the shortest inference is stated, not each one")
        for time in times:
            self._add("inference", time, "us")
        for name, value in summary.items():
            if name in ("all_inference_times", "estimated_inference_time") or value is None:
                continue
            if name.endswith("_time"):
                self._add(name.removesuffix("_time").replace("_", " "), value, "us")
            elif name.endswith("_peak_memory"):
                self._add(name.replace("_", " "), value, "bytes")
            elif name.endswith("_range"):
                for end, one in zip(("low", "high"), value, strict=True):
                    self._add(f"{name.removesuffix('_range').replace('_', ' ')} {end}", one, "bytes")
        detail = tree.get("execution_detail") or []
        self.layers.update(layer.get("compute_unit") or "unknown" for layer in detail)
        if detail and not any(layer.get("execution_time") for layer in detail):
            self.notes.append(f"the times of all {len(detail)} layers are 0: the device did not measure them")

    def _add(self, name: str, value: float, unit: str) -> None:
        if unit == "us":
            self.samples[name, "ms"].append(value / 1e3)
        elif unit == "bytes":
            figure, wrapped = repaired(value)
            if wrapped:
                self.notes.append(f"{name}: {value:.0f} is a negative number without its sign, read as {figure:.0f}")
            self.samples[name, "MB"].append(figure / 1e6)
        else:
            self.samples[name, unit.replace("toks/sec", "tokens/s")].append(float(value))


def _tree(file: Path) -> Mapping[str, Any]:
    try:
        tree = json.loads(file.read_bytes())
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})", where=file) from None
    except ValueError:
        raise BadInput("not JSON", where=file) from None
    if not isinstance(tree, dict) or not ({"components", "execution_summary"} & set(tree)):
        raise BadInput("neither a profile of Genie nor of AI Hub", where=file)
    return tree


def _spread(unit: str, values: Iterable[float]) -> Spread:
    array = np.asarray(list(values), np.float64)
    low, middle, high = (float(value) for value in np.quantile(array, [0, 0.5, 0.9]))
    return Spread(unit=unit, runs=len(array), min=low, median=middle, p90=high)
