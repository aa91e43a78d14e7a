"""Reading what an OpenAI-compatible endpoint answered: P(defect) from first-token log-probabilities, and texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saec.errors import first_problem
from saec.vlm.answers import Decision, UnusableAnswer
from saec.vlm.prompt import LABELS

_SPACES = " \t\r\n▁Ġ"
"""What tokenizers glue to the front of a word, in plain text and in their own alphabets."""


class _Lenient(BaseModel):
    # Servers add fields of their own; only what is read here is checked.
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Candidate(_Lenient):
    token: str
    logprob: Annotated[float, Field(le=1e-3)]


class _First(_Candidate):
    top_logprobs: list[_Candidate]


class _LogProbs(_Lenient):
    content: Annotated[list[_First], Field(min_length=1)]


class _LabelChoice(_Lenient):
    logprobs: _LogProbs


class _LabelReply(_Lenient):
    choices: Annotated[list[_LabelChoice], Field(min_length=1)]


class _Message(_Lenient):
    content: str


class _TextChoice(_Lenient):
    message: _Message
    finish_reason: str | None = None


class _TextReply(_Lenient):
    choices: Annotated[list[_TextChoice], Field(min_length=1)]


class _Model(_Lenient):
    id: str


class _Models(_Lenient):
    data: list[_Model]


def first_token(body: bytes) -> dict[str, float]:
    """Return the likeliest first tokens of a chat completion and their log-probabilities.

    Raises:
        UnusableAnswer: it has none.
    """
    try:
        first = _LabelReply.model_validate_json(body).choices[0].logprobs.content[0]
    except ValidationError as error:
        raise UnusableAnswer(f"no first-token log-probabilities ({first_problem(error)})") from None
    # Keyed by token: servers differ in whether the chosen token is repeated among the top ones.
    return {each.token: each.logprob for each in (first, *first.top_logprobs)}


def read_label(body: bytes, *, min_mass: float) -> Decision:
    """Return P(defect) from a chat completion with the log-probabilities of its first token.

    P("0") and P("1") are sums over the tokens that spell the digit, such as ``1`` and ``·1``; P(defect) is
    P("1") / (P("0") + P("1")). A label that is not among the reported tokens counts as 0.

    Raises:
        UnusableAnswer: no log-probabilities, neither label among them, or both together below ``min_mass``.
    """
    found = first_token(body)
    good, defect = (
        math.fsum(math.exp(logprob) for token, logprob in found.items() if token.strip(_SPACES) == label)
        for label in LABELS
    )
    mass = good + defect
    if mass == 0:
        raise UnusableAnswer(f"neither 0 nor 1 is among the likely first tokens {_quoted(list(found))}")
    if mass < min_mass:
        raise UnusableAnswer(f"0 and 1 have only {mass:.2g} of the probability, {_quoted(list(found))} the rest")
    return Decision(p_defect=defect / mass, mass=min(1.0, mass))


def read_text(body: bytes) -> str:
    """Return the text in a chat completion.

    Raises:
        UnusableAnswer: no text, or one that was cut off.
    """
    try:
        choice = _TextReply.model_validate_json(body).choices[0]
    except ValidationError as error:
        raise UnusableAnswer(f"no text ({first_problem(error)})") from None
    if choice.finish_reason == "length":
        raise UnusableAnswer("the answer was cut off")
    return choice.message.content


def read_models(body: bytes) -> list[str]:
    """Return the model names in the answer of ``/v1/models``.

    Raises:
        UnusableAnswer: not such a list.
    """
    try:
        return [model.id for model in _Models.model_validate_json(body).data]
    except ValidationError as error:
        raise UnusableAnswer(f"not a list of models ({first_problem(error)})") from None


def _quoted(tokens: Sequence[str]) -> str:
    return ", ".join(repr(token) for token in tokens[:5])
