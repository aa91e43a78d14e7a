"""Gates: what was compared, what was measured, what is allowed. No model is needed to compare hashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from saec.errors import GateFailed
from saec.vlm.registry import FileCheck, names, resolve, verify_files


@dataclass(frozen=True, slots=True)
class Gate:
    """One comparison: passed if ``measured`` is at most ``limit``; ``None``: it could not be made."""

    name: str
    limit: float
    measured: float | None
    note: str = ""

    @property
    def passed(self) -> bool:
        """True when the limit holds."""
        return self.measured is not None and self.measured <= self.limit


@dataclass(frozen=True, slots=True)
class Report:
    """All gates of one adapter, or of one model without; ``n`` probe images."""

    model: str
    adapter: str | None
    probe: str
    n: int
    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        """True when all gates are."""
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        gates = [{**asdict(gate), "passed": gate.passed} for gate in self.gates]
        return {**asdict(self), "gates": gates, "passed": self.passed}

    def require(self) -> None:
        """Raise :class:`GateFailed` naming every gate that failed."""
        failed = [gate for gate in self.gates if not gate.passed]
        if failed:
            raise GateFailed("; ".join(_words(gate) for gate in failed))


def files_gate(model: str, adapter: Sequence[FileCheck] = ()) -> Gate:
    """Compare all hashes that somebody stated: of a model of the registry, of an adapter by its run or release.

    Raises:
        BadInput: the model is unknown or not on this machine.
    """
    of_model: tuple[FileCheck, ...] = ()
    if model in names():
        of_model = verify_files(model)
    else:
        resolve(model)  # of a checkpoint's own folder nobody states hashes, but it must be one
    checks = (*of_model, *adapter)
    wrong = [check for check in checks if not check.right]
    notes = [f"{check.path} has sha256 {check.found}, {check.expected} was expected" for check in wrong]
    if not checks:
        notes = ["nobody states hashes of these files"]
    return Gate("files with another hash than stated", 0, len(wrong), "; ".join(notes))


def _words(gate: Gate) -> str:
    measured = (
        "could not be measured" if gate.measured is None else f"{gate.measured:.4g}, at most {gate.limit:g} allowed"
    )
    return f"{gate.name}: {measured}" + (f" ({gate.note})" if gate.note else "")
