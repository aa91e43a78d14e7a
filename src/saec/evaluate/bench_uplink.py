"""What a question to the cloud costs in bytes, and what its answer is worth: image, crop, or tokens.

Every question goes through the wire format: its bytes are those of a body, and the model is asked about what a service
reads in it. So tokens are compared with JPEGs of falling quality, not with pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from saec.calibrate.fusion import FINAL_TAU, fit_fusion
from saec.calibrate.metrics import auroc
from saec.cloud import wire
from saec.config import CloudSettings, Settings, TokenSettings
from saec.errors import BadInput
from saec.evaluate.question import image_of, question_about
from saec.evaluate.report_svg import Axis, Chart, Line, draw, nice_ticks
from saec.evaluate.runner import Station
from saec.evaluate.table import Cell, Table
from saec.types import Backend, Image, Label, Opinion, Part, Query
from saec.vlm.tokens.tower import TowerTokeniser

Choice = Literal["dropout", "entropy", "random", "length"]
CHOICES: tuple[Choice, ...] = ("dropout", "entropy", "random", "length")
"""How tokens are chosen; ``length`` is what dropout on finished tokens would measure."""

RATIOS = (1.0, 0.5, 0.25, 0.125)
QUALITIES = (92, 75, 50, 30)

COLUMNS = ("what goes up", "bytes", "accuracy", "AUROC", "fused accuracy", "fused AUROC", "mean |ΔP| to the image")


@dataclass(frozen=True, slots=True)
class Way:
    """One way to ask: an image or a crop of some JPEG quality, or tokens as ``how`` says, chosen by ``choice``."""

    name: str
    uplink: Literal["image", "crop", "tokens"]
    quality: int = 92
    choice: Choice = "dropout"
    how: TokenSettings = field(default_factory=TokenSettings)


def default_ways(how: TokenSettings) -> list[Way]:
    """Return JPEGs of falling quality, shares of tokens chosen in every manner, and coarser and finer tokens."""
    ways = [Way(f"image, quality {quality}", "image", quality) for quality in QUALITIES]
    ways += [Way(f"crop, quality {quality}", "crop", quality) for quality in QUALITIES[::3]]
    for choice in CHOICES:
        for ratio in RATIOS if choice == "dropout" else RATIOS[1:]:
            ways.append(_tokens(how, choice, ratio=ratio))
    ways.append(replace(_tokens(how, "dropout", ratio=1e-9), name="one token, and the map"))
    ways += [_tokens(how, "dropout", dims=dims) for dims in (16, 32) if dims != how.dims]
    return ways + [_tokens(how, "dropout", bits=bits) for bits in (6, 8) if bits != how.bits]


def _tokens(how: TokenSettings, choice: Choice, **changes: float) -> Way:
    changed = how.model_copy(update=changes)
    name = f"tokens, {changed.ratio:g} by {choice}, {changed.dims} coordinates of {changed.bits} bits"
    return Way(name, "tokens", choice=choice, how=changed)


@dataclass(slots=True)
class Stages:
    """Milliseconds of making tokens, by stage, of every part."""

    ms: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add what the block takes."""
        begun = time.perf_counter()
        yield
        self.ms.setdefault(stage, []).append((time.perf_counter() - begun) * 1e3)


@dataclass(frozen=True, slots=True, eq=False)
class Glance:
    """One image as the tower saw it: all tokens [L, W], and how they are ranked by each choice [L]."""

    tokens: NDArray[np.float32]
    ranks: Mapping[Choice, NDArray[np.float64]]


def glance(tower: TowerTokeniser, image: Image, how: TokenSettings, stages: Stages) -> Glance:
    """Look at an image once, for all ways of choosing."""
    with stages.timed("lower half"):
        sight = tower.see(image)
    with stages.timed("upper half"):
        tokens = tower.plain(sight)
    ranks: dict[Choice, NDArray[np.float64]] = {}
    with stages.timed(f"{how.passes} passes with dropout"):
        ranks["dropout"] = tower.choosing(how.model_copy(update={"choose": "dropout"})).uncertainty(sight)
    with stages.timed("entropy of greys"):
        ranks["entropy"] = tower.choosing(how.model_copy(update={"choose": "entropy"})).uncertainty(sight)
    ranks["random"] = np.random.default_rng(int.from_bytes(sight.seed, "big")).random(len(tokens))
    ranks["length"] = (tokens.astype(np.float64) ** 2).sum(axis=1)
    return Glance(tokens, ranks)


