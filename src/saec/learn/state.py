"""What a learning step may change of one thing: a product of a station, or an adapter.

All else in its folder (a reference image, an ONNX classifier) stays what it is, and is never sent. A tensor of the
folder's main file has its own name, such as ``0.bank``; those of other files have the file's before it:
``replay/features``. The document holds each JSON file under its name.

Names come from updates too, and become files: only those of a product's and an adapter's own files are taken.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as dump_tensors

from saec.edge.folder import read_checked, write_folder
from saec.edge.station import INDEX, MODEL, StationManifest, folder_name, read_manifest
from saec.errors import BadInput
from saec.vlm.trained import CONFIG, ORIGIN, RUN, TRAINED_ON, WEIGHTS, check_adapter, read_record, run_record

Tensors = Mapping[str, NDArray[Any]]

LEARNT = "replay/sha256"
"""The tensor [n, 32] uint8 of a product that names the images it was taught with; so does an adapter's."""

FORGOTTEN = "replay/forgotten"
"""The tensor [m, 32] uint8 of a product, if any, that names those that its full replay has dropped."""

BANKS = "memory.safetensors"
_MAIN = (BANKS, WEIGHTS)
_STEMS: Mapping[str, tuple[str, ...]] = {BANKS: ("head", "replay"), WEIGHTS: ()}
"""The tensor files beside the main one."""
_DOCUMENTS: Mapping[str, tuple[str, ...]] = {BANKS: (MODEL,), WEIGHTS: (CONFIG, ORIGIN, RUN)}
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,256}")
_TENSORS, _JSON = ".safetensors", ".json"
_MANIFEST = TypeAdapter(StationManifest)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """``tensors`` by name, of any dtype that NumPy and safetensors share; ``document`` is plain JSON."""

    tensors: Tensors
    document: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """The state's identity: a hash over names, dtypes, shapes and bytes of the tensors, and over the document."""
        return digest(self.tensors, self.document).hex()


