"""Applying an update to a folder: decode, check, write the idle slot, prove it on the probe set, switch or drop it.

Everything that could be wrong is found before anything counts: an update that is not this key's, is damaged, is for
another base, or is not newer than all that came before is refused; one whose state is worse on the probe set is
dropped and remembered, so that it cannot come again. Until the switch the version at work is untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from saec.errors import BadInput
from saec.fleet.slots import Slots
from saec.learn.state import State, adapter_state, station_state, write_adapter, write_station
from saec.learn.update import Refused, Update, decode_update, product_of

Probe = Callable[[Path], float]
"""Returns the accuracy [0, 1] of what is in a folder on the probe set."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of an update. ``slot`` is the folder that counts now; ``before`` and ``after`` are accuracies on the
    probe set, ``None`` where there was none; ``kept`` is false for a version that was worse and was dropped."""

    version: int
    slot: Path
    before: float | None
    after: float | None
    kept: bool


def state_of(folder: Path, target: str) -> State:
    """Return the state of a target in a plain folder.

    Raises:
        BadInput: it is not there, or damaged.
    """
    product = product_of(target)
    return adapter_state(folder) if product is None else station_state(folder, product)


def write_state(base: Path, target: str, state: State, out: Path) -> None:
    """Write a copy of the folder ``base`` to ``out`` in which the target has another state.

    Raises:
        BadInput, OSError: the base is damaged, or ``out`` cannot be written.
    """
    product = product_of(target)
    if product is None:
        write_adapter(state, out)
    else:
        write_station(base, {product: state}, out)


def apply_update(
    root: Path, data: bytes, *, key: bytes | None, most: int, probe: Probe | None = None, tolerance: float = 0.0
) -> Applied:
    """Apply an encoded update to the station or adapter at ``root``.

    Args:
        root: the plain folder; versions lie in its slots.
        data: what :func:`saec.learn.update.encode_update` returned.
        key: the cloud service's token, ``None`` where there is none.
        most: bytes that the update may unpack to.
        probe: measures a folder; without one nothing is measured and the update is taken on trust.
        tolerance: accuracy that it may cost on the probe set (``learn.probe_loss``).

    Raises:
        Refused: not this key's, damaged, for another base, not newer than what came before, or the probe set measures
            nothing.
        BadInput: the folder is damaged, or in use by another update, or cannot be written; it is as it was.
    """
    update = decode_update(data, key, most)
    slots = Slots(root)
    with slots.alone():
        _check_version(update, slots)
        current = slots.current()
        new = update.apply(state_of(current, update.target))
        try:
            return _staged(update, slots, current, new, probe, tolerance)
        except OSError as error:
            fix = error.strerror or "check the disk"
            raise BadInput("the update cannot be written; nothing has changed", where=root, fix=fix) from None


def _staged(update: Update, slots: Slots, current: Path, new: State, probe: Probe | None, tolerance: float) -> Applied:
    staged = slots.stage(lambda out: write_state(current, update.target, new, out))
    if state_of(staged, update.target).sha256 != update.new_sha256:
        raise BadInput("the disk has not kept what was written", where=staged, fix="check the disk")
    before, after = (None, None) if probe is None else (_measured(probe, current), _measured(probe, staged))
    note = {"target": update.target, "before": before, "after": after, "figures": dict(update.figures)}
    if before is not None and after is not None and after < before - tolerance:
        slots.refuse(update.version, update.new_sha256, note)
        return Applied(update.version, current, before, after, kept=False)
    slot = slots.switch(update.version, update.new_sha256, note)
    return Applied(update.version, slot, before, after, kept=True)


def _measured(probe: Probe, folder: Path) -> float:
    accuracy = probe(folder)
    if not 0 <= accuracy <= 1:  # of no parts at all, or not a number: neither says that a version is good
        raise Refused("the probe set measures nothing", where=folder, fix="pass labelled parts with --probe")
    return accuracy


def _check_version(update: Update, slots: Slots) -> None:
    seen = slots.pointer
    if update.version <= seen.highest:
        what = (
            f"the update is version {update.version}, and version {seen.highest} was here already: a replay or too old"
        )
        raise Refused(what, where=slots.root, fix="ask for a newer one")
    if update.previous != seen.current.version:
        what = f"the update continues version {update.previous}, here is version {seen.current.version}"
        raise Refused(what, where=slots.root, fix="ask for one for this version")
