"""Learning with the real pipeline and a real cloud: what makes samples, and the world in which rounds are run."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from saec.calibrate.drift import DriftWatch
from saec.calibrate.policy import Mode
from saec.cloud.learning import LearnClient
from saec.cloud.tokens import tokenised
from saec.config import MllmSettings, Settings
from saec.data.dataset import Dataset
from saec.data.decode import UnreadableImage, read_with_hash
from saec.data.hashing import sha256_file
from saec.data.verify import content_hashes, refuse_overlap
from saec.edge.backbone import Backbone, Features
from saec.edge.detector import MemoryDetector
from saec.edge.station import ProductModel, Station, read_manifest
from saec.errors import BadInput
from saec.evaluate.arms import arm_settings
from saec.evaluate.question import question_about
from saec.evaluate.runner import recorded, run_parts
from saec.learn.line import Learnt, Line, SampleOf, learn
from saec.learn.rounds import Arm, Inspected
from saec.learn.samples import Sample
from saec.learn.stream import Stream, build_stream
from saec.types import CloudClient, Image, Label, Opinion, Part, Query, Tokeniser, Verdict
from saec.vlm.trained import TRAINED_ON

AUDIT_SHARE = 0.05
"""Share of sure parts that rounds audit where the settings ask for no audits: without them drift teaches nothing."""


def unseen_stream(
    dataset: Dataset,
    fitting: Iterable[Part],
    *,
    mllm: MllmSettings | None,
    first: str,
    then: str | None,
    product: str,
    rounds: int,
    parts: int,
    seed: int,
) -> Stream:
    """Return the stream of :func:`saec.learn.stream.build_stream`, of parts that nobody has learnt from.

    Args:
        dataset: with both products.
        fitting: what the station is, or will be, fitted to and calibrated on: left out.
        mllm: the cloud's model, with its adapter, whose training images are left out; ``None`` for others.
        first, then: products of the data set.
        product, rounds, parts, seed: see there.

    Raises:
        BadInput: a product without labelled parts, too few that nobody has learnt from, or a part that cannot be read.
    """
    try:
        known = {sha256_file(part.path) for part in fitting}
    except OSError as error:
        fix = error.strerror or "check its permissions"
        raise BadInput("a part to fit to cannot be read", where=error.filename, fix=fix) from None
    if mllm is not None and mllm.adapter is not None:
        folders = (mllm.adapter, mllm.adapter.resolve().parent)
        known |= content_hashes(folder / TRAINED_ON for folder in folders if (folder / TRAINED_ON).is_file())

    def labelled(name: str) -> list[Part]:
        found = [part for part in dataset.select(product=name) if part.label is not None]
        if not found:
            raise BadInput("no labelled parts", where=name, fix=f"it has {', '.join(dataset.products)}")
        return found

    return build_stream(
        labelled(first),
        labelled(then) if then is not None else (),
        rounds=rounds,
        parts=parts,
        known=known,
        product=product,
        seed=seed,
    )


def refuse_fitted(station: Path, stream: Stream) -> None:
    """See that the station at a folder has learnt from no part of the stream.

    Raises:
        BadInput: it has.
    """
    manifest = read_manifest(station)
    known = {*manifest.train_sha256, *manifest.calibration_sha256}
    for some in (*stream.rounds, stream.held_out, stream.before):
        refuse_overlap(known, some, what="fitting the station")


def sampler(station: Station, settings: Settings, tokeniser: Tokeniser | None = None) -> SampleOf:
    """Return what makes samples: the question that an escalation would ask, as ``cloud.uplink`` has it.

    ``tokeniser`` is what ``tokens`` needs.
    """

    def sample_of(verdict: Verdict, human: Label | None) -> Sample | None:
        try:
            sha256, image = read_with_hash(Path(verdict.path), max_pixels=settings.data.max_pixels)
        except UnreadableImage:
            return None
        if sha256 != verdict.sha256:
            return None
        result = station.predict(image, verdict.product)
        uplink = settings.cloud.uplink
        query = question_about(verdict.part_id, verdict.product, image, result, uplink=uplink)
        query = query if tokeniser is None else tokenised(query, tokeniser)
        called = verdict.edge_label or verdict.label
        return Sample(query, sha256, result.score, verdict.scene_score, called, human, verdict.cloud_p_defect)

    return sample_of


@dataclass(frozen=True, slots=True)
class RealWorld:
    """A :class:`saec.learn.rounds.World`: the pipeline as ``saec inspect`` runs it, and a round as ``saec learn once``
    does. ``cloud`` answers escalations, ``learner`` talks to the same service's desk, ``tokeniser`` serves the uplink
    of tokens. Interrupted, both methods raise ``KeyboardInterrupt``."""

    settings: Settings
    product: str
    cloud: CloudClient
    learner: LearnClient
    tokeniser: Tokeniser | None
    looks: Looks

    def inspect(
        self, station: Path, parts: Sequence[Part], out: Path, mode: Mode, *, audited: bool = False
    ) -> Inspected:
        """Run parts into a run folder."""
        share = max(self.settings.learn.audit_share, AUDIT_SHARE) if audited else 0.0
        changed = self.settings.learn.model_copy(update={"audit_share": share})
        settings = arm_settings(self.settings.model_copy(update={"learn": changed}), mode)
        cloud = None if mode == "edge_only" else self.cloud
        judge = self.looks.shared(Station.load(station, settings=settings))
        outcome = run_parts(parts, judge, settings, cloud=cloud, out=out, command=sys.argv[1:], report=False)
        if outcome.summary is None:
            raise KeyboardInterrupt
        verdicts = recorded(out)
        policy = judge.policy(self.product)
        if policy.drift is None:
            return Inspected(verdicts)
        watch = DriftWatch(policy.drift, policy.thresholds)
        for verdict in verdicts:
            watch.saw(verdict)
        return Inspected(verdicts, tuple(asdict(alarm) for alarm in watch.raised.values()))

    def learn(self, arm: Arm, station: Path, verdicts: Sequence[Verdict], labels: Mapping[str, Label]) -> Learnt:
        """Let the station learn as the arm does."""
        changed = self.settings.learn.model_copy(update=dict(arm.learn))
        settings = self.settings.model_copy(update={"learn": changed})
        judge = self.looks.shared(Station.load(station, settings=settings))
        return learn(
            Line(station, self.product, settings),
            verdicts,
            self.learner,
            sampler(judge, settings, self.tokeniser),
            labels=labels,
            uncertain=arm.uncertain,
            without=arm.without,
            seed=settings.route.seed,
        )


class Looks(Backbone):
    """The backbone, looking at each image once: whatever arms learn, their features are the same. Thread-safe."""

    def __init__(self, *, threads: int, most_bytes: int = 1_000_000_000) -> None:
        """Keep features of ``most_bytes`` in all; what comes after that is looked at again."""
        super().__init__(threads=threads)
        self._seen: dict[tuple[bytes, int], Features] = {}
        self._room = most_bytes

    def __call__(self, image: Image, side: int) -> Features:
        """See :class:`saec.edge.backbone.Backbone`."""
        key = hashlib.sha256(image.tobytes() + repr(image.shape).encode()).digest(), side
        found = self._seen.get(key)
        if found is None:
            found = super().__call__(image, side)
            self._room -= found.nbytes
            if self._room >= 0:
                self._seen[key] = found
        return found

    def shared(self, station: Station) -> Station:
        """Return the station with this backbone in its detectors; how it routes is for the run to say."""
        models = {product: self._with(station.model(product)) for product in station.products}
        return Station(models, station.manifest)

    def _with(self, model: ProductModel) -> ProductModel:
        if not isinstance(model.detector, MemoryDetector):
            return model
        return replace(model, detector=replace(model.detector, backbone=self))


class Remembering:
    """A client that asks each question once: arms that have not parted yet ask the same ones. Thread-safe."""

    def __init__(self, client: CloudClient) -> None:
        """Keep the answers of ``client`` for as long as this lives."""
        self._client, self._known = client, dict[str, Opinion]()
        self.model_id = client.model_id

    def judge(self, query: Query, *, deadline_s: float) -> Opinion:
        """Return the client's opinion, or what it said before, bytes included."""
        query = replace(query, evidence=False)  # a verdict is all that is measured
        words = (query.product, query.region, query.edge_p_defect)
        name = hashlib.sha256(repr(words).encode())
        for array in (query.image, query.anomaly_map):
            name.update(b"" if array is None else array.tobytes())
        key = name.hexdigest()
        if key not in self._known:
            self._known[key] = self._client.judge(query, deadline_s=deadline_s)
        return self._known[key]

    def close(self) -> None:
        """Release connections."""
        self._client.close()
