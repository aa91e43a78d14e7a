"""Has the line moved away from its calibration? A sliding window over the verdicts, and alarms with their evidence.

Calibrated confidence does not survive drift: of 276 good poly solar cells judged by a station for mono not one was
"uncertain", and all were rejected. So the watch does not ask the confidences but compares distributions, in a way that
does not depend on how many defects come: the window's scores F_n are held against the mixture
(1 - s) F_good + s F_defect of the calibration with the share s that explains them best,

    D = min_s max_x |F_n(x) - (1 - s) F_good(x) - s F_defect(x)|     (Kolmogorov-Smirnov, s free)

and D alarms above c sqrt(1/n + (1-s)^2/n_good + s^2/n_defect), c = sqrt(ln(2/a)/2) for the error probability a = ALPHA
of one look at exchangeable parts; a free s only lowers D. Around it stand the failure signatures of SAEC.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from saec.calibrate._numeric import Floats, binomial_cdf
from saec.calibrate.thresholds import Thresholds, escalation_mask
from saec.types import Label, Reason, Verdict, Where

WINDOW = 50
"""Parts that are looked at together; likewise labelled parts. Twice as many notice drift half again as late."""

FEWEST = 30
"""Parts before the first look."""

EVERY = 5
"""Parts from one look to the next."""

ALPHA = 1e-3
"""Error probability of one look at one statistic. On undrifted ELPV cells with 5 to 80 % defects the distributions gave
3 alarms in 40,000 parts."""

DROP = 0.10
"""Loss of accuracy that is an alarm (saec.md)."""

CROWDED = 0.80
"""Share of parts escalated for doubt, or rejected, that is an alarm; half-way from the usual one to all, where that is
more."""

UNANSWERED = 0.20
"""Share of questions without an answer in time that is an alarm."""

MIN_CLASS = 10
"""Fewer calibration parts of a class than this are no distribution."""

Bools = NDArray[np.bool_]

_SHARES = np.linspace(0, 1, 51)
_LEVELS = np.linspace(0, 1, 65)
_HAIR = 1e-5  # the quantiles are kept to six digits
_DOUBTS = frozenset({Reason.SCENE_COMPLEX, Reason.LOW_SMAX, Reason.LOW_MARGIN, Reason.HIGH_ENTROPY, Reason.IN_BAND})
_LOST = frozenset({Reason.CLOUD_TIMEOUT, Reason.CLOUD_REFUSED, Reason.CLOUD_UNREACHABLE, Reason.CIRCUIT_OPEN})

Kind = Literal["score", "scene", "rejects", "escalation", "accuracy", "cascade", "cloud lost", "cloud slow"]
LOCAL: frozenset[Kind] = frozenset({"score", "scene", "rejects", "escalation"})
"""Alarms that rest on nothing but what the edge saw: the same in a run and in the run that resumes it."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The calibration parts, in short: 65 quantiles of raw score and scene score, and what to expect.

    ``*_defect`` are empty with fewer than :data:`MIN_CLASS` defects. ``disagreement_kept`` and ``disagreement_sent``
    are the shares of the parts kept and escalated by the rule on which the edge's label is not the cloud's, where the
    cloud was asked, or not the true one.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    n_good: int
    n_defect: int
    score_good: tuple[float, ...]
    score_defect: tuple[float, ...]
    scene_good: tuple[float, ...]
    scene_defect: tuple[float, ...]
    rejects: float
    escalation: float
    disagreement_kept: float
    disagreement_sent: float

    @classmethod
    def of(
        cls, scores: Floats, scene: Floats, p_edge: Floats, bad: Bools, label: Bools, thresholds: Thresholds
    ) -> Self:
        """Take it from calibration parts, vectors [n]: ``bad`` are the defects, ``label`` the one to agree with."""
        with_defects = int(bad.sum()) >= MIN_CLASS
        rejected, sent = p_edge >= thresholds.tau_edge, escalation_mask(thresholds, scene, p_edge)
        wrong = rejected != label
        return cls(
            n_good=int((~bad).sum()),
            n_defect=int(bad.sum()),
            score_good=_quantiles(scores[~bad]),
            score_defect=_quantiles(scores[bad]) if with_defects else (),
            scene_good=_quantiles(scene[~bad]),
            scene_defect=_quantiles(scene[bad]) if with_defects else (),
            rejects=float(rejected.mean()),
            escalation=float(sent.mean()),
            disagreement_kept=_mean(wrong[~sent]),
            disagreement_sent=_mean(wrong[sent]),
        )


