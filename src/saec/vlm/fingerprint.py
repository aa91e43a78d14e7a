"""Telling base checkpoints apart by a hash of their weights. No torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from saec.errors import BadInput


def fingerprint(folder: Path) -> str:
    """Return a hash of a checkpoint's weights: names, shapes and first rows. Reading all of 16 GB would take minutes.

    Raises:
        BadInput: weights that cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in sorted(folder.glob("*.safetensors")):
            _add(file, digest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"the weights cannot be read ({error})", where=folder) from None
    return digest.hexdigest()


def _add(file: Path, digest: hashlib._Hash) -> None:
    """Add one file. The format: length of the header in 8 bytes, the header as JSON, the weights' bytes."""
    with file.open("rb") as stream:
        size, whole = int.from_bytes(stream.read(8), "little"), file.stat().st_size
        if size > whole:
            raise ValueError(f"{file.name} is no safetensors file")
        header = json.loads(stream.read(size))
        if any(8 + size + one["data_offsets"][1] > whole for name, one in header.items() if name != "__metadata__"):
            raise ValueError(f"{file.name} is cut off")
        for name in sorted(header.keys() - {"__metadata__"}):
            shape, (begin, end) = header[name]["shape"], header[name]["data_offsets"]
            digest.update(f"{name} {header[name]['dtype']} {shape}\n".encode())
            stream.seek(8 + size + begin)
            digest.update(stream.read((end - begin) // max(1, shape[0]) if shape else end - begin))
