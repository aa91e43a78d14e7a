"""Gates: conditions on the figures of a run, for whoever decides by exit code."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saec.errors import BadInput, GateFailed

_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_GATE = re.compile(r"\s*([a-z_][a-z0-9_.]*)\s*(>=|<=|>|<)\s*([-+.0-9e]+)\s*")


@dataclass(frozen=True, slots=True)
class Gate:
    """``figure`` is a key of ``summary.json``; a dot leads into a nested object, as in ``latency_ms.p99``."""

    figure: str
    sign: str
    limit: float

    def miss(self, summary: Mapping[str, Any]) -> str | None:
        """Return in words how the run misses this gate, or ``None``. A figure that was not measured is a miss.

        Raises:
            BadInput: there is no such figure.
        """
        value: Any = summary
        for step in self.figure.split("."):
            if not isinstance(value, Mapping) or step not in value:
                raise BadInput("no such figure", where=self.figure, fix="a key of summary.json, such as accuracy")
            value = value[step]
        if value is None:
            return f"{self.figure} was not measured, {self.sign} {self.limit:g} was asked"
        if not isinstance(value, int | float):
            raise BadInput("not a figure", where=self.figure, fix="a number of summary.json, such as accuracy")
        if _COMPARE[self.sign](value, self.limit):
            return None
        return f"{self.figure} is {value:.4g}, {self.sign} {self.limit:g} was asked"


def parse_gate(text: str) -> Gate:
    """Return the gate that ``accuracy>=0.9`` means.

    Raises:
        BadInput: not of that form.
    """
    found = _GATE.fullmatch(text)
    try:
        if found is not None:
            return Gate(found[1], found[2], float(found[3]))
    except ValueError:
        pass
    raise BadInput("not a gate", where=text, fix="write FIGURE>=VALUE, for example accuracy>=0.9")


def require(gates: Sequence[Gate], summary: Mapping[str, Any]) -> None:
    """Hold a run's summary against all gates.

    Raises:
        GateFailed: naming every gate that was missed.
        BadInput: a gate on something that is no figure.
    """
    misses = [miss for gate in gates if (miss := gate.miss(summary)) is not None]
    if misses:
        raise GateFailed("; ".join(misses))
