"""A finished run as the report reads it: ``predictions.jsonl``, ``summary.json``, ``manifest.json``, ``heatmaps/``."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from saec.errors import BadInput
from saec.fleet.verdict_json import verdict_from_json
from saec.types import Label, Verdict, Where

RERUN = "inspect or evaluate again into this folder"
NEEDED = (
    *("n", "labelled", "unreadable", "accuracy", "balanced_accuracy", "auroc", "escape_rate", "overkill_rate"),
    *("confusion", "intervals", "per_product", "routing", "time", "latency_ms", "deadline", "uplink_bytes", "energy"),
    *("memory", "models", "calibration"),
)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run. ``name`` is the manifest's own or the folder's; ``suspicion`` is P(defect) of each readable verdict,
    stretched so that 0.5 is the threshold that decided it."""

    path: Path
    name: str
    verdicts: tuple[Verdict, ...]
    summary: Mapping[str, Any]
    manifest: Mapping[str, Any]
    suspicion: Mapping[int, float]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a run folder.

        Raises:
            BadInput: a file is missing, damaged, or does not belong to the others; names the file and the line.
        """
        if not path.is_dir():
            raise BadInput("no such run folder", where=path, fix="pass the folder given to --out")
        verdicts = _verdicts(path / "predictions.jsonl")
        summary = _object(path / "summary.json")
        missing = [key for key in NEEDED if key not in summary]
        if missing:
            raise BadInput(f"the summary lacks {', '.join(missing)}", where=path / "summary.json", fix=RERUN)
        if summary["n"] != len(verdicts):
            raise BadInput(
                f"summary.json counts {summary['n']} parts, predictions.jsonl has {len(verdicts)}",
                where=path,
                fix=RERUN,
            )
        manifest = _object(path / "manifest.json")
        name = manifest.get("name") or path.resolve().name
        return cls(path, str(name), verdicts, summary, manifest, _suspicion(verdicts, summary["calibration"]))

    @property
    def escalation(self) -> float | None:
        """Share of the parts that the cloud was asked about."""
        routing, n = self.summary["routing"], self.summary["n"]
        return (routing["cloud"] + routing["fallback"]) / n if n else None

    def heatmap(self, verdict: Verdict) -> Path:
        """Where this part's 8-bit heatmap is if one was stored."""
        return self.path / "heatmaps" / f"{verdict.sha256[:16]}.png"

    def image(self, verdict: Verdict) -> Path | None:
        """The original image if it is still where it was; relative paths may start here or at the run folder."""
        candidates = [Path(verdict.path), self.path / verdict.path] if verdict.path else []
        return next((p for p in candidates if p.is_file()), None)


def _verdicts(file: Path) -> tuple[Verdict, ...]:
    found = []
    for number, line in enumerate(_read(file).split("\n"), start=1):
        if line.strip():
            found.append(verdict_from_json(line, where=f"{file}:{number}"))
    return tuple(found)


def _object(file: Path) -> dict[str, Any]:
    text = _read(file)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"damaged JSON ({error.msg})", where=f"{file}:{error.lineno}", fix=RERUN) from None
    if not isinstance(value, dict):
        raise BadInput("expected a JSON object", where=f"{file}:1", fix=RERUN)
    return value


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput("the run is unfinished or not a run: file missing", where=file, fix=RERUN) from None
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise BadInput("not UTF-8 text", where=f"{file}:{line}", fix=RERUN) from None
    except OSError as error:
        raise BadInput("cannot read", where=file, fix=error.strerror or "check the path") from None


def _suspicion(verdicts: tuple[Verdict, ...], calibration: Mapping[str, Any]) -> dict[int, float]:
    """Put all verdicts on one scale: products and arms have thresholds of their own, here each becomes 0.5."""
    groups: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for i, v in enumerate(verdicts):
        if v.p_defect is not None and v.label is not Label.UNREADABLE:
            groups[v.product, v.where is Where.CLOUD].append(i)
    found = {}
    for (product, cloud), members in groups.items():
        cut = _cut([verdicts[i] for i in members], _hints(calibration, product, "tau_cloud" if cloud else "tau_edge"))
        for i in members:
            found[i] = _stretch(verdicts[i].p_defect or 0.0, cut)
    return found


def _hints(calibration: Mapping[str, Any], product: str, key: str) -> list[float]:
    """Thresholds that may have decided, the calibrated one first; a fused opinion is cut at one half."""
    found: Any = calibration
    for step in ("products", product, "thresholds", key):
        found = found.get(step) if isinstance(found, Mapping) else None
    return [float(found), 0.5] if isinstance(found, int | float) and 0 < found < 1 else [0.5]


def _cut(members: list[Verdict], hints: list[float]) -> float:
    """The threshold that these labels obey: a known one if they do, else the middle of the gap between them."""
    passed = max((v.p_defect or 0.0 for v in members if v.label is Label.GOOD), default=0.0)
    called = min((v.p_defect or 0.0 for v in members if v.label is Label.DEFECT), default=1.0)
    obeyed = [hint for hint in hints if passed < hint <= called]
    return obeyed[0] if obeyed else hints[0] if passed >= called else (passed + called) / 2


def _stretch(p: float, cut: float) -> float:
    cut = min(max(cut, 1e-9), 1 - 1e-9)
    return 0.5 * p / cut if p < cut else 0.5 + 0.5 * (p - cut) / (1 - cut)