@dataclass(frozen=True, slots=True)
class Alarm:
    """What is out of order: ``value`` passed ``limit`` over ``n`` parts, first after part ``since`` of the watch."""

    kind: Kind
    value: float
    limit: float
    n: int
    since: int
    statement: str


class DriftWatch:
    """Watches one product's verdicts. Pure state: the same verdicts in the same order give the same alarms."""

    def __init__(
        self, reference: Reference, thresholds: Thresholds, *, slow_ms: float = math.inf, window: int = WINDOW
    ) -> None:
        """``slow_ms``: an alarm when a tenth of the answers takes longer, waiting included."""
        self._reference, self._thresholds, self._slow_ms = reference, thresholds, slow_ms
        self._window: deque[tuple[Verdict, Label | None]] = deque(maxlen=window)
        self._labelled: deque[tuple[Verdict, Label, bool]] = deque(maxlen=window)
        self.n = 0
        """Readable parts seen."""
        self.raised: dict[Kind, Alarm] = {}
        """The first alarm of each kind."""
        self._standing: dict[Kind, Alarm] = {}

    def saw(self, verdict: Verdict, human: Label | None = None) -> None:
        """Take one more verdict; ``human`` is what a person says the part is."""
        if verdict.label is Label.UNREADABLE or verdict.edge_score is None:
            return
        self._window.append((verdict, human))
        label = human or self._cloud_label(verdict)
        if label is not None:
            self._labelled.append((verdict, label, human is not None))
        self.n += 1
        if self.n >= FEWEST and self.n % EVERY == 0:
            self._look()

    def alarms(self) -> tuple[Alarm, ...]:
        """Return the alarms that stood at the last look."""
        return tuple(self._standing.values())

    def _look(self) -> None:
        verdicts = [verdict for verdict, _ in self._window]
        found = [*self._distributions(verdicts), *self._crowds(), *self._labels(), *self._cloud(verdicts)]
        standing: dict[Kind, Alarm] = {}
        for kind, value, limit, n, statement in found:
            if value > limit:
                since = self._standing[kind].since if kind in self._standing else self.n
                standing[kind] = Alarm(kind, value, limit, n, since, statement)
                self.raised.setdefault(kind, standing[kind])
        self._standing = standing

    def _distributions(self, verdicts: list[Verdict]) -> Iterable[_Found]:
        known = self._reference
        scores = np.array([verdict.edge_score for verdict in verdicts], dtype=np.float64)
        yield _distance("score", scores, known.score_good, known.score_defect, known)
        scene = np.array([v.scene_score for v in verdicts if v.scene_score is not None], dtype=np.float64)
        if scene.size >= FEWEST:
            yield _distance("scene", scene, known.scene_good, known.scene_defect or known.scene_good, known)

    def _crowds(self) -> Iterable[_Found]:
        n, known = len(self._window), self._reference
        # A reject that a person confirms is nothing to wonder about.
        unconfirmed = [v for v, human in self._window if v.edge_label is Label.DEFECT and human is not Label.DEFECT]
        doubted = [v for v, _ in self._window if v.escalated_for in _DOUBTS]
        crowds: tuple[tuple[Kind, int, float], ...] = (
            ("rejects", len(unconfirmed), known.rejects),
            ("escalation", len(doubted), known.escalation),
        )
        for kind, count, usual in crowds:
            says = f"{kind}: {count / n:.0%} of the parts, {usual:.0%} at calibration"
            yield kind, count / n, max(CROWDED, (1 + usual) / 2), n, says

    def _labels(self) -> Iterable[_Found]:
        n, known = len(self._labelled), self._reference
        sent = sum(self._doubted(verdict) for verdict, _, _ in self._labelled)
        expected = sent * known.disagreement_sent + (n - sent) * known.disagreement_kept
        wrong = sum(verdict.edge_label is not label for verdict, label, _ in self._labelled)
        if n and _tail(wrong, n, expected / n) < ALPHA:
            says = f"{wrong} of {n} labelled parts contradict the edge, {expected / n:.0%} at calibration"
            yield "accuracy", (wrong - expected) / n, DROP, n, says
        judged = [(verdict, label) for verdict, label, human in self._labelled if human]
        if len(judged) >= FEWEST:
            edge = sum(verdict.edge_label is label for verdict, label in judged)
            final = sum(verdict.label is label for verdict, label in judged)
            says = f"the edge alone is right on {edge} of {len(judged)}, with the cloud on {final}"
            yield "cascade", (final - edge) / len(judged), DROP, len(judged), says

    def _doubted(self, verdict: Verdict) -> bool:
        """What the rule says, also in modes that do not follow it."""
        scene = -math.inf if verdict.scene_score is None else verdict.scene_score
        p_defect = 0.5 if verdict.edge_p_defect is None else verdict.edge_p_defect
        return bool(escalation_mask(self._thresholds, [scene], [p_defect])[0])

    def _cloud_label(self, verdict: Verdict) -> Label | None:
        if verdict.cloud_p_defect is None:
            return None
        return Label.GOOD if verdict.cloud_p_defect < self._thresholds.tau_cloud else Label.DEFECT

    def _cloud(self, verdicts: list[Verdict]) -> Iterable[_Found]:
        asked = [v for v in verdicts if v.where is not Where.EDGE]
        if len(asked) < MIN_CLASS:
            return
        lost = sum(verdict.reason in _LOST for verdict in asked) / len(asked)
        yield "cloud lost", lost, UNANSWERED, len(asked), f"{lost:.0%} of the questions got no answer in time"
        took = [v.timings_ms.get("cloud", 0.0) + v.timings_ms.get("wait_cloud", 0.0) for v in asked]
        p90 = float(np.quantile(took, 0.9))
        yield "cloud slow", p90, self._slow_ms, len(asked), f"a tenth of the answers took over {p90 / 1000:.1f} s"


