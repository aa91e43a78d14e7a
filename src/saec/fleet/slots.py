"""Slots: versions of a folder beside it, of which one counts, so that a change is whole or not there, and can go back.

    ROOT/…                   version 0: what was fitted or shipped, never touched
    ROOT/slots/3-1a2b3c4d/   a version; the one that counts and the one before it stay, older ones go
              /current.json  which one counts, which was before it, and what became of every version

A version is written beside the others, synced, and given its name; then the pointer is replaced in one step. A kill at
any moment leaves the old version or the new one. A reader takes the path of :meth:`Slots.current` and keeps it: what it
reads is not removed before the second switch after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from saec.errors import BadInput
from saec.fleet.sqlite_file import lock, sync_folder

SLOTS, POINTER = "slots", "current.json"

VERSION_ROLE = "version"
"""Under this key the models of a verdict name the version that judged, where it is not version 0."""

_STAGED = ".staged"
_KEPT = 200  # entries of the history


@dataclass(frozen=True, slots=True)
class Version:
    """A version by number and by the hash of its state; version 0 is the plain folder, whose hash is ``""``."""

    version: int = 0
    sha256: str = ""

    @property
    def name(self) -> str:
        """The name of its folder among the slots."""
        return f"{self.version}-{self.sha256[:8]}"


@dataclass(frozen=True, slots=True)
class Pointer:
    """What ``current.json`` holds. ``highest`` is the highest version that ever counted or was refused by its probe:
    an update that is not above it is a replay. ``history`` has the newest entry last."""

    current: Version = Version()
    previous: Version | None = None
    highest: int = 0
    history: tuple[Mapping[str, Any], ...] = field(default_factory=tuple)


class Slots:
    """The versions of one folder. Reading needs no lock; one process at a time may change them (:meth:`alone`)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folder = root / SLOTS

    @property
    def pointer(self) -> Pointer:
        """What counts now.

        Raises:
            BadInput: the pointer is damaged.
        """
        file = self._folder / POINTER
        try:
            tree = json.loads(file.read_bytes())
            seal = tree.pop("seal")
            found = Pointer(
                Version(**tree["current"]),
                None if tree["previous"] is None else Version(**tree["previous"]),
                int(tree["highest"]),
                tuple(tree["history"]),
            )
        except (FileNotFoundError, NotADirectoryError):
            return Pointer()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(file, str(error)) from None
        if seal != _seal(tree):
            raise _damaged(file, "it is not what was written")
        return found

    def current(self) -> Path:
        """Return the folder of the version that counts: the root itself where nothing was applied, or all taken back.

        Raises:
            BadInput: the pointer is damaged, or its version is gone.
        """
        return self.folder_of(self.pointer.current)

    def folder_of(self, version: Version) -> Path:
        """Return the folder of a version.

        Raises:
            BadInput: it is gone.
        """
        if version.version == 0:
            return self.root
        folder = self._folder / version.name
        if not folder.is_dir():
            raise _damaged(folder, "the version that counts is gone")
        return folder

    def kept(self) -> tuple[Version, ...]:
        """Return the versions whose folders are here, the plain folder first, then from the oldest on.

        Raises:
            BadInput: the pointer is damaged.
        """
        pointer = self.pointer
        known = {Version(note["version"], note["sha256"]) for note in pointer.history} | {pointer.current}
        there = (version for version in known if version.version and (self._folder / version.name).is_dir())
        return (Version(), *sorted(there, key=lambda version: version.version))

    def mark(self) -> tuple[int, int]:
        """Return what changes whenever the pointer does, at the price of one ``stat``."""
        try:
            status = (self._folder / POINTER).stat()
        except OSError:
            return (0, 0)
        return (status.st_ino, status.st_mtime_ns)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from changing the slots inside the block; the system ends it with the process.

        Raises:
            BadInput: another process is at it, or the folder cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            held = lock(self._folder / POINTER)
        except (OSError, sqlite3.Error) as error:
            what = f"the slots cannot be changed now ({error})"
            raise BadInput(what, where=self._folder, fix="wait for the other process, or check the folder") from None
        with closing(held):
            yield

    def stage(self, fill: Callable[[Path], None]) -> Path:
        """Have ``fill`` write a folder that does not count yet; whatever it raises leaves no trace that matters.

        Raises:
            OSError: the disk refuses.
        """
        staged = self._folder / _STAGED
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        fill(staged)
        _sync(staged)
        return staged

    def switch(self, version: int, sha256: str, note: Mapping[str, Any] | None = None) -> Path:
        """Let what was staged count from now on, as this version; ``note`` (JSON) goes into the history.

        Raises:
            BadInput: a version that is not above all earlier ones, or the pointer is damaged.
            OSError: the disk refuses; the old version counts.
        """
        before = self.pointer
        if version <= before.highest:
            raise BadInput(f"version {version} is not above {before.highest}", where=self.root)
        new = Version(version, sha256)
        folder = self._folder / new.name
        if folder.exists():  # named, but a kill came before the pointer
            shutil.rmtree(folder)
        (self._folder / _STAGED).rename(folder)
        sync_folder(self._folder)
        self._point(
            _noted(replace(before, current=new, previous=before.current, highest=version), "applied", new, note)
        )
        self._tidy({new.name, before.current.name})
        return folder

    def refuse(self, version: int, sha256: str, note: Mapping[str, Any]) -> None:
        """Drop what was staged, and remember that this version came and was not good enough.

        Raises:
            OSError: the disk refuses.
        """
        before = self.pointer
        shutil.rmtree(self._folder / _STAGED, ignore_errors=True)
        self._point(_noted(replace(before, highest=version), "refused", Version(version, sha256), note))

    def back(self) -> Version:
        """Let the version before the current one count again, and return it; a second time, version 0.

        Raises:
            BadInput: the current one is version 0, or the pointer is damaged.
            OSError: the disk refuses; the current version counts.
        """
        before = self.pointer
        if before.current.version == 0:
            raise BadInput("nothing to take back: the plain folder counts", where=self.root)
        to = before.previous or Version()
        self.folder_of(to)
        self._point(_noted(replace(before, current=to, previous=None), "taken back", before.current, None))
        return to

    def _point(self, pointer: Pointer) -> None:
        file = self._folder / POINTER
        tree = json.loads(json.dumps(asdict(replace(pointer, history=pointer.history[-_KEPT:])), allow_nan=False))
        partial = file.with_name(f".{file.name}.part")
        with partial.open("w", encoding="utf-8") as stream:
            json.dump({**tree, "seal": _seal(tree)}, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
        sync_folder(self._folder)

    def _tidy(self, kept: set[str]) -> None:
        for folder in self._folder.iterdir():
            if folder.is_dir() and folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def current_folder(root: Path) -> Path:
    """Return the folder to read in place of ``root``: its version that counts. See :meth:`Slots.current`."""
    return Slots(root).current()


def _noted(pointer: Pointer, what: str, version: Version, note: Mapping[str, Any] | None) -> Pointer:
    when = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"what": what, **asdict(version), "when": when, **(note or {})}
    return replace(pointer, history=(*pointer.history, entry))


def _sync(folder: Path) -> None:
    """Make everything in a folder durable, files before the folders that name them."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            with Path(path, name).open("rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(Path(path))


def _seal(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _damaged(where: Path, why: str) -> BadInput:
    fix = f"remove the folder {SLOTS} to go on with what was fitted"
    return BadInput(f"the versions are damaged ({why})", where=where, fix=fix)
