"""The manifest of a built data set: which image, with which content, is in which split, and how it was chosen.

It lies as ``manifest.json`` in the root of the set, holds no absolute path, and is written atomically.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from saec.data.dataset import SPLITS, list_images
from saec.data.hashing import sha256_file
from saec.errors import BadInput
from saec.types import Label, Part

MANIFEST_NAME = "manifest.json"
FORMAT = "saec-data/1"

Parameter = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One image: ``path`` in the set and ``source`` in what it was built from, both relative POSIX paths.

    ``group`` is the same for images of the same content (byte-identical or near-duplicate, or taken of one item).
    ``probability`` is the source's own P(defect) where it states one.
    """

    path: str
    sha256: str
    group: str
    product: str
    label: Label
    split: str
    kind: str
    source: str
    probability: float | None = None
    mask: str | None = None

    def as_part(self, root: Path) -> Part:
        """Return the part below ``root``."""
        mask = root / self.mask if self.mask else None
        return Part(self.path, self.product, root / self.path, self.label, self.split, self.kind, mask)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A built data set. ``parameters`` are the command's own; ``notes`` say in words what was left out and why."""

    dataset: str
    command: str
    seed: int
    entries: tuple[ManifestEntry, ...]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return numbers of images by product, split and label."""
        table: dict[str, dict[str, dict[str, int]]] = {}
        for entry in self.entries:
            row = table.setdefault(entry.product, {}).setdefault(entry.split, {})
            row[str(entry.label)] = row.get(str(entry.label), 0) + 1
        return table

    def files(self) -> tuple[str, ...]:
        """Return the paths of all images and masks."""
        return tuple(path for entry in self.entries for path in (entry.path, entry.mask) if path is not None)

    def to_json(self) -> str:
        """Return the file's text; the same manifest always gives the same text."""
        entries = [{k: v for k, v in asdict(entry).items() if v is not None} for entry in self.entries]
        head = {
            "format": FORMAT,
            "dataset": self.dataset,
            "command": self.command,
            "seed": self.seed,
            "parameters": dict(self.parameters),
            "notes": list(self.notes),
        }
        # One image a line: a diff of two manifests shows the images that differ.
        lines = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in entries)
        return json.dumps(head, ensure_ascii=False, indent=1)[:-2] + f',\n "images": [\n{lines}\n ]\n}}\n'

    def write(self, file: Path) -> None:
        """Write the file atomically (temporary sibling, fsync, rename)."""
        write_atomic(file, self.to_json())


def write_atomic(file: Path, content: str | bytes) -> None:
    """Replace ``file`` by ``content`` so that a reader, or a power cut, sees the old or the new, no mixture.

    Text is written in UTF-8.

    Raises:
        OSError: the folder cannot be written to; nothing is left behind.
    """
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_manifest(file: Path) -> Manifest:
    """Read a manifest; ``file`` may be the folder that holds it.

    Raises:
        BadInput: not there, not a manifest, of another format version, or with paths that lead out of the folder.
    """
    if file.is_dir():
        file = file / MANIFEST_NAME
    try:
        tree: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput("cannot read the manifest", where=file, fix=error.strerror or "check the path") from None
    except ValueError as error:
        raise BadInput(f"the manifest is not JSON ({error})", where=file, fix="build the folder anew") from None
    if not isinstance(tree, dict) or not str(tree.get("format", "")).startswith("saec-data/"):
        raise BadInput("not a manifest of saec data", where=file, fix="read the folder with another --kind")
    if tree["format"] != FORMAT:
        raise BadInput(f"manifest of another version ({tree['format']})", where=file, fix="build the folder anew")
    try:
        return Manifest(
            dataset=str(tree["dataset"]),
            command=str(tree["command"]),
            seed=int(tree["seed"]),
            entries=tuple(_entry(item) for item in tree["images"]),
            parameters=dict(tree["parameters"]),
            notes=tuple(str(note) for note in tree["notes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"damaged manifest ({error})", where=file, fix="build the folder anew") from None


def _entry(item: Mapping[str, Any]) -> ManifestEntry:
    entry = ManifestEntry(**{**item, "label": Label(item["label"])})
    for path in (entry.path, entry.mask or ""):
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"path {path!r} leads out of the folder")
    if entry.split not in SPLITS or len(entry.sha256) != 64:
        raise ValueError(f"bad entry of {entry.path!r}")
    return entry


@dataclass(frozen=True, slots=True)
class Tampering:
    """What differs between a folder and its manifest; all empty when nothing does. Relative POSIX paths."""

    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changed or self.missing or self.added)


def verify_manifest(root: Path) -> Tampering:
    """Hash every image of a built folder again and compare with its manifest.

    Raises:
        BadInput: there is no manifest, or it is damaged.
    """
    manifest = load_manifest(root / MANIFEST_NAME)
    listed = {entry.path: entry.sha256 for entry in manifest.entries}
    files = manifest.files()
    present = {path for path in files if (root / path).is_file()}
    found = {str(path) for path in list_images(root)}
    return Tampering(
        changed=tuple(path for path in listed if path in present and sha256_file(root / path) != listed[path]),
        missing=tuple(path for path in files if path not in present),
        added=tuple(sorted(found - set(files))),
    )
