"""What the cloud answers to a round, held to its contract: a broken service must not break the line."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saec.cloud.desk import Name
from saec.errors import first_problem
from saec.learn.round import Round, RoundOver
from saec.learn.rulings import Ruling


class Answer(BaseModel):
    """What the cloud says of a job, see :class:`saec.learn.teacher.Teacher`."""

    model_config = ConfigDict(frozen=True)

    opinions: list[Ruling]
    update: Name | None = None
    failed: int = Field(0, ge=0)
    failure: str | None = None
    nothing: str | None = None


def answer_of(round_: Round) -> Answer:
    """Return the cloud's answer, each opinion on a sample of the round, and one at most on each.

    Raises:
        RoundOver: it breaks the contract.
    """
    try:
        answer = Answer.model_validate(round_.result)
    except ValidationError as error:
        raise RoundOver(f"the service's answer cannot be used ({first_problem(error)})") from None
    frames = [ruling.frame for ruling in answer.opinions]
    for ruling in answer.opinions:
        sample = round_.samples.get(ruling.frame)
        if sample is None or sample.sha256 != ruling.sha256:
            raise RoundOver(f"the service's answer cannot be used (an opinion on another part: {ruling.part_id!r:.80})")
    if len(set(frames)) != len(frames):
        raise RoundOver("the service's answer cannot be used (two opinions on one sample)")
    return answer
