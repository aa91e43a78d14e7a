"""What ``saec learn once`` says of a round: a line for each thing that matters, and a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from saec.evaluate.report_words import counted, percent
from saec.evaluate.table import Cell, Table
from saec.learn.probe import PROVEN_FROM, is_proven

if TYPE_CHECKING:
    from saec.learn.line import Learnt


ONE_SIDED = 15
"""From so many samples on it is told when a model calls all of them the same: it may not know the kind of part."""


def table(told: Mapping[str, Learnt]) -> Table:
    """Return one line for each round; one that was cut off before and ended now has its own."""
    rows = [
        row
        for product, learnt in told.items()
        for row in (*([] if learnt.earlier is None else [_row(product, learnt.earlier)]), _row(product, learnt))
    ]
    note = "probe: accuracy on parts held out from every lesson"
    return Table("Learnt", tuple(rows[0]), rows, (note,))


def _row(product: str, learnt: Learnt) -> dict[str, Cell]:
    applied = learnt.applied
    return {
        "product": product,
        "samples": learnt.samples,
        "opinions": len(learnt.rulings),
        "failed": learnt.failures,
        "by people": sum(ruling.who == "human" for ruling in learnt.rulings),
        "probe parts": None if applied is None else learnt.probes,
        "probe before": None if applied is None else percent(applied.before),
        "probe after": None if applied is None else percent(applied.after),
        "KB up": round(learnt.bytes_up / 1e3, 1),
        "KB down": round(learnt.bytes_down / 1e3, 1),
        "s": round(learnt.seconds, 1),
    }


def outcome(product: str, learnt: Learnt) -> Iterator[str]:
    """Yield what came of a round, the one that was cut off before it first."""
    if learnt.earlier is not None:
        yield from outcome(f"{product}, the round that was cut off", learnt.earlier)
    passed = learnt.passed
    if passed.gone:
        yield f"{product}: {counted(passed.gone, 'image')} gone or changed since the inspection."
    if passed.left and learnt.samples:
        yield f"{product}: {counted(passed.left, 'part')} wait for the next round (learn.samples, learn.outbox_bytes)."
    if learnt.failures:
        yield f"{product}: {counted(learnt.failures, 'sample')} could not be judged; the first: {learnt.failure}."
    models = [ruling.label for ruling in learnt.rulings if ruling.who == "model"]
    if len(models) >= ONE_SIDED and len(set(models)) == 1:
        yield (
            f"{product}: the teacher called all {len(models)} samples {models[0]}, and the probe set is its word too. "
            "Is it right? People's word wins: pass --labels."
        )
    yield f"{product}: {_end(learnt)}"


def _end(learnt: Learnt) -> str:
    applied, passed = learnt.applied, learnt.passed
    if not learnt.samples:
        return (
            f"nothing to learn from: {counted(passed.known, 'part')} learnt from before, {passed.gone} gone or "
            f"changed, {passed.unwanted} that the router did not want the cloud for."
        )
    if applied is None:
        return f"no update: {learnt.nothing or 'no opinion was sure enough to learn from'}."
    if not applied.kept:
        return f"version {applied.version} was worse on the probe set and was dropped; nothing has changed."
    where = "on the line" if learnt.taught == "line" else "in the cloud"
    proof = (
        ""
        if is_proven(learnt.probes)
        else f"; not proven ({counted(learnt.probes, 'probe part')}, it takes {PROVEN_FROM})"
    )
    return f"version {applied.version} counts from now on, taught {where}{proof}."
