"""The probe set: parts of the line's own that are never taught, on which an update has to prove itself.

It lies in the folder of the line's rounds: the images as they were, and what was said about them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from saec.config import Settings
from saec.data.decode import UnreadableImage, read_with_hash
from saec.data.hashing import sha256_file
from saec.edge.station import Station
from saec.learn.rulings import OPINIONS, Ruling, open_rulings
from saec.learn.samples import for_probe
from saec.learn.teaching import counts
from saec.types import Image, Label, Verdict

PROBE = "probe"

MOST = 100
"""Parts of the probe set, the latest ones."""

PROVEN_FROM = 5
"""Parts from which a probe set proves something: with fewer, one part that goes either way by chance is more than the
fifth that an update may lose anyhow. An update measured on fewer is applied, and is said to be not proven."""

_ROUNDING = 1e-9
"""Of accuracies: 5/6 - 1/6 is a little more than 4/6."""


def allowed_loss(parts: int, probe_loss: float) -> float:
    """Return the accuracy that an update may cost on a probe set: ``probe_loss``, but one part more or less is chance.

    The one rule for ``saec learn once`` and ``saec learn apply``. It holds below :data:`PROVEN_FROM` too: more than one
    part lost is a loss, though one part kept proves nothing.
    """
    return max(probe_loss, 1 / max(1, parts)) + _ROUNDING


def is_proven(parts: int) -> bool:
    """Return whether so many parts prove an update, see :data:`PROVEN_FROM`."""
    return parts >= PROVEN_FROM


def keep_for_probe(home: Path, verdict: Verdict) -> None:
    """Keep the image of a sample where it is one for the probe set."""
    if for_probe(verdict.sha256):
        (home / PROBE).mkdir(exist_ok=True)
        kept = home / PROBE / verdict.sha256
        partial = kept.with_name(f".{kept.name}")  # a copy that a kill cuts off must not pass for the image
        shutil.copyfile(verdict.path, partial)
        partial.replace(kept)


def probe_set(home: Path, rulings: Sequence[Ruling], settings: Settings) -> list[Ruling]:
    """Return the rulings on the probe set, people's and sure ones: those kept so far, and of ``rulings``.

    Each part counts once, with the latest ruling, and only while its image is what it was.
    """
    latest = {
        each.sha256: each
        for each in (*open_rulings(home / OPINIONS), *rulings)
        if for_probe(each.sha256) and counts(each, settings.learn) and (home / PROBE / each.sha256).is_file()
    }
    whole = [each for each in latest.values() if sha256_file(home / PROBE / each.sha256) == each.sha256]
    return whole[-MOST:]


def probe_of(home: Path, product: str, probes: Sequence[Ruling], settings: Settings) -> Callable[[Path], float]:
    """Return what measures a station's folder: its accuracy on the probe set."""

    def accuracy(folder: Path) -> float:
        station = Station.load(folder, settings=settings)
        tau = station.calibration(product).thresholds.tau_edge
        right = []
        for ruling in probes:
            image = own_image(home / PROBE / ruling.sha256, ruling.sha256, settings)
            if image is not None:
                called = station.predict(image, product).p_defect >= tau
                right.append(called == (ruling.label is Label.DEFECT))
        return float(np.mean(right)) if right else 1.0

    return accuracy


def tidy_probe_set(home: Path, settings: Settings) -> None:
    """Remove the images that are not of the probe set any more, or never came to be."""
    kept = {each.sha256 for each in probe_set(home, (), settings)}
    for file in (home / PROBE).glob("*"):
        if file.name not in kept:
            file.unlink()


def own_image(path: Path, sha256: str, settings: Settings) -> Image | None:
    """Return the image whose file has this hash; ``None`` where it is gone or has become another."""
    try:
        found, image = read_with_hash(path, max_pixels=settings.data.max_pixels)
    except UnreadableImage:
        return None
    return image if found == sha256 else None