_Found = tuple[Kind, float, float, int, str]
"""Kind, value, limit, n, statement."""


def _distance(
    kind: Kind, values: Floats, good: tuple[float, ...], defect: tuple[float, ...], known: Reference
) -> _Found:
    """Return the distance of a window [n] from the mixture that is nearest to it, and the critical value there.

    Without a distribution of defects only the values below the good parts' median count, as a share of them: defects
    hardly come so low.
    """
    n_good, n_defect = known.n_good, max(known.n_defect, 1)
    if not defect:
        below = good[: len(good) // 2 + 1]
        values = values[values <= below[-1]]
        good = defect = below
        n_good = n_defect = max(known.n_good // 2, 1)
        if values.size < MIN_CLASS:
            return kind, 0.0, 1.0, values.size, ""
    ordered, n = np.sort(values), values.size
    distances = np.zeros(len(_SHARES))
    # Just below and just above each value: there may be ties.
    under = np.searchsorted(ordered, ordered, side="left") / n
    until = np.searchsorted(ordered, ordered, side="right") / n
    for seen, hair in ((under, -_HAIR), (until, _HAIR)):
        of_good, of_defect = (_cdf(quantiles, ordered + hair * np.abs(ordered)) for quantiles in (good, defect))
        mixed = of_good + _SHARES[:, None] * (of_defect - of_good)
        distances = np.maximum(distances, np.abs(seen - mixed).max(axis=1))
    best = int(distances.argmin())
    share, value = float(_SHARES[best]), float(distances[best])
    spread = math.sqrt(1 / n + (1 - share) ** 2 / n_good + share**2 / n_defect)
    limit = math.sqrt(math.log(2 / ALPHA) / 2) * spread
    middle, usual = float(np.median(values)), float(np.median(good))
    says = (
        f"{kind} distance {value:.2f}, critical {limit:.2f}; median {middle:.3g}, good parts at calibration {usual:.3g}"
    )
    return kind, value, limit, n, says


def _cdf(quantiles: tuple[float, ...], values: Floats) -> Floats:
    return np.interp(values, quantiles, np.linspace(0, 1, len(quantiles)), left=0.0, right=1.0)


def _tail(wrong: int, n: int, rate: float) -> float:
    """P(X >= wrong), X ~ Binomial(n, rate)."""
    if wrong == 0:
        return 1.0
    return 1 - float(binomial_cdf(n, min(max(rate, 0.01), 0.99))[wrong - 1])


def _quantiles(values: Floats) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in np.quantile(values, _LEVELS))


def _mean(flags: Bools) -> float:
    return float(flags.mean()) if flags.size else 0.0
