"""Parts as they arrive in a folder. A file is taken once it has stopped changing; what is not taken is counted."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from saec.data.decode import IMAGE_SUFFIXES
from saec.data.hashing import sha256_file
from saec.errors import BadInput
from saec.types import Part

State = tuple[int, int]
"""Size in bytes and time of the last change in ns."""


@dataclass(slots=True)
class Watcher:
    """Polls ``folder`` for images.

    A file counts as complete when two polls in a row find the same size and time of change; an empty one is given
    ``patience_s`` to be filled and is then taken as it is, to be recorded as unreadable. A name that comes again with
    other content is a new part, ``name@2``; one that comes again with the same content was inspected already.

    Args:
        folder: where images arrive, in subfolders too; hidden files are somebody's work in progress.
        product_of: names a part's product from its path inside the folder.
        recorded: part ids and content hashes that the run has verdicts of.
        poll_s: pause between two looks; at least as long as a look takes.
        patience_s: how long an empty file may stay empty.
        on_skip: called for each file that will not be inspected.
    """

    folder: Path
    product_of: Callable[[Path], str]
    recorded: Mapping[str, set[str]]
    poll_s: float = 0.5
    patience_s: float = 10.0
    on_skip: Callable[[], None] = lambda: None
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    skipped: Counter[str] = field(default_factory=Counter)
    _seen: dict[Path, State] = field(default_factory=dict)
    _waiting: dict[Path, tuple[State, float]] = field(default_factory=dict)
    _contents: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise BadInput("no such folder to watch", where=self.folder)
        for part_id, hashes in self.recorded.items():
            name, _, version = part_id.rpartition("@")
            again = name in self.recorded and version.isdecimal()
            self._contents.setdefault(name if again else part_id, []).extend(hashes)

    def parts(self) -> Iterator[Part]:
        """Yield parts for ever.

        Raises:
            BadInput: the folder is gone.
        """
        while True:
            begun = self.clock()
            yield from self._look()
            self.sleep(max(self.poll_s, self.clock() - begun))

    def _look(self) -> Iterator[Part]:
        there: set[Path] = set()
        for path in self._files():
            there.add(path)
            try:
                status = path.stat()
            except OSError:
                continue  # gone between listing and looking: counted below if it was waited for
            state = (status.st_size, status.st_mtime_ns)
            if self._seen.get(path) == state:
                continue
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                if path not in self._seen:
                    self._skip("no image")
                self._seen[path] = state
            elif self._complete(path, state):
                part = self._part(path)
                if part is not None:
                    yield part
        for path in self._seen.keys() - there:
            del self._seen[path]
        for path in self._waiting.keys() - there:
            del self._waiting[path]
            self._skip("gone before it was complete")

    def _files(self) -> list[Path]:
        if not self.folder.is_dir():
            raise BadInput("the watched folder is gone", where=self.folder, fix="start again when it is back")
        found: list[Path] = []
        for folder, below, names in os.walk(self.folder, onerror=_refuse):
            below[:] = [name for name in below if not name.startswith(".")]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
        return sorted(found)

    def _complete(self, path: Path, state: State) -> bool:
        known = self._waiting.get(path)
        if known is None or known[0] != state:
            self._waiting[path] = (state, self.clock())
            return False
        if state[0] == 0 and self.clock() - known[1] < self.patience_s:
            return False
        del self._waiting[path]
        self._seen[path] = state
        return True

    def _part(self, path: Path) -> Part | None:
        name = path.relative_to(self.folder).as_posix()
        try:
            sha256 = sha256_file(path)
        except OSError:
            self._skip("gone before it was complete")
            return None
        known = self._contents.setdefault(name, [])
        if sha256 in known:
            return None
        known.append(sha256)
        part_id = name if len(known) == 1 else f"{name}@{len(known)}"
        return Part(part_id, self.product_of(path.relative_to(self.folder)), path)

    def _skip(self, why: str) -> None:
        self.skipped[why] += 1
        self.on_skip()


def product_chooser(products: Sequence[str], product: str | None) -> Callable[[Path], str]:
    """Return how a path names its product: the one given, the station's only one, or its first folder's name."""
    if product is not None and product not in products:
        raise BadInput("the station does not know this product", where=product, fix=f"it knows {', '.join(products)}")
    fixed = product if product is not None else products[0] if len(products) == 1 else None
    return lambda path: fixed if fixed is not None else path.parts[0]


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a subfolder may go away while it is being listed
        raise BadInput("cannot list a folder", where=error.filename, fix=error.strerror or "check its permissions")
