"""Small adapters on the disk, without torch: an adapter is its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from saec.learn.delta import Delta, compress
from saec.learn.state import LEARNT, State, adapter_state
from saec.learn.update import ADAPTER, Update, encode_update

KEY = b"token"
MOST = 10_000_000
RANK, WIDE = 4, 300


STRANGE = (
    "/tmp/saec-was-here.json",
    "../../../was-here.json",
    "..\\..\\was-here.json",
    "C:\\was-here.json",
    "nested/was-here.json",
    "was-here\0.json",
    "",
    "..",
    ".hidden",
    "station.json",
    "../slots/current.json",
)
"""Names that would become files where no update may write."""


def learnt(*names: str) -> np.ndarray:
    """Content hashes as rows."""
    return np.frombuffer(b"".join(hashlib.sha256(name.encode()).digest() for name in names), np.uint8).reshape(-1, 32)


def adapter(folder: Path, *, seed: int = 0) -> Path:
    """Write an adapter's folder with a record of its training."""
    rng = np.random.default_rng(seed)
    weights = {
        "base_model.model.layers.0.q_proj.lora_A.weight": rng.normal(size=(RANK, WIDE)).astype(np.float16),
        "base_model.model.layers.0.q_proj.lora_B.weight": rng.normal(size=(WIDE, RANK)).astype(np.float16),
        "base_model.model.projector.scale": np.array(1.5, np.float16),
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK}))
    (folder / "saec.json").write_text(json.dumps({"base": "tiny", "fingerprint": "f", "prompt": "p2"}))
    (folder / "train.json").write_text(json.dumps({"settings": {"max_side": 224}}))
    (folder / "trained_on.txt").write_text(
        "".join(f"{row.tobytes().hex()}  {n}.png\n" for n, row in enumerate(learnt("a")))
    )
    (folder / "MODEL_CARD.md").write_text("of the base alone")
    return folder


def taught(base: State, *, seed: int = 1, by: float = 0.01) -> State:
    """The state after some training: every float has moved a little, and another image is known."""
    rng = np.random.default_rng(seed)
    moved = {
        name: (value + rng.normal(size=value.shape) * by).astype(value.dtype)
        for name, value in sorted(base.tensors.items())
        if value.dtype.kind == "f"
    }
    more = {LEARNT: np.concatenate([base.tensors[LEARNT], learnt(f"new {seed}")])}
    return State({**base.tensors, **moved, **more}, {**base.document, "train.json": {"taught": seed}})


def update(
    root: Path, version: int, *, previous: int = 0, seed: int = 1, key: bytes | None = KEY
) -> tuple[bytes, State]:
    """An encoded update from the plain adapter at ``root``, and the state that it makes."""
    base = adapter_state(root)
    delta = compress(base, taught(base, seed=seed), keep=0.1, bits=4)
    new = delta.apply(base)
    made = Update(ADAPTER, base.sha256, new.sha256, version, previous, delta, {"accuracy": 0.9}, {"by": "test"})
    return encode_update(made, key), new


def naming(base: State, target: str, *, document: str | None = None, tensor: str | None = None) -> bytes:
    """An update without a key that makes what it says, a document or a tensor of this name."""
    ways, arrays = ({}, {}) if tensor is None else ({tensor: "dense"}, {tensor: np.zeros(3, np.float32)})
    put = {} if document is None else {document: "owned"}
    header = {"ways": ways, "document": {"set": put, "gone": []}, "sparse": None, "error": 0.0}
    delta = Delta(header, arrays)
    return encode_update(Update(target, base.sha256, delta.apply(base).sha256, 1, 0, delta), None)