def digest(tensors: Tensors, document: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 over tensors and document, the same on every machine."""
    found = hashlib.sha256(json.dumps(document, sort_keys=True, allow_nan=False).encode())
    for name in sorted(tensors):
        value = np.asarray(tensors[name], order="C")
        little = value.astype(value.dtype.newbyteorder("<"), copy=False)
        found.update(f"\n{len(name)} {name} {little.dtype.str} {value.shape}\n".encode())
        found.update(little.tobytes())
    return found.digest()


# -- files of one folder


def check_names(tensors: Iterable[str], documents: Iterable[str], main: str) -> None:
    """Refuse names that a product (``main`` is :data:`BANKS`) or an adapter (``WEIGHTS``) does not have.

    Raises:
        BadInput: a tensor or a document would become another file than one of theirs.
    """
    for name in tensors:
        stem, slash, key = name.rpartition("/")
        known = not slash or stem in _STEMS[main] or name == LEARNT  # an adapter's list of images is a text file
        if not known or not _KEY.fullmatch(key):
            raise BadInput("no tensor of a station or an adapter has this name", where=_shown(name))
    for name in documents:
        if name not in _DOCUMENTS[main]:
            raise BadInput("no document of a station or an adapter has this name", where=_shown(name))


def _shown(name: str) -> str:
    return f"{name!a:.80}"


def state_of_files(files: Mapping[str, bytes]) -> State:
    """Return the state in the files of a product's or an adapter's folder, given by name; others are left out.

    Raises:
        BadInput: a file that is not what its name says.
    """
    tensors: dict[str, NDArray[Any]] = {}
    document: dict[str, Any] = {}
    for name, data in sorted(files.items()):
        try:
            if name.endswith(_TENSORS):
                prefix = "" if name in _MAIN else f"{name.removesuffix(_TENSORS)}/"
                tensors |= {prefix + key: value for key, value in load_tensors(data).items()}
            elif name.endswith(_JSON):
                document[name] = json.loads(data)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"cannot be read ({error})", where=name, fix="restore the file") from None
    return State(tensors, document)


def files_of_state(state: State, main: str) -> dict[str, bytes]:
    """Return the files that :func:`state_of_files` reads the same state from; ``main`` holds the plain names.

    Raises:
        BadInput: a name that is not one of these files', see :func:`check_names`.
    """
    check_names(state.tensors, state.document, main)
    groups: dict[str, dict[str, NDArray[Any]]] = {}
    for name in sorted(state.tensors):
        stem, _, key = name.rpartition("/")
        groups.setdefault(f"{stem}{_TENSORS}" if stem else main, {})[key] = np.asarray(state.tensors[name], order="C")
    metadata = {"format": "pt"} if main == WEIGHTS else None  # as PEFT writes it
    files = {name: dump_tensors(tensors, metadata=metadata) for name, tensors in groups.items()}
    return files | {name: json.dumps(tree, indent=1).encode() for name, tree in state.document.items()}


# -- stations


def station_state(folder: Path, product: str) -> State:
    """Return the state of one product of a station's plain folder, each file checked against its hash.

    Raises:
        BadInput: no station, a damaged one, or another's product.
    """
    manifest = read_manifest(folder)
    if product not in manifest.products:
        fix = f"it knows {', '.join(manifest.products)}"
        raise BadInput("the station does not know this product", where=product, fix=fix)
    inside = f"{folder_name(product)}/"
    return state_of_files(
        {
            name.removeprefix(inside): read_checked(folder, name, sha256, kind="station")
            for name, sha256 in manifest.files.items()
            if name.startswith(inside)
        }
    )


def write_station(base: Path, states: Mapping[str, State], out: Path) -> None:
    """Write a copy of the station ``base`` to ``out`` in which each product of ``states`` has that state.

    Images that taught it are added to those that it was fitted on: nobody may evaluate on them unawares.

    Raises:
        BadInput: the base is damaged, a state has names that no product has, or ``out`` cannot be written.
    """
    manifest = read_manifest(base)
    files = {name: read_checked(base, name, sha256, kind="station") for name, sha256 in manifest.files.items()}
    learnt = set(manifest.train_sha256)
    for product, state in states.items():
        inside = folder_name(product)
        new = files_of_state(state, BANKS)
        files = {name: data for name, data in files.items() if not _replaced(name, inside)}
        files |= {f"{inside}/{name}": data for name, data in new.items()}
        learnt |= set(_hashes(state)) - set(manifest.calibration_sha256)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    manifest = replace(manifest, files=hashes, train_sha256=tuple(sorted(learnt)))
    write_folder(out, files, INDEX, _MANIFEST.dump_python(manifest, mode="json"), kind="station")


def _replaced(name: str, inside: str) -> bool:
    return name.startswith(f"{inside}/") and name.endswith((_TENSORS, _JSON))


# -- adapters


def adapter_state(folder: Path) -> State:
    """Return the state of an adapter's folder: weights, configuration, origin, the record of its training, its images.

    Raises:
        BadInput: no adapter, or a damaged one.
    """
    check_adapter(folder)
    record = run_record(folder)
    names = [name for name in (WEIGHTS, CONFIG, ORIGIN) if (folder / name).is_file()]
    state = state_of_files({name: (folder / name).read_bytes() for name in names})
    if record is None:
        return state
    images = record.with_name(TRAINED_ON)
    lines = images.read_text(encoding="utf-8").splitlines() if images.is_file() else []
    try:
        hashes = b"".join(bytes.fromhex(line.split()[0]) for line in lines if line.strip())
        learnt = np.frombuffer(hashes, dtype=np.uint8).reshape(-1, 32)
    except ValueError as error:
        raise BadInput(f"not a list of images ({error})", where=images, fix="restore the file") from None
    return State({**state.tensors, LEARNT: learnt}, {**state.document, RUN: read_record(record)})


def write_adapter(state: State, out: Path) -> None:
    """Write an adapter's folder that :func:`adapter_state` reads the same state from.

    Raises:
        BadInput: names that no adapter has, or no list of images; nothing is written.
        OSError: it cannot be written.
    """
    weights = {name: value for name, value in state.tensors.items() if name != LEARNT}
    files = files_of_state(State(weights, state.document), WEIGHTS)
    if LEARNT in state.tensors:
        files[TRAINED_ON] = "".join(f"{sha256}\n" for sha256 in _hashes(state)).encode()
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (out / name).write_bytes(data)


def _hashes(state: State) -> list[str]:
    found = []
    for name in (LEARNT, FORGOTTEN):
        rows = state.tensors.get(name, np.empty((0, 32), np.uint8))
        if rows.dtype != np.uint8 or rows.shape[1:] != (32,):
            raise BadInput("not a list of images", where=name, fix="restore the file, or ask for another update")
        found += [row.tobytes().hex() for row in rows]
    return found
