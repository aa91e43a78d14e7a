"""LoRA adapters as PEFT saves them, merged into the weights of an exported model or left beside them (Hu et al. 2022).

Everything that would change what the adapter means, and is not here, is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saec.errors import BadInput
from saec.vlm.contract.shape import DecoderShape
from saec.vlm.export.decoder import DecoderWeights
from saec.vlm.export.linear import Array, Blocks4, SidePath
from saec.vlm.export.weights import Tensors
from saec.vlm.trained import CONFIG, WEIGHTS, check_adapter, read_record

_ROOT = "base_model.model."
_HALVES = (".lora_A.weight", ".lora_B.weight")
_REFUSED = (
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "use_bdlora",
    "use_qalora",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
)
_PROJECTIONS = tuple(f"self_attn.{part}_proj" for part in "qkvo") + tuple(
    f"mlp.{part}_proj" for part in ("gate", "up", "down")
)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter by the paths of the modules it was trained on, such as ``language_model.model.layers.0.mlp.up_proj``.

    ``sides`` are its LoRAs, the scaling in ``b``; ``saved`` are weights that replace the base's own, by full name.
    """

    folder: Path
    sides: Mapping[str, SidePath]
    saved: Mapping[str, Array]

    def merged(self, path: str, weight: Array) -> Array:
        """Return the matrix [out, in] of a module with its LoRA added: W + (A B)^T; as it is where there is none.

        Raises:
            BadInput: the LoRA was made for a matrix of another shape.
        """
        side = self.sides.get(path)
        if side is None:
            return weight
        if (side.b.shape[1], side.a.shape[0]) != weight.shape:
            what = f"the LoRA of {path} is for a matrix {[side.b.shape[1], side.a.shape[0]]}, not {list(weight.shape)}"
            raise BadInput(what, where=self.folder, fix="use the adapter with the base it was trained on")
        return weight + (side.a @ side.b).T

    def require(self, modules: Collection[str]) -> None:
        """Refuse an adapter that changes anything but ``modules``, which would be left out in silence.

        A LoRA must be of one of them, a saved weight of one of them or inside one, such as of ``projector``.

        Raises:
            BadInput: a LoRA or a saved weight of another module; the message names the first.
        """
        inside = tuple(f"{module}." for module in modules)
        odd = sorted(self.sides.keys() - set(modules)) + sorted(
            name for name in self.saved if not name.startswith(inside)
        )
        if odd:
            what = f"the adapter changes {odd[0]}, which the exported model does not have"
            raise BadInput(what, where=self.folder, fix="use the adapter with the base it was trained on")


def read_adapter(folder: Path) -> Adapter:
    """Return the adapter in a folder that PEFT wrote.

    Raises:
        BadInput: no adapter there, a damaged one, or one with a feature that is not exported; the message names it.
    """
    check_adapter(folder)
    config = read_record(folder / CONFIG)
    scaling = _scaling(config, folder / CONFIG)
    tensors = Tensors([folder / WEIGHTS])
    sides: dict[str, SidePath] = {}
    saved: dict[str, Array] = {}
    for name in tensors.shapes:
        path = name.removeprefix(_ROOT)
        if path.endswith(_HALVES):
            path = path.removesuffix(_HALVES[0]).removesuffix(_HALVES[1])
            if path not in sides:
                a, b = (tensors.array(f"{_ROOT}{path}{half}") for half in _HALVES)
                if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] != config["r"]:
                    what = f"the LoRA of {path} has shapes {list(a.shape)} and {list(b.shape)}, rank {config['r']}"
                    raise BadInput(what, where=folder / WEIGHTS)
                sides[path] = SidePath(a.T, b.T * scaling)
        elif ".lora_" in name or not name.startswith(_ROOT):
            raise BadInput(f"the adapter has {name}, which is not exported", where=folder / WEIGHTS)
        else:
            saved[path] = tensors.array(name)
    return Adapter(folder, sides, saved)


def decoder_modules(shape: DecoderShape, prefix: str) -> set[str]:
    """Return the paths of all modules of a decoder that a LoRA can be beside; ``prefix`` stands for ``model.``."""
    return {f"{prefix}layers.{layer}.{part}" for layer in range(shape.layers) for part in _PROJECTIONS}


def merged(weights: DecoderWeights, adapter: Adapter, prefix: str) -> DecoderWeights:
    """Return a decoder's weights with the adapter in them; matrices that it changes are no longer the stored blocks.

    ``prefix`` is what the adapter's modules have in place of ``model.``, such as ``language_model.model.``.
    """
    return _Merged(weights, adapter, prefix)


def beside(weights: DecoderWeights, adapter: Adapter, prefix: str) -> DecoderWeights:
    """Return a decoder's weights as they are stored, 4-bit blocks included, with the adapter on a side path."""
    return _Beside(weights, adapter, prefix)


@dataclass(frozen=True, slots=True, eq=False)
class _Merged:
    base: DecoderWeights
    adapter: Adapter
    prefix: str

    def array(self, name: str) -> Array:
        return self.adapter.merged(self._path(name), self.base.array(name))

    def blocks(self, name: str) -> Blocks4 | None:
        return None if self._path(name) in self.adapter.sides else self.base.blocks(name)

    def side(self, name: str) -> SidePath | None:
        return self.base.side(name)

    def _path(self, name: str) -> str:
        if not name.startswith("model.") or not name.endswith(".weight"):
            return ""  # lm_head and biases, which no LoRA changes
        return self.prefix + name.removeprefix("model.").removesuffix(".weight")


class _Beside(_Merged):
    def array(self, name: str) -> Array:
        return self.base.array(name)

    def blocks(self, name: str) -> Blocks4 | None:
        return self.base.blocks(name)

    def side(self, name: str) -> SidePath | None:
        return self.adapter.sides.get(self._path(name))


def _scaling(config: Mapping[str, Any], file: Path) -> np.float32:
    kind = config.get("peft_type")
    odd = [f"{name} = {config[name]}" for name in _REFUSED if config.get(name)]
    odd += [f"peft_type = {kind}"] if kind != "LORA" else []
    odd += [f"bias = {config['bias']}"] if config.get("bias", "none") != "none" else []
    if odd:
        raise BadInput(f"the adapter has {odd[0]}, which is not exported", where=file)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise BadInput(f"the adapter has rank {rank} and alpha {alpha}", where=file)
    return np.float32(alpha / (rank**0.5 if config.get("use_rslora") else rank))
