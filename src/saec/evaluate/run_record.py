"""What a run folder says about how it was made: ``manifest.json``."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from saec import __version__
from saec.calibrate import content_digest
from saec.config import Settings
from saec.types import Verdict

FORMAT = "saec-run/1"
ASK_ALWAYS = "ask-always"
"""The router's name in a run that a sweep has recorded."""

_PACKAGES = ("numpy", "opencv-python-headless", "onnxruntime")
_SECRETS = frozenset({"token", "api_key"})


class StationRecord(Protocol):
    """What a station says about itself."""

    @property
    def sha256(self) -> str:
        """Hash over everything that decides its verdicts."""
        ...

    @property
    def dataset(self) -> str:
        """Name of the data set it was fitted on."""
        ...

    @property
    def version(self) -> str:
        """Version of saec that fitted it."""
        ...

    @property
    def train_sha256(self) -> Sequence[str]:
        """Content hashes of the images that it was fitted on."""
        ...

    @property
    def calibration_sha256(self) -> Sequence[str]:
        """Content hashes of the images that it was calibrated on."""
        ...


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def manifest(
    *,
    name: str,
    command: Sequence[str],
    started: str,
    resumed: bool,
    station: StationRecord,
    cloud: str | None,
    settings: Settings,
    verdicts: Sequence[Verdict],
    pending: int,
    unexplained: int,
    heatmaps_failed: int,
) -> dict[str, Any]:
    """Return the manifest of a run as plain JSON types: enough to repeat it and to prove what it was made on.

    ``cloud`` is the model asked, ``None`` without one. ``data.sha256`` is the hash over the sorted hashes of all images
    (:func:`saec.calibrate.content_digest`). Tokens and keys are left out of the settings.
    """
    return {
        "format": FORMAT,
        "name": name,
        "mode": settings.route.mode,
        "command": list(command),
        "saec": __version__,
        "started": started,
        "finished": now(),
        "resumed": resumed,
        "pending": pending,
        "unexplained": unexplained,
        "station": {"sha256": station.sha256, "dataset": station.dataset, "saec": station.version},
        "cloud": cloud,
        "data": {"parts": len(verdicts), "sha256": content_digest(v.sha256 for v in verdicts)},
        "heatmaps_failed": heatmaps_failed,
        "settings": shown_settings(settings),
        "environment": environment(),
    }


def shown_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain JSON types; a token or key that is set reads ``(hidden)``."""
    tree: dict[str, dict[str, Any]] = settings.model_dump(mode="json")
    return {
        section: {key: "(hidden)" if key in _SECRETS and value is not None else value for key, value in values.items()}
        for section, values in tree.items()
    }


def environment() -> dict[str, Any]:
    """Return machine, system and the versions of what computes."""
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        **{package: metadata.version(package) for package in _PACKAGES},
    }


def cpu_name() -> str:
    """Return the processor's name, or its architecture where the system tells no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # only Linux has it
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
