"""The baselines of SAEC (§5 of the specification): everything to a zero-shot MLLM, or a classifier alone at the edge.

Each is the pipeline itself with something taken away at its rim: a client that shows the model less, a station with
other thresholds, a detector in the place of the station's. What a baseline's model does not answer usably is recorded
part by part (``Where.FALLBACK`` with its reason) and counts as wrong: nobody else's verdict may stand in for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saec.calibrate import Thresholds, confidences
from saec.calibrate.policy import Policy
from saec.cloud.embedded import EmbeddedClient
from saec.config import Settings
from saec.data.verify import content_hashes, refuse_overlap
from saec.edge.classifier import OnnxClassifier
from saec.errors import BadInput
from saec.evaluate.arms import Varied
from saec.evaluate.meter import mwh_per_correct
from saec.evaluate.runner import Station
from saec.evaluate.summary import summarise
from saec.types import Backend, CloudClient, EdgeResult, Image, Label, Opinion, Part, Query, Reason, Verdict, Where
from saec.vlm.trained import TRAINED_ON

ZERO_SHOT_TAU = 0.19
"""A zero-shot model calls a defect from this P(defect) on (SAEC §3: 0.19 by default, 0.26 tuned)."""

SIDE = 448
"""Longest side in pixels that LLaVA sees, and side of the edge classifier's input."""

PATIENCE_S = 600.0
"""Shortest deadline of a question to a model in this process, in seconds."""

NEVER = 10**9
"""Failures in a row that nobody reaches."""

UNCALIBRATED = {"statement": "None: a baseline's thresholds are the published ones."}

_JUST_ABOVE_HALF = math.nextafter(0.5, 1.0)
_RATES = ("accuracy", "balanced_accuracy", "auroc", "escape_rate", "overkill_rate")


@dataclass(frozen=True, slots=True)
class Asked:
    """A cloud that can be asked, not yet opened; ``missing`` says how to get one that is not at hand.

    An ``embedded`` one works in this process: nothing is gained by giving it up for lost after a line's deadline.
    ``adapter`` is the folder of its adapter, where it has one of its own.
    """

    name: str
    open: Callable[[], AbstractContextManager[CloudClient | None]] = nullcontext
    missing: BadInput | None = None
    embedded: bool = False
    adapter: Path | None = None

    @classmethod
    def of_backend(cls, name: str, make: Callable[[], Backend], *, max_batch: int) -> Asked:
        """Return a cloud in this process. ``make`` loads the model; it raises what ``open`` then raises."""

        @contextmanager
        def opened() -> Iterator[CloudClient]:
            client = EmbeddedClient(make(), max_batch=max_batch)
            try:
                yield client
            finally:
                client.close()

        return cls(name, opened, embedded=True)

    def opened(self) -> AbstractContextManager[CloudClient | None]:
        """Open it.

        Raises:
            BadInput: it is not at hand, or cannot be opened.
        """
        if self.missing is not None:
            raise self.missing
        return self.open()

    def patient(self, settings: Settings, *, baseline: bool) -> Settings:
        """Return the settings under which every question is put and, in this process, waited for.

        A baseline's circuit never opens: bad answers are a result of it, no trouble on the line. No budget binds it,
        and it sees whole images: a crop around the anomaly would let the edge have a say.
        """
        changes: dict[str, Any] = {}
        if self.embedded:
            changes |= {"timeout_s": max(settings.cloud.timeout_s, PATIENCE_S), "breaker_failures": NEVER}
        if not baseline:
            return settings.model_copy(update={"cloud": settings.cloud.model_copy(update=changes)})
        changes |= {"uplink": "image", "breaker_failures": NEVER}
        unbounded = settings.route.model_copy(
            update={"budget_share": None, "budget_bytes": None, "budget_seconds": None}
        )
        return settings.model_copy(update={"cloud": settings.cloud.model_copy(update=changes), "route": unbounded})


def refuse_learnt(adapter: Path | None, parts: Sequence[Part]) -> None:
    """Refuse parts that an adapter was trained on, as far as the list lies with it that ``saec train`` writes.

    Raises:
        BadInput: there are such parts, or the list is damaged.
    """
    folders = () if adapter is None else (adapter, adapter.resolve().parent)
    lists = [folder / TRAINED_ON for folder in folders if (folder / TRAINED_ON).is_file()]
    if lists:
        refuse_overlap(content_hashes(lists), parts, what="training the adapter")


