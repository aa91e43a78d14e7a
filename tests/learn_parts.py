"""A line to which a new product comes, a teacher that knows it, and a desk without a network between them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edge_parts import SETTINGS, blotted, dataset, defects, good_parts, plate, put
from saec.cloud.desk import Job, JobStatus
from saec.cloud.learning import JobFailed
from saec.config import Settings
from saec.data.decode import read_with_hash
from saec.edge.fit import fit_station
from saec.edge.station import Station
from saec.fleet.frame import Frame, decode_frame, encode_frame, frame_id
from saec.fleet.outbox import Outbox
from saec.learn.desk import KINDS, FolderDesk
from saec.learn.line import Learnt, Line, learn
from saec.learn.samples import SAMPLE, Sample, encode_sample
from saec.learn.teacher import HOME, Teacher
from saec.types import CloudError, Evidence, Label, Opinion, Part, Query, Reason, Verdict, Where

PRODUCT = "plate"


@cache
def fitted() -> Station:
    """A station fitted and calibrated on plates."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        parts = [
            *good_parts(root, 12, split="train"),
            *good_parts(root, 14, first=100, split="calibration"),
            *defects(root, 14, first=100, split="calibration"),
        ]
        return fit_station(dataset(root, parts), SETTINGS)


def new_parts(root: Path, count: int, *, first: int = 0) -> list[Part]:
    """Plates with ribs both ways, every third one with a blot: the station calls them all defects."""
    found = []
    across = np.ascontiguousarray(np.rot90(plate(3)))
    for number in range(first, first + count):
        bad = number % 3 == 0
        image = cv2.addWeighted(blotted(number) if bad else plate(5000 + number), 0.6, across, 0.4, 0)
        path = put(root / f"{number:03}.png", image)
        found.append(Part(f"{'bad' if bad else 'fine'}-{number}", PRODUCT, path, Label.DEFECT if bad else Label.GOOD))
    return found


def judged(station: Station, parts: Sequence[Part], *, asked: bool = True) -> list[Verdict]:
    """What the pipeline would record of parts that the router wanted the cloud for."""
    found = []
    for part in parts:
        sha256, image = read_with_hash(part.path)
        result = station.predict(image, PRODUCT)
        label = Label.DEFECT if result.p_defect >= 0.5 else Label.GOOD
        reason = Reason.IN_BAND if asked else Reason.EDGE_CONFIDENT
        verdict = Verdict(
            part_id=part.part_id,
            sha256=sha256,
            product=PRODUCT,
            path=str(part.path),
            label=label,
            p_defect=result.p_defect,
            where=Where.EDGE,
            reason=reason,
            edge_score=result.score,
            edge_label=label,
            edge_p_defect=result.p_defect,
            truth=part.label,
            escalated_for=reason if asked else None,
        )
        found.append(verdict)
    return found


def accuracy(station: Station, parts: Sequence[Part]) -> float:
    return float(np.mean([verdict.label is verdict.truth for verdict in judged(station, parts)]))


def sampler(station: Station) -> Callable[[Verdict, Label | None], Sample]:
    """Make samples of whole images."""

    def sample_of(verdict: Verdict, human: Label | None) -> Sample:
        _, image = read_with_hash(Path(verdict.path))
        result = station.predict(image, PRODUCT)
        query = Query(
            part_id=verdict.part_id,
            product=PRODUCT,
            image=image,
            original_size=(image.shape[1], image.shape[0]),
            anomaly_map=result.heatmap,
            edge_p_defect=result.p_defect,
            evidence=False,
        )
        return Sample(query, verdict.sha256, result.score, None, verdict.label, human)

    return sample_of


def knows(query: Query) -> Opinion | Exception:
    """A teacher that reads the truth off the part's name."""
    return Opinion(0.95 if query.part_id.startswith("bad") else 0.05, Evidence(), "oracle")


class DeskClient:
    """A line's client to a desk in this process; ``broken`` is the call that fails next."""

    def __init__(
        self, home: Path, settings: Settings, judge: Callable[[Query], Opinion | Exception] = knows, **more: Any
    ) -> None:
        self.teacher = Teacher(home / "teacher", settings, **more)
        self.desk = FolderDesk(home, self.teacher, settings.learn)
        self.asked: list[Query] = []
        self.sent: list[Frame] = []
        self.bytes_up = self.bytes_down = 0
        self.broken = ""

        def judge_all(queries: Sequence[Query]) -> list[Opinion | Exception]:
            self.asked += queries
            return [judge(query) for query in queries]

        self.desk.open(judge_all)

    def check(self) -> None:
        """It is there."""

    def send(self, outbox: Outbox, **_: Any) -> int:
        self._fail("send")
        names = outbox.pending()
        for name in names:
            self.bytes_up += len(outbox.read(name))
            self.sent.append(decode_frame(outbox.read(name), kinds=KINDS, most=10**9))
            self.desk.put(name, outbox.read(name))
            outbox.acknowledge([name])
        return len(names)

    def start(self, job_id: str, request: Mapping[str, Any], **_: Any) -> Job:
        self._fail("start")
        return self.desk.start(job_id, request)[0]

    def finish(self, job_id: str, **_: Any) -> Job:
        self._fail("finish")
        while not (job := self.desk.job(job_id)).ended:
            time.sleep(0.005)
        if job.status is JobStatus.FAILED:
            raise JobFailed(Reason.CLOUD_BAD_ANSWER, f"the job failed: {job.error}")
        return job

    def download(self, sha256: str, target: Path, **_: Any) -> None:
        self._fail("download")
        data = self.desk.update(sha256)
        self.bytes_down += len(data)
        target.write_bytes(data)

    def close(self) -> None:
        self.desk.close()

    def _fail(self, what: str) -> None:
        if self.broken == what:
            self.broken = ""
            raise CloudError(Reason.CLOUD_UNREACHABLE, f"{what} was cut off")


def line_of(root: Path, **changes: Any) -> Line:
    """Save the fitted station and return its line; ``changes`` are sections of the settings."""
    fitted().save(root / "station")
    settings = Settings.model_validate({"edge": {"threads": 1}, **changes})
    return Line(root / "station", PRODUCT, settings)


def desk_of(tmp_path, count=8, *, judge=None, change=lambda sample: sample, background=None):
    """A desk whose teacher has judged some samples; returns its folder and the verdicts by hash."""
    station, desk = fitted(), tmp_path / "desk"
    verdicts = judged(station, new_parts(tmp_path / "parts", count))
    names = []
    for verdict in verdicts:
        data = encode_frame(encode_sample(change(sampler(station)(verdict, None)), SETTINGS.cloud))
        names.append(frame_id(data))
        file = desk / "frames" / names[-1][:2] / names[-1]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def frame_of(name):
        data = (desk / "frames" / name[:2] / name).read_bytes()
        return decode_frame(data, kinds=(SAMPLE,), most=10**7)

    request = {
        "product": PRODUCT,
        "frames": names,
        "learn": SETTINGS.learn.model_dump(mode="json"),
        "background": background,
    }
    asked = judge or (lambda queries: [knows(query) for query in queries])
    Teacher(desk / HOME, SETTINGS)(request, frame_of, asked, lambda done, total: None)
    return desk, {verdict.sha256: verdict for verdict in verdicts}


def current(line: Line) -> Station:
    """The station of a line, in the version that was fitted."""
    return Station.load(line.station, settings=line.settings)


def one_round(line: Line, client: Any, parts: Sequence[Part], **more: Any) -> Learnt:
    """A round about parts that the router wanted the cloud for."""
    station = current(line)
    return learn(line, judged(station, parts), client, sampler(station), **more)
