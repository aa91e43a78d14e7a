"""The line's side of a round of learning: samples up, opinions and an update down, applied where the probe set agrees.

All that a round has begun lies in the station's folder, so that a killed one goes on where it was: the frames in the
outbox, the round in ``round.json``, what came of it in ``opinions.jsonl`` and ``samples.jsonl``, the probe set's images
in ``probe/``. Only frames of the open round go up, made as the settings are now.

Where the cloud sends opinions alone, because it has seen tokens or crops only or has no copy of this station, the line
teaches itself from its own images, through the same update, slots and probe set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from saec.cloud.desk import FramesMissing
from saec.cloud.learning import JobFailed, LearnClient, ServiceRefused
from saec.fleet.outbox import Outbox
from saec.fleet.slots import Slots
from saec.learn.answer import Answer, answer_of
from saec.learn.apply import Applied
from saec.learn.begin import Passed, SampleOf, anew, begin
from saec.learn.past import End, add_past
from saec.learn.probe import probe_set, tidy_probe_set
from saec.learn.round import ROUND, Line, Round, RoundOver, alone, given_by
from saec.learn.rulings import OPINIONS, Ruling, append_rulings, open_rulings
from saec.learn.settle import UPDATE, Made, Step, applied_here, settled_update, taught_here
from saec.learn.teaching import Without
from saec.learn.update import Refused
from saec.types import Label, Verdict

__all__ = ["DEADLINE_S", "Learnt", "Line", "SampleOf", "learn"]

OUTBOX = "outbox.sqlite"

DEADLINE_S = 3600.0
"""Longest wait for the cloud, in each step."""

Tell = Callable[[str], None]
"""Told in one line what the caller should know while it waits."""


@dataclass(frozen=True, slots=True)
class Learnt:
    """What came of a round. ``bytes_*`` are those of this call, ``update_bytes`` of the update, made here or there;
    ``applied`` is ``None`` where nothing was to be taught, ``nothing`` says why if the cloud or the teaching did.

    ``probes`` is the number of parts that the update was measured on, ``failures`` that of samples that could not be
    judged, ``failure`` the first reason. ``passed`` are the parts that were no samples. ``earlier`` is the round that
    this call has ended before it began this one.
    """

    samples: int
    rulings: tuple[Ruling, ...] = ()
    taught: str | None = None
    applied: Applied | None = None
    update_bytes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    probes: int = 0
    failures: int = 0
    failure: str | None = None
    nothing: str | None = None
    passed: Passed = field(default_factory=Passed)
    earlier: Learnt | None = None


def learn(
    line: Line,
    verdicts: Sequence[Verdict],
    client: LearnClient,
    sample_of: SampleOf,
    *,
    labels: Mapping[str, Label] | None = None,
    uncertain: bool = True,
    without: Collection[Without] = (),
    seed: int = 0,
    step: Step = lambda name, done, total: None,
    tell: Tell = lambda what: None,
) -> Learnt:
    """Run one round and apply what it brings, after the one that was cut off, if there is one.

    Args:
        line: who learns.
        verdicts: of the parts since the last round.
        client: of the cloud service.
        sample_of: makes the samples.
        labels: people's, by content hash.
        uncertain: see :func:`saec.learn.samples.choose`.
        without: see :func:`saec.learn.teaching.teach`.
        seed: of the lot.
        step: told how far it is.
        tell: told what happens to a round that was cut off.

    Raises:
        RoundOver: the round has ended without an update.
        CloudError: the cloud did not do its part; the next call goes on.
        Refused: the update must not be applied here; the round is over.
        BadInput: the station or the round's folder is damaged, or another process learns here.
    """
    given = given_by(verdicts, labels or {})
    with alone(line.home):
        work = _Work(line, client, sample_of, step, tell)
        open_, earlier = Round.load(line.home), None
        if open_ is not None:
            tell(f"{line.product}: goes on with the round begun at {open_.begun}")
            try:
                earlier = work.go(open_)
            except (RoundOver, Refused) as error:
                if open_.given == given:
                    raise
                tell(f"{line.product}: {error}")
            if open_.given == given and earlier is not None:
                return earlier
        with work.outbox() as outbox:
            round_, passed = begin(
                line, verdicts, outbox, sample_of, labels or {}, uncertain=uncertain, without=without, seed=seed
            )
        if round_ is None:
            return Learnt(0, passed=passed) if earlier is None else earlier
        return replace(work.go(round_), passed=passed, earlier=earlier)


@dataclass(frozen=True, slots=True)
class _Work:
    """A round from its request to its end, with what that takes."""

    line: Line
    client: LearnClient
    sample_of: SampleOf
    step: Step
    tell: Tell

    def outbox(self) -> Outbox:
        return Outbox(self.line.home / OUTBOX, most_bytes=self.line.settings.learn.outbox_bytes)

    def go(self, round_: Round) -> Learnt:
        """Bring a round to its end, from wherever it is."""
        client, begun = self.client, time.monotonic()
        up, down = client.bytes_up, client.bytes_down
        rulings: Sequence[Ruling] = ()
        try:
            settled = settled_update(self.line, round_)
            if settled is None:
                round_ = self._fitting(round_)
            if round_.result is None:
                round_ = self._answered(round_)
            answer = answer_of(round_)
            rulings = answer.opinions
            taught, data, nothing = self._update_of(round_, answer, settled)
            probes = probe_set(self.line.home, rulings, self.line.settings)
            applied = settled or (None if data is None else applied_here(self.line, data, probes))
        except (RoundOver, Refused):
            _close(self.line, round_, rulings, "over")
            raise
        _close(self.line, round_, rulings, "over" if applied is None else "learnt" if applied.kept else "dropped")
        return Learnt(
            samples=len(round_.samples),
            rulings=tuple(rulings),
            taught=taught,
            applied=applied,
            update_bytes=0 if data is None else len(data),
            bytes_up=client.bytes_up - up,
            bytes_down=client.bytes_down - down,
            seconds=time.monotonic() - begun,
            probes=0 if applied is None else len(probes),
            failures=answer.failed,
            failure=answer.failure,
            nothing=nothing,
        )

    def _fitting(self, round_: Round) -> Round:
        """Return the round if it is still of use as it is, else one begun anew with the same parts."""
        uplink, pointer, asked = self.line.settings.cloud.uplink, Slots(self.line.station).pointer, round_.asked
        if round_.result is None and round_.uplink != uplink:
            why = f"samples go up as {uplink} now, not as {round_.uplink}"
        elif asked.previous != pointer.current.version or asked.version <= pointer.highest:
            why = f"the station is at version {pointer.current.version} now"
        else:
            return round_
        self.tell(f"{self.line.product}: {why}: the round is begun anew, what was made for it before stays here")
        return self._anew(round_)

    def _anew(self, round_: Round) -> Round:
        with self.outbox() as outbox:
            return anew(self.line, round_, outbox, self.sample_of)

    def _answered(self, round_: Round) -> Round:
        """Send the round's frames, have its job done, and return the round with the answer, which is on the disk."""
        try:
            try:
                result = self._asked(round_)
            except FramesMissing as error:
                self.tell(f"{self.line.product}: the service lacks {len(error.names)} frames; they go up again")
                round_ = self._anew(round_)
                result = self._asked(round_)
        except (JobFailed, FramesMissing) as error:
            raise RoundOver(str(error)) from None
        except ServiceRefused as error:
            if not error.for_good:
                raise
            raise RoundOver(f"{error}{error.fix and f' ({error.fix})'}") from None
        round_ = round_.model_copy(update={"result": result})
        round_.save(self.line.home)
        return round_

    def _asked(self, round_: Round) -> dict[str, object]:
        def sending(done: int, total: int) -> None:
            self.step("sending samples", done, total)

        def teaching(done: int, total: int) -> None:
            self.step("the cloud teaches", done, total)

        with self.outbox() as outbox:
            outbox.keep_only(round_.samples)
            self.client.send(outbox, deadline_s=DEADLINE_S, progress=sending)
        job = self.client.start(round_.job, round_.request, deadline_s=DEADLINE_S)
        return dict(self.client.finish(job.id, deadline_s=DEADLINE_S, progress=teaching).result or {})

    def _update_of(self, round_: Round, answer: Answer, settled: Applied | None) -> Made:
        """Return who taught, and the encoded update, from the cloud or made here from the opinions; or why none."""
        file = self.line.home / UPDATE
        if settled is not None:
            return "line" if answer.update is None else "cloud", file.read_bytes(), None
        if answer.update is not None:
            most = self.line.settings.learn.max_frame_bytes
            try:
                self.client.download(answer.update, file, most=most, deadline_s=DEADLINE_S)
            except ServiceRefused as error:
                if error.status != 404:
                    raise
                raise RoundOver("the service does not have the update any more") from None
            return "cloud", file.read_bytes(), None
        if answer.nothing is not None:
            return None, None, answer.nothing
        return taught_here(self.line, round_, answer.opinions, self.step)


def _close(line: Line, round_: Round, rulings: Sequence[Ruling], end: End) -> None:
    before = set(open_rulings(line.home / OPINIONS))  # a kill may have come between these lines
    append_rulings(line.home / OPINIONS, [each for each in rulings if each not in before])
    add_past(line.home, round_, end)
    # The round first: while it is open, the update tells whether it counts already.
    for file in (line.home / ROUND, line.home / UPDATE, *line.home.glob("*.part")):
        file.unlink(missing_ok=True)
    tidy_probe_set(line.home, line.settings)
