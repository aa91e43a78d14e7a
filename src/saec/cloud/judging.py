"""From a multimodal LLM's decision and answer to an opinion: the same for every runtime. No torch."""

from __future__ import annotations

import math

from saec.config import MllmSettings
from saec.errors import BadInput
from saec.types import CloudError, Evidence, Opinion, Query, Reason
from saec.vlm.answers import Decision, UnusableAnswer, no_evidence, read_evidence


def is_defect(decision: Decision, settings: MllmSettings) -> bool:
    """Whether the model will be asked for evidence."""
    return decision.mass >= settings.min_label_mass and decision.p_defect >= settings.tau


def opinion(
    decision: Decision,
    evidence: Evidence | None,
    model_id: str,
    settings: MllmSettings,
    timing_ms: dict[str, float],
) -> Opinion | CloudError:
    """Return the opinion, or what is wrong with a decision on which the model put next to no probability."""
    if not decision.mass >= settings.min_label_mass:  # NaN neither
        what = f"{model_id}: 0 and 1 have only {decision.mass:.2g} of the probability"
        return CloudError(Reason.CLOUD_BAD_ANSWER, what)
    return Opinion(
        decision.p_defect,
        evidence or Evidence(source=model_id),
        model_id,
        timing_ms,
        diagnostics={"label_mass": decision.mass},
    )


def evidence_of(text: str, seen: tuple[int, int], query: Query, *, source: str) -> Evidence:
    """Return the evidence in an answer, or the record of why it has none."""
    try:
        return read_evidence(text, seen, query, source=source)
    except UnusableAnswer as error:
        return no_evidence(error, source=source)


def check_numbers(decision: Decision, model_id: str) -> None:
    """Refuse a model that answers with no numbers.

    Raises:
        BadInput: its output is not a number.
    """
    if math.isnan(decision.mass):
        fix = "check the weights, or set mllm.dtype to a format of greater range, such as bfloat16"
        raise BadInput("the model's output is not a number", where=model_id, fix=fix)
