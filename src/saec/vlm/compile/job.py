"""One compilation: a provider works in a temporary folder, which gets its name once everything in it is there."""

from __future__ import annotations

import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from saec.data.hashing import sha256_file
from saec.data.manifest import write_atomic
from saec.errors import BadInput
from saec.vlm.compile.record import LOG, METADATA, MODEL, Compiled, Metadata, Plan, ProviderName
from saec.vlm.compile.source import Source
from saec.vlm.contract.bundle import BundleFile


class Provider(Protocol):
    """A way to compile a graph for a device."""

    @property
    def name(self) -> ProviderName:
        """The name it goes by on the command line."""
        ...

    def plan(self, source: Source) -> Plan:
        """Return what :meth:`compile` would do, without doing any of it.

        Raises:
            BadInput: this graph cannot be compiled by this provider.
        """
        ...

    def compile(self, source: Source, folder: Path) -> Compiled:
        """Write ``model.bin``, and what belongs to it, into a folder.

        Raises:
            BadInput: something that it needs is not configured.
            GateFailed: there is no compiler here, or it failed.
        """
        ...


def run(provider: Provider, source: Source, prefix: Path) -> tuple[Path, Metadata]:
    """Compile into ``<prefix>_<job>/`` and return that folder and its record.

    The folder appears complete or not at all; a compiler's log survives a failure as ``<prefix>_<job>.failed.log``.

    Raises:
        BadInput: the folder cannot be made, or see :class:`Provider`.
        GateFailed: see :class:`Provider`.
    """
    plan = provider.plan(source)
    now = datetime.now(UTC)
    job = f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    final = prefix.with_name(f"{prefix.name}_{job}")
    folder = final.with_name(f".{final.name}.part")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise BadInput(f"cannot write there ({error.strerror})", where=folder.parent) from None
    try:
        result = provider.compile(source, folder)
        files = {path.name: BundleFile(size=path.stat().st_size, sha256=sha256_file(path)) for path in folder.iterdir()}
        made = now.isoformat(timespec="seconds")
        record = Metadata(job=job, made=made, plan=plan, result=result, size=files[MODEL].size, files=files)
        write_atomic(folder / METADATA, record.model_dump_json(indent=1) + "\n")
        folder.rename(final)
    except BaseException:
        log = folder / LOG
        if log.is_file():
            log.rename(final.with_name(f"{final.name}.failed.log"))
        shutil.rmtree(folder)
        raise
    return final, record
