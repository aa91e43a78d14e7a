"""Verdict <-> one line of JSON: the schema of ``predictions.jsonl`` and of the ledger. Strict both ways."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from saec.errors import BadInput
from saec.types import Box, Evidence, Verdict

_ADAPTER = TypeAdapter(Verdict)


def verdict_to_json(verdict: Verdict) -> str:
    """Return the verdict as one line of JSON, keys in the order of the dataclass's fields.

    Raises:
        ValueError: a figure is not finite. JSON has no NaN, and ``null`` means "not measured", which would be a lie.
    """
    figures: dict[str, float | None] = {
        "p_defect": verdict.p_defect,
        "scene_score": verdict.scene_score,
        "edge_score": verdict.edge_score,
        "edge_p_defect": verdict.edge_p_defect,
        "cloud_p_defect": verdict.cloud_p_defect,
        **{f"timings_ms.{name}": ms for name, ms in verdict.timings_ms.items()},
        **{f"evidence.boxes.{i}.score": box.score for i, box in enumerate(verdict.evidence.boxes)},
    }
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} of part {verdict.part_id} is {value}")
    return _ADAPTER.dump_json(verdict).decode()


def verdict_from_json(line: str, *, where: object = "") -> Verdict:
    """Return the verdict of one line.

    Raises:
        BadInput: not JSON, an unknown or missing key, or a value of the wrong type; ``where`` names the place.
    """
    try:
        tree = json.loads(line, parse_constant=_refuse_constant)
        _refuse_unknown(tree)
        return _ADAPTER.validate_json(line, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(str(step) for step in first['loc'])}: {first['msg']}"
    except (ValueError, RecursionError) as error:
        what = str(error)
    raise BadInput(f"not a verdict ({what})", where=where, fix="the file is from another version or damaged")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse_unknown(tree: object) -> None:
    _check_keys(tree, Verdict, "")
    if isinstance(tree, Mapping) and isinstance(evidence := tree.get("evidence"), Mapping):
        _check_keys(evidence, Evidence, "evidence.")
        boxes = evidence.get("boxes")
        for index, box in enumerate(boxes if isinstance(boxes, list) else []):
            _check_keys(box, Box, f"evidence.boxes.{index}.")


def _check_keys(tree: object, of: type[Any], path: str) -> None:
    if isinstance(tree, Mapping):
        unknown = sorted(tree.keys() - {field.name for field in fields(of)})
        if unknown:
            raise ValueError(f"unknown key {path}{unknown[0]}")
