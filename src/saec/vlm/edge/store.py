"""The beginning of free questions as a file: keys and values, and what they are of. Never changed by a question.

A safetensors file. Its key is a hash of everything that the states depend on: the model, its tokenizer, the image, the
tokens, the number format, and the context; a file with another key is refused, and so is a damaged one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from saec.data.hashing import sha256_json
from saec.data.manifest import write_atomic
from saec.errors import BadInput
from saec.types import Image
from saec.vlm.contract.bundle import TOKENIZER, Bundle
from saec.vlm.edge.kv import Prefix

_METADATA = "saec.start"
_AGAIN = "make it again with saec vlm cache"


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """The beginning of free questions about one picture: instructions and image, and their keys and values."""

    ids: tuple[int, ...]
    prefix: Prefix
    system: str


class _Record(BaseModel):
    """What a file is of. ``image`` is the SHA-256 of the pixels and their shape."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    model: str
    tokenizer: str
    image: str
    ids: tuple[int, ...]
    dtype: str
    context: int
    system: str
    sha256: str

    @property
    def key(self) -> str:
        return sha256_json(self.model_dump(exclude={"sha256", "system"}))


def save_start(file: Path, start: Start, bundle: Bundle, image: Image) -> str:
    """Write a beginning, whole or not at all, and return its key.

    Raises:
        BadInput: the file cannot be written.
    """
    keys, values = start.prefix.keys, start.prefix.values
    record = _Record(
        image=_sha256(image),
        ids=start.ids,
        system=start.system,
        sha256=_sha256(keys, values),
        **_of(bundle),
    )
    tree = {_METADATA: record.model_dump_json(), "key": record.key}
    try:
        write_atomic(file, save({"keys": keys, "values": values}, metadata=tree))
    except OSError as error:
        raise BadInput(f"cannot be written ({error.strerror})", where=file) from None
    return record.key


def load_start(file: Path, bundle: Bundle) -> Start:
    """Return a saved beginning, to be continued with the same bundle.

    Raises:
        BadInput: the file is missing, damaged, or of another model, tokenizer, number format or context; the message
            says which.
    """
    try:
        with safe_open(file, framework="np") as stored:
            tree = stored.metadata() or {}
            record = _Record.model_validate_json(tree.get(_METADATA, ""))
            keys, values = stored.get_tensor("keys"), stored.get_tensor("values")
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror or error})", where=file, fix=_AGAIN) from None
    except (SafetensorError, ValidationError):
        raise BadInput("not a saved beginning, or damaged", where=file, fix=_AGAIN) from None
    for what, expected in _of(bundle).items():
        if getattr(record, what) != expected:
            raise BadInput(f"saved with another {what} than this bundle's", where=file, fix=_AGAIN)
    if (
        tree.get("key") != record.key
        or record.sha256 != _sha256(keys, values)
        or not _fits(keys, values, record, bundle)
    ):
        raise BadInput("damaged: not what was saved", where=file, fix=_AGAIN)
    return Start(record.ids, Prefix(keys, values), record.system)


def _of(bundle: Bundle) -> dict[str, object]:
    """Return what must be the same of the bundle that continues."""
    return {
        "model": bundle.fingerprint,
        "tokenizer": bundle.files[TOKENIZER].sha256,
        "dtype": bundle.signature.dtype,
        "context": bundle.signature.context,
    }


def _fits(keys: NDArray[np.generic], values: NDArray[np.generic], record: _Record, bundle: Bundle) -> bool:
    shape, tokens = bundle.signature.shape, len(record.ids)
    wanted = (shape.layers, 1, shape.kv_heads, shape.head_dim, tokens)
    swapped = (*wanted[:3], tokens, shape.head_dim)
    return (keys.shape, values.shape, keys.dtype, values.dtype) == (wanted, swapped, *[np.dtype(record.dtype)] * 2)


def _sha256(*arrays: NDArray[np.generic]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
