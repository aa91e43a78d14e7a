"""Reference images of good parts, uploaded once and kept decoded by the hash of their bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from saec.types import Image


class ReferenceStore:
    """Decoded reference images by SHA-256 name, the least recently used going first when ``max_bytes`` is reached.

    Thread-safe. The same array is handed out each time, so that a backend may keep what it computed from it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._images: OrderedDict[str, Image] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def put(self, sha256: str, image: Image) -> None:
        """Keep an image. One that is larger than the whole store is dropped again at once."""
        image.setflags(write=False)
        with self._lock:
            self._drop(sha256)
            self._images[sha256] = image
            self._bytes += image.nbytes
            while self._bytes > self._max_bytes:
                self._drop(next(iter(self._images)))

    def missing(self, names: Sequence[str]) -> list[str]:
        """Return the names that are not here, each once."""
        with self._lock:
            return [name for name in dict.fromkeys(names) if name not in self._images]

    def get(self, sha256: str) -> Image:
        """Return an image, or raise ``KeyError`` if it is not (or no longer) here."""
        with self._lock:
            self._images.move_to_end(sha256)
            return self._images[sha256]

    def _drop(self, sha256: str) -> None:
        image = self._images.pop(sha256, None)
        if image is not None:
            self._bytes -= image.nbytes
