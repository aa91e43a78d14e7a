"""Bundles of an adapter's versions go when their version does: each is as large as the model, and a line learns daily.

    <model cache>/exported/.loupe-1a2b3c4d5e6f-int8.versions.json    which versions the bundle beside it is of

A version is a folder among an adapter's slots, where the one that counts and the one before it stay. A bundle that was
there before a version wanted it, or that was wanted for anything else since, has no such file, and is never removed. A
process that has loaded a bundle keeps it: on POSIX its files live on as long as they are open.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from saec.data.manifest import write_atomic
from saec.fleet.slots import POINTER, SLOTS
from saec.vlm.gather import alone

_SUFFIX = ".versions.json"


def version_folder(adapter: Path | None) -> Path | None:
    """Return the full path of an adapter that is a version among slots, ``None`` for any other."""
    found = None if adapter is None else adapter.resolve()
    is_version = found is not None and found.parent.name == SLOTS and (found.parent / POINTER).is_file()
    return found if is_version else None


def claim(bundle: Path, version: Path | None) -> None:
    """Note, before a bundle is looked for, that it is wanted for this version, or for something that is none.

    Raises:
        OSError, sqlite3.Error: the cache cannot be written.
    """
    if _after(bundle, version) != _versions(bundle):
        bundle.parent.mkdir(parents=True, exist_ok=True)
        with alone(_lock(bundle)):
            versions = _after(bundle, version)
            if versions:
                write_atomic(_record(bundle), json.dumps({"versions": sorted(map(str, versions))}) + "\n")
            else:
                _record(bundle).unlink(missing_ok=True)


def remove_superseded(exported: Path, version: Path) -> None:
    """Remove the bundles of those versions of the same adapter that no slot keeps.

    Raises:
        OSError, sqlite3.Error: the cache cannot be written.
    """
    for record in exported.glob(f".*{_SUFFIX}"):
        bundle = record.with_name(record.name[1:].removesuffix(_SUFFIX))
        if any(each.parent == version.parent for each in _versions(bundle)) and _superseded(bundle):
            with alone(_lock(bundle)):
                if _superseded(bundle):  # a newer version, equal to it, may have claimed it meanwhile
                    _remove(bundle)


def _after(bundle: Path, version: Path | None) -> frozenset[Path]:
    before = _versions(bundle)
    if version is None or (bundle.exists() and not before):
        return frozenset()
    return before | {version}


def _superseded(bundle: Path) -> bool:
    # Without the pointer the adapter is gone, or on a disk that is not there now: that says nothing.
    versions = _versions(bundle)
    return bool(versions) and all((each.parent / POINTER).is_file() and not each.exists() for each in versions)


def _remove(bundle: Path) -> None:
    aside = bundle.with_name(f".{bundle.name}.old")
    shutil.rmtree(aside, ignore_errors=True)  # of a removal that was killed
    if bundle.exists():
        bundle.rename(aside)  # at once: nobody sees half a bundle
        shutil.rmtree(aside, ignore_errors=True)
    _record(bundle).unlink()


def _versions(bundle: Path) -> frozenset[Path]:
    try:
        return frozenset(map(Path, json.loads(_record(bundle).read_bytes())["versions"]))
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def _record(bundle: Path) -> Path:
    return bundle.with_name(f".{bundle.name}{_SUFFIX}")


def _lock(bundle: Path) -> Path:
    """Return what :func:`saec.vlm.gather.alone` locks while the bundle is made, or removed."""
    return bundle.with_name(f".{bundle.name}")
