"""One entry point: from held-out scores to the operating point of a station, with what is proven about it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import ConfigDict, TypeAdapter, ValidationError

from saec.calibrate import escalation
from saec.calibrate._numeric import Floats, vector
from saec.calibrate.conformal import overkill_threshold
from saec.calibrate.drift import MIN_CLASS, Reference
from saec.calibrate.escape import clopper_pearson_upper, escape_threshold
from saec.calibrate.fusion import FINAL_TAU, Fusion, fit_fusion, fit_tau_cloud
from saec.calibrate.guarantee import Guarantee, NotEnoughData
from saec.calibrate.score import ScoreCalibration
from saec.calibrate.thresholds import Thresholds
from saec.config import CalibrationSettings
from saec.errors import BadInput

MIN_LABELLED = 10
"""Fewer good parts or defects than this do not move the threshold: it comes from the good parts alone."""

ONE_GOOD = "one good part: the threshold comes from shifted and turned copies of it and is no guarantee; add good parts"
"""Note of a calibration whose "good parts" are copies of a single one: its bound proves nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationData:
    """Scores of parts that neither the detector was fitted on nor the test uses: vectors ``[n_good]``, ``[n_defect]``.

    ``*_scores`` are raw anomaly scores, ``*_scene`` scene scores, ``cloud_p_*`` the cloud's P(defect) of the same parts
    where it was asked. ``cross_fitted``: the good scores come from folds. ``data_sha256``: see :func:`content_digest`.
    """

    good_scores: ArrayLike
    good_scene: ArrayLike
    defect_scores: ArrayLike = ()
    defect_scene: ArrayLike = ()
    cloud_p_good: ArrayLike | None = None
    cloud_p_defect: ArrayLike | None = None
    data_sha256: str = ""
    cross_fitted: bool = False