class Shown:
    """A client that shows the cloud less of each question than the pipeline has put into it."""

    def __init__(
        self, client: CloudClient, *, references: bool = True, anomaly_map: bool = True, edge: bool = True
    ) -> None:
        """Keep reference images, the anomaly map and the edge's P(defect), or take them away."""
        self._client = client
        self.model_id = client.model_id
        self._taken: dict[str, Any] = {}
        self._taken |= {} if references else {"references": ()}
        self._taken |= {} if anomaly_map else {"anomaly_map": None}
        self._taken |= {} if edge else {"edge_p_defect": None}

    def judge(self, query: Query, *, deadline_s: float) -> Opinion:
        """Ask the client; it raises what it raises."""
        opinion = self._client.judge(replace(query, **self._taken), deadline_s=deadline_s)
        self.model_id = opinion.model_id
        return opinion

    def close(self) -> None:
        """Close the client."""
        self._client.close()


def image_alone(client: CloudClient) -> Shown:
    """Return the client of a zero-shot baseline: the prompt and the part, nothing that the station has learnt."""
    return Shown(client, references=False, anomaly_map=False, edge=False)


def zero_shot(station: Station, marks: Mapping[str, str]) -> Varied:
    """Return the station under which the cloud's opinion replaces the edge's at :data:`ZERO_SHOT_TAU`."""

    def change(policy: Policy) -> Policy:
        return replace(policy, thresholds=replace(policy.thresholds, tau_cloud=ZERO_SHOT_TAU))

    return Varied(station, marks, change, fuses=False)


class ClassifierEdge(Varied):
    """An ImageNet classifier in the place of the station's detector: SAEC's edge baseline.

    *good* iff s_max >= 0.55, margin >= 0.03 and normalised entropy <= 0.95, else *defect*. P(defect) is no probability:
    half of the score above 0.5, so that it ranks the parts and crosses 0.5 where the rule does.
    """

    def __init__(self, station: Station, marks: Mapping[str, str], classifier: OnnxClassifier) -> None:
        super().__init__(station, {**marks, "edge": classifier.model_id}, _published_rule)
        self._classifier = classifier

    def predict(self, image: Image, product: str) -> EdgeResult:
        """Judge one image by the classifier."""
        score = self._classifier.observe(image).score
        p = max(0.5 + score / 2, _JUST_ABOVE_HALF) if score > 0 else 0.5 + score / 2
        s_max, margin, entropy = (float(value) for value in confidences(p))
        return EdgeResult(score, p, s_max, margin, entropy)


def _published_rule(policy: Policy) -> Policy:
    return replace(policy, thresholds=Thresholds(tau_edge=_JUST_ABOVE_HALF))


def as_baseline(
    summary: Mapping[str, Any], verdicts: Sequence[Verdict], *, published_thresholds: bool = True
) -> dict[str, Any]:
    """Return the summary of a run in which only the cloud's answers count: a readable part without one is wrong.

    ``unanswered`` says how many there were; AUROC leaves them out, for they have no P(defect). Everything else, the
    counts of ``called`` and the routing with its reasons among it, stays as recorded. Doing it twice changes nothing.
    """
    figures = summarise([_wrong(v) if _unanswered(v) else v for v in verdicts])
    counts = figures["confusion"]
    correct = counts["tp"] + counts["tn"] if figures["labelled"] else None
    kept = {name: figures[name] for name in (*_RATES, "confusion", "intervals", "per_product")}
    status = {name: why for name, why in summary["status"].items() if name not in _RATES}
    status |= {name: why for name, why in figures["status"].items() if name in _RATES}
    energy = {**summary["energy"], "mwh_per_correct": mwh_per_correct(summary["energy"]["joules"], correct)}
    calibration = {"calibration": UNCALIBRATED} if published_thresholds else {}
    return {
        **summary,
        **kept,
        "energy": energy,
        "status": status,
        "unanswered": sum(map(_unanswered, verdicts)),
        **calibration,
    }


def _unanswered(verdict: Verdict) -> bool:
    """Whether the cloud alone was to judge this part and did not."""
    return verdict.escalated_for is Reason.CLOUD_ONLY and verdict.where is not Where.CLOUD


def _wrong(verdict: Verdict) -> Verdict:
    label = Label.GOOD if verdict.truth is Label.DEFECT else Label.DEFECT
    return replace(verdict, label=label, p_defect=None)