def bench_uplink(
    backend: Backend,
    station: Station,
    tower: TowerTokeniser,
    parts: Sequence[Part],
    settings: Settings,
    ways: Sequence[Way],
    *,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> tuple[Table, Table]:
    """Ask about every part in every way.

    Args:
        backend: a warm model that takes tokens of this tower.
        station: makes the maps, and the edge's opinion that the cloud's is fused with.
        tower: makes the tokens.
        parts: labelled, unknown to station and model.
        settings: of reading, sending and tokens.
        ways: what to compare; the first is what the others' answers are compared with.
        progress: called with step, done and total.

    Returns:
        Bytes and accuracy of every way, and what making tokens takes.

    Raises:
        BadInput: no labelled parts, or one that cannot be read or judged.
    """
    if not parts or any(part.label not in (Label.GOOD, Label.DEFECT) for part in parts):
        raise BadInput("labelled parts are needed to say how often an answer is right")
    stages = Stages()
    p_cloud, sizes = np.zeros((2, len(ways), len(parts)))
    p_edge = np.zeros(len(parts))
    for at, part in enumerate(parts):
        progress("asking in every way", at, len(parts))
        image = image_of(part.path, max_pixels=settings.data.max_pixels)
        seen = glance(tower, image, settings.tokens, stages)
        result = station.predict(image, part.product)
        p_edge[at] = result.p_defect
        for number, way in enumerate(ways):
            query = question_about(part.part_id, part.product, image, result, uplink=way.uplink)
            body = _body(query, way, seen, tower, settings.cloud, stages)
            sizes[number, at] = len(body)
            p_cloud[number, at] = _answer(backend, body, settings, part)
    truth = np.array([part.label is Label.DEFECT for part in parts])
    products = np.array([part.product for part in parts])
    return _accuracy(backend, ways, p_cloud, sizes, p_edge, truth, products), _times(stages, len(parts))


def _body(
    query: Query, way: Way, seen: Glance, tower: TowerTokeniser, settings: CloudSettings, stages: Stages
) -> bytes:
    if way.uplink == "tokens":
        with stages.timed("coding"):
            tokens = tower.choosing(way.how).chosen(seen.tokens, seen.ranks[way.choice])
        query = replace(query, image=None, tokens=tokens)
    return wire.encode_question(query, [], max_side=settings.max_side, jpeg_quality=way.quality)


def _answer(backend: Backend, body: bytes, settings: Settings, part: Part) -> float:
    arrived = wire.parse_question(body).decode({}, max_pixels=settings.serve.max_pixels)
    (answer,) = backend.judge([arrived])
    if not isinstance(answer, Opinion):
        raise BadInput(f"a part cannot be judged ({answer})", where=part.path)
    return answer.p_defect


def _accuracy(
    backend: Backend,
    ways: Sequence[Way],
    p_cloud: NDArray[np.float64],
    sizes: NDArray[np.float64],
    p_edge: NDArray[np.float64],
    truth: NDArray[np.bool_],
    products: NDArray[np.str_],
) -> Table:
    rows: list[Mapping[str, Cell]] = [{"what goes up": "nothing: the edge alone", "bytes": 0, **_fused(p_edge, truth)}]
    for number, way in enumerate(ways):
        p = p_cloud[number]
        row: dict[str, Cell] = {"what goes up": way.name, "bytes": round(float(np.median(sizes[number])))}
        row |= {"accuracy": _right(p, truth), "AUROC": auroc(p, truth)}
        row |= _fused(crossed(p_edge, p, truth, products), truth)
        rows.append({**row, COLUMNS[-1]: float(np.abs(p - p_cloud[0]).mean())})
    notes = (
        f"{len(truth)} parts, {int(truth.sum())} of them defects; answers of {backend.model_id}; a defect from 0.5 on",
        "bytes: median of a question's body with its header and the anomaly map",
        "fused with the edge's opinion by weights fitted to the other half of the product's parts",
    )
    return Table("Uplink: bytes and accuracy", COLUMNS, rows, notes)


def crossed(
    p_edge: NDArray[np.float64],
    p_cloud: NDArray[np.float64],
    truth: NDArray[np.bool_],
    products: NDArray[np.str_],
) -> NDArray[np.float64]:
    """Return P(defect) [n] of both opinions, each half of a product's parts by the fusion fitted to the other half."""
    found = np.zeros(len(truth))
    for product in np.unique(products):
        members = np.flatnonzero(products == product)
        for half in (0, 1):
            judged, fitted_to = members[half::2], members[1 - half :: 2]
            if not len(judged):
                continue
            used = fitted_to if len(fitted_to) else judged
            fusion = fit_fusion(p_edge[used], p_cloud[used], truth[used])
            found[judged] = fusion.p_defect(p_edge[judged], p_cloud[judged])
    return found


def _fused(p: NDArray[np.float64], truth: NDArray[np.bool_]) -> dict[str, Cell]:
    return {"fused accuracy": _right(p, truth), "fused AUROC": auroc(p, truth)}


def _right(p: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    return float(((p >= FINAL_TAU) == truth).mean())


def _times(stages: Stages, parts: int) -> Table:
    rows: list[Mapping[str, Cell]] = [
        {"stage": stage, "p50 ms": float(np.median(ms)), "p90 ms": float(np.percentile(ms, 90))}
        for stage, ms in stages.ms.items()
    ]
    return Table("Making tokens on the edge", ("stage", "p50 ms", "p90 ms"), rows, (f"{parts} parts",))


def curve(table: Table) -> Chart:
    """Return the chart of the first table of :func:`bench_uplink`: accuracy over bytes, tokens beside JPEGs.

    Of tokens it shows those as fine as the first ones.
    """
    names = [str(row[COLUMNS[0]]) for row in table.rows]
    fineness = next(name for name in names if name.startswith("tokens")).rpartition(", ")[2]
    groups = {"image": "image, ", "tokens chosen by dropout": "by dropout, ", "by entropy": "by entropy, "}
    lines = []
    for style, (label, word) in enumerate({**groups, "by lot": "by random, "}.items()):
        rows = [row for row, name in zip(table.rows, names, strict=True) if word in name and _as(name, fineness)]
        points = [(math.log10(float(row["bytes"] or 1)), float(row["accuracy"] or 0)) for row in rows]
        lines.append(Line(label, sorted(points), style))
    xs, ys = zip(*(point for line in lines for point in line.points), strict=True)
    x = Axis("bytes of a question", min(xs), max(xs), nice_ticks(min(xs), max(xs), 3), lambda v: f"{10**v:,.0f}")
    y = Axis.nice("accuracy of the answer", min(ys), max(ys), "{:.1%}".format)
    return draw(table.title, x, y, lines=lines, alt="Accuracy over bytes, tokens beside JPEGs of falling quality.")


def _as(name: str, fineness: str) -> bool:
    return not name.startswith("tokens") or name.endswith(fineness)