@dataclass(frozen=True, slots=True)
class Calibration:
    """The operating point of a station.

    How a verdict is made from it: the edge's P(defect) is ``score.p_defect(raw)`` and its label *defect iff >=
    thresholds.tau_edge*; an escalated part that the cloud answered is *defect iff fusion.p_defect(p_edge, p_cloud) >=
    0.5*; in cloud-only operation *defect iff p_cloud >= thresholds.tau_cloud*.

    ``method`` says what placed the edge's threshold: ``good-only`` (conformal) or ``labelled`` (Platt).
    ``escalation_expected`` is the share of the calibration parts that the rule escalates. ``data_sha256`` names the
    calibration parts. ``drift`` is what the line is watched against; ``None`` with few good parts and
    in stations of older versions.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    score: ScoreCalibration
    thresholds: Thresholds
    fusion: Fusion
    overkill: Guarantee
    escape: Guarantee | None
    method: Literal["good-only", "labelled"]
    n_good: int
    n_defect: int
    escalation_expected: float
    data_sha256: str
    notes: tuple[str, ...] = field(default=())
    drift: Reference | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; a disabled scene threshold is ``None``, there is no Infinity."""
        tree: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return tree

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_json`'s output.

        Raises:
            BadInput: an unknown or missing key, a wrong type, or a value out of range.
        """
        try:
            return _ADAPTER.validate_python(tree)  # type: ignore[return-value]
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(step) for step in first["loc"])
            raise BadInput(f"damaged calibration ({first['msg']})", where=where, fix="fit the station again") from None


_ADAPTER = TypeAdapter(Calibration)


def content_digest(hashes: Iterable[str]) -> str:
    """Return the sha256 of the sorted content hashes, one a line: the same for any order of the parts."""
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


def calibrate(data: CalibrationData, settings: CalibrationSettings) -> Calibration:
    """Choose the station's operating point.

    * Edge threshold. From good parts alone the conformal one for ``settings.overkill``. With at least 10 labelled parts
      of each class, P(defect) = 0.5 of Platt's sigmoid: the most accurate threshold for the class mix of the
      calibration parts under a model of two parameters, which does not chase single parts as the best cut of the
      sample would.
    * ``settings.escape`` lowers it until the escape bound is proven. When cloud opinions are given the bound is for the
      final verdicts: a defect escapes only if the edge passes it or the cloud clears it, so each arm gets half of the
      rate and half of the error probability (union bound). It then holds for any routing, budget, or outage, the cloud
      replaces the edge on escalated parts, and it needs about two and a half times the defects. Without cloud opinions
      it is for the edge's verdicts.
    * Fusion, from labelled parts with cloud opinions, see :func:`saec.calibrate.fusion.fit_fusion`; otherwise the
      cloud replaces the edge.
    * Escalation of at most ``settings.escalation`` of the calibration parts, see :mod:`saec.calibrate.escalation`.

    Raises:
        NotEnoughData: ``settings.escape`` cannot be proven with these defects.
        BadInput: no good parts, vectors of different lengths, or a value that is not finite.
    """
    parts = _Parts.of(data)
    conformal = overkill_threshold(parts.good, settings.overkill, cross_fitted=data.cross_fitted)
    labelled = min(parts.good.size, parts.defect.size) >= MIN_LABELLED
    if labelled:
        score = ScoreCalibration.from_labelled(parts.good, parts.defect)
    else:
        score = ScoreCalibration.from_good(parts.good, conformal.threshold)
    threshold = score.location
    tau_cloud, fusion = _cloud(parts, score, settings, labelled)
    escape = None
    if settings.escape is not None:
        escape, clears_below = _prove_escape(parts, settings.escape, settings.confidence, at_most=threshold)
        threshold = escape.threshold
        if clears_below is not None:
            tau_cloud = min(tau_cloud, max(0.0, clears_below))
            fusion = Fusion.replace_at(tau_cloud)
    tau_edge = FINAL_TAU if threshold == score.location else float(score.p_defect(threshold))
    base = Thresholds(tau_edge=tau_edge, tau_cloud=tau_cloud)
    plan = _plan(parts, base, score, fusion, settings.escalation, labelled)
    return Calibration(
        score=score,
        thresholds=plan.thresholds,
        fusion=fusion,
        overkill=_overkill(conformal, parts.good, threshold, settings),
        escape=escape,
        method="labelled" if labelled else "good-only",
        n_good=int(parts.good.size),
        n_defect=int(parts.defect.size),
        escalation_expected=plan.share,
        data_sha256=data.data_sha256,
        notes=_notes(parts, labelled) + plan.notes,
        drift=_reference(parts, score, plan.thresholds),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """Checked vectors."""

    good: Floats
    defect: Floats
    good_scene: Floats
    defect_scene: Floats
    cloud_good: Floats | None
    cloud_defect: Floats | None

    @classmethod
    def of(cls, data: CalibrationData) -> Self:
        good, defect = vector(data.good_scores, "good scores"), vector(data.defect_scores, "defect scores")

        def same(values: ArrayLike, name: str, scores: Floats, *, high: float = np.inf) -> Floats:
            out = vector(values, name, low=0.0 if high == 1 else -np.inf, high=high)
            if out.size != scores.size:
                raise BadInput("one value for each part is needed", where=f"{name}: {out.size} for {scores.size} parts")
            return out

        def cloud(values: ArrayLike | None, name: str, scores: Floats) -> Floats | None:
            return None if values is None or scores.size == 0 else same(values, name, scores, high=1.0)

        return cls(
            good,
            defect,
            same(data.good_scene, "good scene scores", good),
            same(data.defect_scene, "defect scene scores", defect),
            cloud(data.cloud_p_good, "cloud P(defect) of good parts", good),
            cloud(data.cloud_p_defect, "cloud P(defect) of defects", defect),
        )

    @property
    def truth(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return np.arange(self.good.size + self.defect.size) >= self.good.size

    @property
    def scores(self) -> Floats:
        return np.concatenate([self.good, self.defect])

    @property
    def cloud_p(self) -> Floats | None:
        if self.cloud_good is None or self.cloud_defect is None:
            return None
        return np.concatenate([self.cloud_good, self.cloud_defect])


def _prove_escape(parts: _Parts, rate: float, confidence: float, *, at_most: float) -> tuple[Guarantee, float | None]:
    """Return the bound at the edge threshold that proves it, ``at_most`` the given one, and the cloud's threshold."""
    if parts.cloud_defect is None:
        edge, clears_below = escape_threshold(parts.defect, rate, confidence), None
    else:
        half, sure = rate / 2, (1 + confidence) / 2
        try:
            edge, cloud = (escape_threshold(scores, half, sure) for scores in (parts.defect, parts.cloud_defect))
        except NotEnoughData as error:
            raise NotEnoughData(error.n, min(1.0, 2 * error.best), requested=rate, confidence=confidence) from None
        clears_below = cloud.threshold
        edge = replace(edge, scope="cascade", requested=rate, bound=edge.bound + cloud.bound, confidence=confidence)
    threshold = min(at_most, edge.threshold)
    return replace(edge, threshold=threshold, wrong=int(np.sum(parts.defect < threshold))), clears_below


def _cloud(
    parts: _Parts, score: ScoreCalibration, settings: CalibrationSettings, labelled: bool
) -> tuple[float, Fusion]:
    if labelled and parts.cloud_p is not None:
        fusion = fit_fusion(score.p_defect(parts.scores), parts.cloud_p, parts.truth)
        return fit_tau_cloud(parts.cloud_p, parts.truth), fusion
    if parts.cloud_good is not None:
        tau = min(1.0, overkill_threshold(parts.cloud_good, settings.overkill).threshold)
        return tau, Fusion.replace_at(tau)
    return FINAL_TAU, Fusion()


def _plan(
    parts: _Parts, base: Thresholds, score: ScoreCalibration, fusion: Fusion, share: float, labelled: bool
) -> escalation.EscalationPlan:
    if not labelled:
        return escalation.from_good(base, parts.good_scene, score.p_defect(parts.good), share)
    p = score.p_defect(parts.scores)
    gain = escalation.edge_mistakes(p, parts.truth, base.tau_edge)
    if parts.cloud_p is not None:
        gain = gain - ((fusion.p_defect(p, parts.cloud_p) >= FINAL_TAU) != parts.truth)
    scene = np.concatenate([parts.good_scene, parts.defect_scene])
    return escalation.from_gain(base, scene, p, share, gain)


def _reference(parts: _Parts, score: ScoreCalibration, thresholds: Thresholds) -> Reference | None:
    if parts.good.size < MIN_CLASS:
        return None
    cloud, truth = parts.cloud_p, parts.truth
    label = truth if cloud is None else cloud >= thresholds.tau_cloud
    scene = np.concatenate([parts.good_scene, parts.defect_scene])
    return Reference.of(parts.scores, scene, score.p_defect(parts.scores), truth, label, thresholds)


def _overkill(conformal: Guarantee, good: Floats, threshold: float, settings: CalibrationSettings) -> Guarantee:
    wrong = int(np.sum(good >= threshold))
    if threshold >= conformal.threshold:  # a higher threshold only lowers the overkill: the proof carries over
        return replace(conformal, threshold=threshold, wrong=wrong)
    return replace(
        conformal,
        threshold=threshold,
        wrong=wrong,
        bound=clopper_pearson_upper(wrong, int(good.size), settings.confidence),
        confidence=settings.confidence,
        method="clopper-pearson",
    )


def _notes(parts: _Parts, labelled: bool) -> tuple[str, ...]:
    notes: tuple[str, ...] = ()
    if parts.defect.size and not labelled:
        notes += (
            f"{parts.good.size} good parts and {parts.defect.size} defects: {MIN_LABELLED} of each are needed "
            "to place the threshold by both; it comes from the good parts alone",
        )
    if labelled and np.median(parts.defect) <= np.median(parts.good):
        notes += ("the defects do not score higher than the good parts: the detector does not see them",)
    return notes
