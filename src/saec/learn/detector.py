"""The detector learns: confirmed good parts extend the bank, labelled parts of both kinds refit head and thresholds.

Nothing is fitted on a part that also judges the result: a lesson's good part is scored by a bank that grew by the other
half of the lessons alone, a lesson's head score comes from a head fitted without its fold, and old parts keep the
scores that they had when they were held out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from saec.calibrate.calibration import MIN_LABELLED, Calibration
from saec.calibrate.conformal import overkill_threshold
from saec.calibrate.fusion import fit_fusion, fit_tau_cloud
from saec.calibrate.metrics import auroc
from saec.config import Settings
from saec.edge.backbone import Features
from saec.edge.detector import MemoryDetector
from saec.edge.fitters import Progress, heat_level
from saec.edge.head import MIN_DEFECTS, Bools, Doubles, EdgeHead, fit_edge_head
from saec.edge.replay import Replay
from saec.edge.station import ProductModel
from saec.errors import BadInput
from saec.learn.growth import Lesson, Looked, grown, look_at
from saec.types import Observation


@dataclass(frozen=True, slots=True, eq=False)
class Taught:
    """The new model, and how it does against the old one.

    ``figures``: counts of ``lessons``, ``good``, ``defects``, ``rows`` (bank rows added per pass) and ``replay`` (old
    parts), and ``accuracy_*``, ``auroc_*`` for lessons and replay, before and after; the latter held out as the module
    says, absent where a class is missing.
    """

    model: ProductModel
    figures: dict[str, float]


def teach_product(
    model: ProductModel, lessons: Sequence[Lesson], settings: Settings, progress: Progress | None = None
) -> Taught:
    """Return a product's model after some lessons; the same lessons in any order give the same model.

    Of several labels of one part the surest counts; a part that the model knows is not learnt twice, but its label may
    be corrected. Near-duplicates are held out together. With confirmed good parts of one content, or none, the bank
    stays as it is; with too few defects there is no head, or the threshold comes from the good parts alone. The cloud's
    fusion follows where enough parts carry its opinion, else it stays. ``settings.learn`` bounds the bank.

    Raises:
        BadInput: the model is a classifier, comes from a station without replay, or the lessons teach nothing.
    """
    detector = _memory(model)
    if model.replay is None:
        raise BadInput("this product cannot be taught: its station holds no replay", fix="fit the station again")
    old, fresh = _fresh(lessons, model.replay)
    if not fresh and old is model.replay:
        raise BadInput("nothing to learn", where=f"{len(lessons)} lessons", fix="bring parts that the station lacks")
    looked = look_at(fresh, detector, settings, progress)
    taught, seen = grown(detector, looked, old, settings)
    both = old if not fresh else old.joined(_rows_of(fresh, looked, seen))
    head, score = _fitted_head(both, settings) or (None, both.bank)
    both = replace(both, score=score)
    judged = both.rows(_comparable(both, len(fresh), with_defects=head is not None))
    calibration = _with_cloud(judged.calibrated(settings.calibration, cross_fitted=True), both, model.calibration)
    level = heat_level(both.peak[~both.is_defect])
    result = ProductModel(taught, _noted(calibration, both), level, model.reference, head, both.capped())
    return Taught(result, _figures(model, looked, result, both))


def _comparable(replay: Replay, fresh: int, *, with_defects: bool) -> Bools:
    """Return which rows [n] say where the threshold lies; the last ``fresh`` are this time's lessons.

    All of them where the fit knew defects. Where it did not, another kind's first lessons scored as far off as it was
    new, by a bank that has since learnt it: a threshold among them passes the first kind's defects (bottles after four
    rounds of screws: 36 % right). So only the fit's parts and this time's lessons count, and without a head, which
    alone tells the kinds apart, their good parts alone, as at the fit.
    """
    if replay.fit_knew_defects:
        return np.ones(len(replay), dtype=np.bool_)
    now = (replay.lesson == 0) | (np.arange(len(replay)) >= len(replay) - fresh)
    return np.asarray(now if with_defects else now & ~replay.is_defect)


def _fresh(lessons: Sequence[Lesson], old: Replay) -> tuple[Replay, list[Lesson]]:
    """Return the replay with the labels that the lessons correct, and the lessons on unknown parts, by hash."""
    surest = {lesson.sha256: lesson for lesson in sorted(lessons, key=lambda one: (one.weight, one.label))}
    rows = {sha256: number for number, sha256 in enumerate(old.hashes)}
    p_defect = old.p_defect.copy()
    for sha256 in surest.keys() & rows.keys():
        row, lesson = rows[sha256], surest[sha256]
        if lesson.weight >= max(p_defect[row], 1 - p_defect[row]):
            p_defect[row] = lesson.p_defect
    if not np.array_equal(p_defect, old.p_defect):
        old = replace(old, p_defect=p_defect)
    known = old.known  # what was forgotten is in the bank all the same, and cannot be held out any more
    return old, [lesson for sha256, lesson in sorted(surest.items()) if sha256 not in known]


def _rows_of(lessons: Sequence[Lesson], looked: Looked, seen: Sequence[Observation]) -> Replay:
    return Replay.of(
        [lesson.sha256 for lesson in lessons],
        looked.pooled,
        seen,
        looked.scene,
        [lesson.p_defect for lesson in lessons],
        # A teacher that agrees with itself proves nothing about the cloud.
        [lesson.p_cloud if lesson.p_cloud is not None and lesson.weight == 1 else math.nan for lesson in lessons],
        looked.groups,
        lesson=True,
    )


def _fitted_head(replay: Replay, settings: Settings) -> tuple[EdgeHead, Doubles] | None:
    """Fit a head to all labelled parts, see :func:`saec.edge.head.fit_edge_head`.

    Where the fit knew no defects, a head would learn that whatever looks like its parts is good, and pass their defects
    (bottles after a lesson on screws: accuracy 0.98 to 0.30). So some of these parts are shown to it a second time as
    defects, with a bank score as far beyond the old threshold as the median lies below: on this kind the bank decides.
    """
    bad, first = replay.is_defect, replay.lesson == 0
    bank, x, p, group = replay.bank, replay.pooled.astype(np.float64), replay.p_defect, replay.group
    known = np.flatnonzero(first & ~bad)
    if bad.sum() < MIN_DEFECTS or replay.fit_knew_defects or not known.size:
        return fit_edge_head(bank, x, p, group)
    again = known[np.linspace(0, len(known) - 1, min(len(known), int(bad.sum()))).astype(int)]
    threshold = overkill_threshold(bank[known], settings.calibration.overkill).threshold
    beyond = np.full(len(again), 2 * threshold - np.median(bank[known]))
    rows = np.concatenate([np.arange(len(bank)), again])
    fitted = fit_edge_head(
        np.concatenate([bank, beyond]), x[rows], np.concatenate([p, np.ones(len(again))]), group[rows]
    )
    return None if fitted is None else (fitted[0], fitted[1][: len(bank)])


def _with_cloud(new: Calibration, replay: Replay, old: Calibration) -> Calibration:
    """Return the calibration with fusion and cloud threshold of the parts whose opinions are known, or the old ones."""
    asked = ~np.isnan(replay.p_cloud)
    labels = replay.is_defect[asked]
    if asked.all() and min(labels.sum(), (~labels).sum()) >= MIN_LABELLED:
        return new
    fusion, tau_cloud = old.fusion, old.thresholds.tau_cloud
    if min(labels.sum(), (~labels).sum()) >= MIN_LABELLED:
        p_cloud = replay.p_cloud[asked]
        fusion = fit_fusion(new.score.p_defect(replay.score[asked]), p_cloud, labels)
        tau_cloud = fit_tau_cloud(p_cloud, labels)
    return replace(new, fusion=fusion, thresholds=replace(new.thresholds, tau_cloud=tau_cloud))


def _noted(calibration: Calibration, replay: Replay) -> Calibration:
    """Return the calibration with a word on labels that no human gave."""
    unsure = int(np.sum((replay.p_defect > 0) & (replay.p_defect < 1)))
    if not unsure:
        return calibration
    note = f"{unsure} of {len(replay)} calibration parts carry a teacher's label: bounds hold as far as it is right"
    return replace(calibration, notes=(*calibration.notes, note))


def _figures(model: ProductModel, looked: Looked, result: ProductModel, both: Replay) -> dict[str, float]:
    """Return what was learnt and how both models do, held out: the first rows of ``both`` are the old replay's."""
    old = model.replay or both
    fresh = np.arange(len(both)) >= len(old)
    observed = [_score(model, *one) for one in zip(looked.features, looked.pooled, strict=True)]
    before, after = np.concatenate([old.score, observed]), both.score
    figures = {
        "lessons": float(fresh.sum()),
        "good": float(sum(looked.is_good)),
        "defects": float(len(looked.is_good) - sum(looked.is_good)),
        "replay": float(len(old)),
        "rows": float(_rows(result) - _rows(model)),
    }
    for name, chosen in (("lessons", fresh), ("replay", ~fresh)):
        truth = both.is_defect[chosen]
        if not truth.size:
            continue  # labels of known parts were corrected, and nothing else
        for when, one, scores in (("before", model, before[chosen]), ("after", result, after[chosen])):
            called = one.calibration.score.p_defect(scores) >= one.calibration.thresholds.tau_edge
            figures[f"accuracy_{name}_{when}"] = float(np.mean(called == truth))
            ranked = auroc(scores, truth)
            if ranked is not None:
                figures[f"auroc_{name}_{when}"] = ranked
    return figures


def _score(model: ProductModel, features: list[Features], pooled: Doubles) -> float:
    bank = _memory(model).compare(features).score
    return bank if model.head is None else model.head.score(bank, pooled)


def _rows(model: ProductModel) -> int:
    return max(len(memory.bank) for memory in _memory(model).memories)


def _memory(model: ProductModel) -> MemoryDetector:
    if not isinstance(model.detector, MemoryDetector):
        raise BadInput("a classifier cannot be taught", fix="fit the station without --classifier")
    return model.detector
