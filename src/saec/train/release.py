"""What an adapter folder says about itself, and the folder of a release: the adapter, its record, the hashes of all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from saec import __version__
from saec.data.hashing import sha256_file
from saec.data.manifest import write_atomic
from saec.edge.folder import put_folder
from saec.errors import BadInput
from saec.train.config import TrainSettings, make_train_settings
from saec.train.files import sync
from saec.train.gates import Report
from saec.vlm.registry import FileCheck, names
from saec.vlm.trained import CONFIG, TRAINED_ON, WEIGHTS, read_record, run_record

RECORD = "parity.json"
"""What a release says about itself: the gates it passed, and the SHA-256 of its files."""

FORMAT = "saec-parity/1"


def base_of(folder: Path) -> str:
    """Return the base model that an adapter's training run names, or else its own configuration, if it can be found.

    Raises:
        BadInput: neither names a model that is known here.
    """
    settings = trained_with(folder)
    named = None if settings is None else settings.model
    if named is None:
        named = str(read_record(folder / CONFIG).get("base_model_name_or_path"))
    if named in names() or (Path(named) / "config.json").is_file():
        return named
    raise BadInput(f"the adapter's base {named} is not known here", where=folder, fix="pass --model NAME or FOLDER")


def trained_with(folder: Path) -> TrainSettings | None:
    """Return the settings of the training run that an adapter or a release comes from, where they lie with it."""
    record = run_record(folder)
    return None if record is None else make_train_settings(read_record(record).get("settings", {}), where=str(record))


def check_files(folder: Path) -> tuple[FileCheck, ...]:
    """Hash the files of which a release's record, or the training run, states a SHA-256; maybe none.

    Raises:
        BadInput: the record is damaged.
    """
    stated = _stated_hashes(folder)
    found = {file.name: sha256_file(file) for file in _files(folder) if file.name in stated}
    return tuple(FileCheck(name, sha256, found.get(name)) for name, sha256 in stated.items())


def _stated_hashes(folder: Path) -> dict[str, str]:
    if (folder / RECORD).is_file():
        found = read_record(folder / RECORD)
        if found.get("format") != FORMAT or not isinstance(found.get("files"), dict):
            raise BadInput("not the record of a release", where=folder / RECORD)
        return {str(name): str(sha256) for name, sha256 in found["files"].items()}
    record = run_record(folder)
    if record is not None and (run := read_record(record)).get("release") == folder.name:
        return {WEIGHTS: str(run.get("adapter_sha256"))}
    return {}


def check_target(out: Path) -> None:
    """Refuse a place where a release would replace something else.

    Raises:
        BadInput: it exists and is neither empty nor a release.
    """
    if out.exists() and not (out / RECORD).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise BadInput("this exists and is no release", where=out, fix="choose another folder")


def release(folder: Path, out: Path, report: Report) -> None:
    """Copy an adapter and the record of its training to ``out``, with ``parity.json``; a former release there goes.

    Raises:
        GateFailed: the report names a gate that the adapter did not pass; nothing is written.
        BadInput: ``out`` is something else or cannot be written; a former release stays.
    """
    report.require()
    check_target(out)
    beside = out.with_name(f".{out.name}.new")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for file in (*_files(folder), *_of_the_run(folder)):
            shutil.copyfile(file, beside / file.name)
        _without_paths(run_record(beside))
        hashes = {file.name: sha256_file(file) for file in _files(beside)}
        # Names, not paths: a release says nothing about the machine that it was made on.
        about = report.to_json() | {"model": Path(report.model).name, "adapter": None, "probe": Path(report.probe).name}
        tree = {"format": FORMAT, "version": __version__, **about, "files": hashes}
        write_atomic(beside / RECORD, json.dumps(tree, indent=1, allow_nan=False) + "\n")
        sync(beside)
        put_folder(beside, out)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise BadInput("cannot write the release", where=out, fix=error.strerror or "check the disk") from None


def _without_paths(record: Path | None) -> None:
    """Keep of a run's record the names of base and former adapter, not where they lay on this machine."""
    if record is None:
        return
    run = read_record(record)
    settings = run.get("settings", {})
    settings |= {key: Path(settings[key]).name for key in ("model", "adapter") if settings.get(key)}
    write_atomic(record, json.dumps(run, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _of_the_run(folder: Path) -> list[Path]:
    """Return the run's record and its list of training images: what was trained on must never be tested on."""
    record = run_record(folder)
    if record is None or record.parent == folder:
        return []
    return [path for path in (record, record.with_name(TRAINED_ON)) if path.is_file()]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name != RECORD)
