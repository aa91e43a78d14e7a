"""Audits: now and then the cloud sees a part that the edge is sure of, for only a random look finds a sure mistake.

In quiet times that is ``learn.audit_share`` of such parts, and ``learn.drift_share`` while the drift watch of their
product has an alarm. The watch judges by what the edge itself saw, in part order, so that a resumed run audits the same
parts as an undisturbed one.
"""

from __future__ import annotations

from dataclasses import replace

from saec.calibrate.drift import LOCAL, DriftWatch
from saec.calibrate.policy import Policy
from saec.config import LearnSettings
from saec.types import Verdict


class Audits:
    """The drift watches of a run's products. Used by one thread."""

    def __init__(self, settings: LearnSettings) -> None:
        self._settings = settings
        self._watches: dict[str, tuple[Policy, DriftWatch]] = {}

    @property
    def wanted(self) -> bool:
        """Whether anything is audited at all."""
        return self._settings.audit_share > 0

    def policy(self, product: str, policy: Policy) -> Policy:
        """Return the policy with the share that is audited now."""
        if not self.wanted:
            return policy
        watch = self._watch(product, policy)
        drifts = watch is not None and any(alarm.kind in LOCAL for alarm in watch.alarms())
        return replace(policy, audit_share=self._settings.drift_share if drifts else self._settings.audit_share)

    def saw(self, verdict: Verdict, policy: Policy) -> None:
        """Take a local verdict, in part order; ``policy`` is the station's own for its product."""
        watch = self._watch(verdict.product, policy) if self.wanted else None
        if watch is not None:
            watch.saw(verdict)

    def _watch(self, product: str, policy: Policy) -> DriftWatch | None:
        """Return the product's watch, a new one where the calibration is another; ``None`` for old stations."""
        if policy.drift is None:
            return None
        known = self._watches.get(product)
        if known is None or known[0].drift != policy.drift:
            known = self._watches[product] = policy, DriftWatch(policy.drift, policy.thresholds)
        return known[1]
