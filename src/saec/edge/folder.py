"""Folders that prove themselves whole: how stations and expert models lie on the disk.

One JSON index names every other file with its sha256 and ends in the sha256 of its own content, so that no damage goes
unnoticed. A folder is written beside its place and then put there in one step.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saec.data.hashing import sha256_json
from saec.errors import BadInput

_SEAL = "sha256"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
"""A path of plain names inside a folder: neither absolute nor hidden, no way up, and the same file on every system."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2(2)


def write_folder(path: Path, files: Mapping[str, bytes], index: str, tree: Mapping[str, Any], *, kind: str) -> None:
    """Write a folder in one step (:func:`put_folder`): a reader, a crash or a full disk never finds a part of one.

    Args:
        path: replaced if it is a folder of this kind.
        files: contents by path inside the folder.
        index: name of the index file.
        tree: what the index holds, JSON types only; the index's own hash is added.
        kind: what the folder is, for messages.

    Raises:
        BadInput: ``path`` is something else, a name leads elsewhere, or it cannot be written; it is as it was.
    """
    for name in (index, *files):
        _require_inside(path, name, kind)
    if path.exists() and not (path / index).is_file() and not _is_empty_folder(path):
        raise BadInput(f"this exists and is not a saved {kind}", where=path, fix="choose another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            sealed = {**tree, _SEAL: sha256_json(tree)}
            for name, data in {**files, index: json.dumps(sealed, indent=1).encode()}.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                _write_durably(new / name, data)
            put_folder(new, path)
    except OSError as error:
        raise BadInput(f"cannot write the {kind}", where=path, fix=error.strerror or "check the disk") from None


def read_index(path: Path, index: str, *, kind: str, version: int, oldest: int | None = None) -> dict[str, Any]:
    """Return what the index of a folder holds, after checking its format and its own hash.

    Args:
        path: the folder.
        index: name of the index file.
        kind: what the folder is, for messages.
        version: the ``format`` that this version of the package writes and reads.
        oldest: the first one that it still reads; by default no other.

    Raises:
        BadInput: it is missing, damaged, or of another version.
    """
    try:
        tree = json.loads((path / index).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"no {kind} here", where=path, fix="saec fit makes one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"the {kind} is damaged ({error})", where=path / index, fix="fit it again") from None
    found = tree.get("format") if isinstance(tree, dict) else None
    if found not in range(version if oldest is None else oldest, version + 1):
        raise BadInput(f"{kind} of format {found}, this version reads {version}", where=path, fix="fit it again")
    if tree.pop(_SEAL, None) != sha256_json(tree):
        what = f"the {kind} is damaged (its index is not the one that was saved)"
        raise BadInput(what, where=path / index, fix="fit it again or restore the file")
    return dict(tree)


def read_checked(path: Path, name: str, sha256: str, *, kind: str) -> bytes:
    """Return the bytes of the file ``name`` of a folder after comparing their hash.

    Raises:
        BadInput: the file is missing, is not the one that was saved, or lies elsewhere.
    """
    _require_inside(path, name, kind)
    try:
        data = (path / name).read_bytes()
    except OSError as error:
        what = f"the {kind} is damaged (a file cannot be read)"
        raise BadInput(what, where=path / name, fix=error.strerror or "restore the file") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        what = f"the {kind} is damaged (the file is not the one that was saved)"
        raise BadInput(what, where=path / name, fix="fit it again or restore the file")
    return data


def _require_inside(path: Path, name: str, kind: str) -> None:
    if not _NAME.fullmatch(name):
        raise BadInput(f"the {kind} names a file outside of its folder", where=f"{path}: {name!a:.80}")


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def put_folder(new: Path, path: Path) -> None:
    """Move a finished folder to ``path``, on the same disk, in one step; a folder that is there goes.

    Where the system cannot swap two folders (others than Linux), a kill between two renames leaves none.

    Raises:
        OSError: it cannot be moved; the old folder is there as it was.
    """
    if not path.exists():
        new.rename(path)
        return
    if _exchange(new, path):
        shutil.rmtree(new, ignore_errors=True)
        return
    old = new.with_name(f"{new.name}.old")
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; return whether the system and the file system could."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc >= 2.28, musl >= 1.2.6
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
