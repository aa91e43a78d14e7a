"""Checkpoints: what a killed run needs to go on with exactly the same losses. Safetensors and JSON only.

One folder per checkpoint: ``weights.safetensors`` (all that learns, by name), ``optimizer.safetensors`` (AdamW's two
moments and step per weight, and the random number generators), ``state.json`` (the position, and the SHA-256 of the
other two). A folder is written beside, flushed, and renamed: it is whole or not there. The last two are kept.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from saec.data.hashing import sha256_file
from saec.edge.folder import put_folder
from saec.train.files import sync

_log = logging.getLogger(__name__)

FORMAT = "saec-checkpoint/1"
KEPT = 2

_FILES = ("weights.safetensors", "optimizer.safetensors")


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands: ``step`` optimizer steps are done, ``done`` of them in ``epoch`` (from 0)."""

    step: int = 0
    epoch: int = 0
    done: int = 0
    seconds: float = 0.0


def save_checkpoint(
    folder: Path, at: Position, learning: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write a checkpoint into ``folder`` and drop all but the last two.

    Raises:
        OSError: it cannot be written; the former ones stay.
    """
    place = folder / f"step-{at.step:08d}"
    beside = folder / f".{place.name}.new"
    for torn in folder.glob(".step-*"):  # by a kill in the middle of a former one
        shutil.rmtree(torn)
    beside.mkdir(parents=True)
    save_file({name: _plain(weight) for name, weight in learning.items()}, beside / _FILES[0])
    moments = {
        f"{name}|{key}": _plain(value)
        for name, weight in learning.items()
        for key, value in optimizer.state.get(weight, {}).items()
    }
    save_file({**moments, **_generators()}, beside / _FILES[1])
    state = {"format": FORMAT, **asdict(at), "sha256": {name: sha256_file(beside / name) for name in _FILES}}
    (beside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    sync(beside)
    put_folder(beside, place)
    sync(folder)
    for former in _places(folder)[:-KEPT]:
        shutil.rmtree(former)


def load_checkpoint(
    folder: Path, learning: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Position | None:
    """Restore the newest whole checkpoint and return its position; ``None`` when there is none.

    A damaged one is named in a warning and the one before is taken.
    """
    for place in reversed(_places(folder)):
        try:
            at, weights, moments = _read(place)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("damaged checkpoint %s (%s): taking the one before", place, error)
            continue
        _restore(weights, moments, learning, optimizer)
        return at
    return None


def _places(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _read(place: Path) -> tuple[Position, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    state: Any = json.loads((place / "state.json").read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise ValueError(f"format {state['format']}")
    for name in _FILES:
        if sha256_file(place / name) != state["sha256"][name]:
            raise ValueError(f"{name} is not what was written")
    at = Position(int(state["step"]), int(state["epoch"]), int(state["done"]), float(state["seconds"]))
    return at, load_file(place / _FILES[0]), load_file(place / _FILES[1])


def _restore(
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    learning: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    for name, weight in learning.items():
        weight.data.copy_(weights[name])
    for key, value in moments.items():
        name, _, moment = key.rpartition("|")
        if name in learning:  # AdamW counts its steps on the host
            weight = learning[name]
            optimizer.state[weight][moment] = value if moment == "step" else value.to(weight.device)
    torch.set_rng_state(moments["rng|cpu"])
    if torch.cuda.is_available() and "rng|cuda" in moments:
        torch.cuda.set_rng_state(moments["rng|cuda"])


def _generators() -> dict[str, torch.Tensor]:
    states = {"rng|cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng|cuda"] = torch.cuda.get_rng_state()
    return states


def _plain(value: torch.Tensor) -> torch.Tensor:
    return value.detach().cpu().contiguous()
