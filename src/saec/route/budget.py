"""The budget dial: how much of the cloud a run may use, as a share of parts, as bytes, as seconds. Pure state.

The three limits and what each promises:

* ``share``: after *n* parts at most ``ceil(share * n)`` were escalated. The rounding up is the whole burst allowance,
  less than one part: without it the first parts of every run could never be escalated. It depends only on the parts
  and their order, hence a resumed run decides exactly as an undisturbed one.
* ``bytes``, ``seconds``: a question is admitted only if what was spent, plus the expected cost of this question and of
  every one still outstanding, stays within the limit. The expected cost is the mean so far; before the first answer
  it is what the caller expects, cut to the limit so that a small budget still buys one question. The limit can be
  passed only by the amount by which the outstanding questions turn out dearer than that mean. Costs are measured, so
  which part meets a spent budget may differ between two runs; a resumed run continues from what the ledger says was
  spent.

A question counts once it is granted, also when the circuit is open or the cloud fails: failing must not earn credit.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field, replace
from typing import Self

from saec.config import RouteSettings
from saec.fleet.ledger import Spent


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits (``None``: no limit) and what was spent. Methods return a new state."""

    share: float | None = None
    max_bytes: int | None = None
    max_seconds: float | None = None
    spent: Spent = field(default_factory=Spent)

    @classmethod
    def of(cls, settings: RouteSettings, spent: Spent) -> Self:
        """Return the dial that the settings ask for, continuing from what the ledger says was spent."""
        return cls(settings.budget_share, settings.budget_bytes, settings.budget_seconds, spent)

    def part(self) -> Self:
        """Count one more part seen, in part order and before asking :meth:`admits` about it."""
        return replace(self, spent=replace(self.spent, parts=self.spent.parts + 1))

    def admits(self, *, expected_bytes: int, expected_s: float) -> bool:
        """Return whether one more question fits. The expectations count only until the first answer is known."""
        spent = self.spent
        # 0.07 * 100 is a hair above 7 in floating point: without the tolerance the ceiling would be 8.
        if self.share is not None and spent.questions + 1 > math.ceil(self.share * spent.parts - 1e-9):
            return False
        return self._fits(self.max_bytes, spent.uplink_bytes, expected_bytes) and self._fits(
            self.max_seconds, spent.cloud_s, expected_s
        )

    def granted(self) -> Self:
        """Count one more question."""
        return replace(self, spent=replace(self.spent, questions=self.spent.questions + 1))

    def settled(self, *, uplink_bytes: int, cloud_s: float) -> Self:
        """Book what a granted question cost in the end."""
        spent = self.spent
        return replace(
            self,
            spent=replace(
                spent,
                answered=spent.answered + 1,
                uplink_bytes=spent.uplink_bytes + uplink_bytes,
                cloud_s=spent.cloud_s + cloud_s,
            ),
        )

    def _fits(self, limit: float | None, used: float, expected: float) -> bool:
        if limit is None:
            return True
        if limit <= used:
            return False
        price = used / self.spent.answered if self.spent.answered else min(expected, limit)
        outstanding = self.spent.questions - self.spent.answered
        return used + (outstanding + 1) * price <= limit


class SharedBudget:
    """A budget that the edge stage draws on and the cloud stage settles. Thread-safe."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._lock = threading.Lock()

    def part(self) -> None:
        """Count one more part, in part order."""
        with self._lock:
            self._budget = self._budget.part()

    def take(self, *, expected_bytes: int, expected_s: float) -> bool:
        """Grant a question, if it fits."""
        with self._lock:
            fits = self._budget.admits(expected_bytes=expected_bytes, expected_s=expected_s)
            if fits:
                self._budget = self._budget.granted()
            return fits

    def settle(self, *, uplink_bytes: int, cloud_s: float) -> None:
        """Book what a granted question cost."""
        with self._lock:
            self._budget = self._budget.settled(uplink_bytes=uplink_bytes, cloud_s=cloud_s)
