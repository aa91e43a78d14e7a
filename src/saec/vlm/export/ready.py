"""The bundle of a model, ready to run: where it lies in the model cache, exported there when it is missing.

    <model cache>/exported/loupe-1a2b3c4d5e6f-int8/

The twelve digits are of a hash of everything it is made from, so a changed adapter or exporter makes another bundle.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from saec.config import MllmSettings
from saec.errors import BadInput
from saec.vlm.contract.bundle import RECORD, TOWER_RECORD, read_bundle, read_tower
from saec.vlm.export.source import Source, find_source
from saec.vlm.export.superseded import claim, remove_superseded, version_folder
from saec.vlm.gather import alone
from saec.vlm.registry import CACHE_ENV, cache_folder, names
from saec.vlm.trained import as_trained


def ready_bundle(settings: MllmSettings, *, progress: Callable[[str], None] | None = None) -> Path:
    """Return the folder of the bundle that the settings name: model, adapter and precision.

    A bundle's own folder is returned as it is. Another model is exported on first use, by one process at a time, which
    needs ``saec[export]``; whoever finds the bundle needs nothing of the kind. Of an adapter with slots, the bundles of
    versions that are gone are removed.

    Raises:
        BadInput: no such model, one that cannot be exported, or a cache that cannot be written.
    """
    if settings.model not in names() and (Path(settings.model) / RECORD).is_file():
        if settings.adapter is not None:
            fix = "export the model with this adapter"
            raise BadInput("a bundle has its adapter inside", where=settings.adapter, fix=fix)
        return Path(settings.model)
    wanted = as_trained(settings)
    source = find_source(wanted.model, wanted.adapter)
    name = f"{source.name}-{source.fingerprint(wanted.precision)[:12]}-{wanted.precision}"
    exported, version = cache_folder() / "exported", version_folder(wanted.adapter)
    with suppress(OSError, sqlite3.Error):  # a cache that cannot be written does no harm to who finds the bundle there
        claim(exported / name, version)
    folder = _ready(name, read_bundle, lambda folder: _export(wanted, folder, progress))
    if version is not None:
        with suppress(OSError, sqlite3.Error):
            remove_superseded(exported, version)
    return folder


def ready_tower(model: str, adapter: Path | None = None) -> Path:
    """Return the folder of a model's tower, in 8 bits, exported at its first use like a bundle.

    Raises:
        BadInput: see :func:`ready_bundle`; or a model whose tower is not taken apart.
    """
    if model not in names() and (Path(model) / TOWER_RECORD).is_file():
        return Path(model)
    source = find_source(model, adapter)
    name = f"{source.name}-tower-{source.fingerprint('int8')[:12]}-int8"
    return _ready(name, read_tower, lambda folder: _export_tower(source, folder))


def _ready(name: str, read: Callable[..., object], export: Callable[[Path], None]) -> Path:
    """Return the folder of that name in the model cache, exported by one process at a time where it is missing."""
    folder = cache_folder() / "exported" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not _usable(folder, read):
            with alone(folder.with_name(f".{name}")):
                if not _usable(folder, read):  # another process may have made it while this one waited
                    _clear(folder)
                    export(folder)
    except (OSError, sqlite3.Error) as error:
        what = f"cannot write the model cache ({error})"
        raise BadInput(what, where=folder, fix=f"set {CACHE_ENV}") from None
    return folder


def _clear(folder: Path) -> None:
    """Remove a damaged bundle, and what exports that were killed left beside it."""
    for left in folder.parent.iterdir():
        if left.is_dir() and (left == folder or left.name.startswith(f".{folder.name}.")):
            shutil.rmtree(left, ignore_errors=True)


def _usable(folder: Path, read: Callable[..., object]) -> bool:
    try:
        return bool(read(folder, hashes=False))  # whoever loads it compares the hashes
    except BadInput:
        return False


def _export(wanted: MllmSettings, folder: Path, progress: Callable[[str], None] | None) -> None:
    try:
        from saec.vlm.export.bundle import export_bundle
    except ModuleNotFoundError as error:
        raise _not_exported(wanted.model, error, folder) from None
    export_bundle(wanted.model, folder, precision=wanted.precision, adapter=wanted.adapter, progress=progress)


def _export_tower(source: Source, folder: Path) -> None:
    try:
        from saec.vlm.export.tower import export_tower
    except ModuleNotFoundError as error:
        raise _not_exported(f"the tower of {source.name}", error, folder) from None
    export_tower(source, folder)


def _not_exported(what: str, error: ModuleNotFoundError, folder: Path) -> BadInput:
    lacks = f"{what} is not exported yet, and exporting needs {error.name}"
    return BadInput(lacks, where=folder, fix="pip install 'saec[export]', or pass the folder of a bundle")
