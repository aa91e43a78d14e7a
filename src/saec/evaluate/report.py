"""The report: one self-contained HTML page about one or several runs. Opens anywhere, asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from saec import __version__
from saec.calibrate.sweep import SweepPoint
from saec.errors import BadInput
from saec.evaluate import report_charts as charts
from saec.evaluate import report_view as view
from saec.evaluate import report_words as words
from saec.evaluate.report_run import RunFolder
from saec.evaluate.report_svg import Chart
from saec.evaluate.summary import write_atomically

__all__ = ["RunFolder", "render", "write_report"]


def write_report(runs: Sequence[RunFolder], out: Path, *, sweep: Sequence[SweepPoint] | None = None) -> None:
    """Write ``out`` (HTML) about ``runs``, whole or not at all.

    The gallery, routing and score charts show the main run: the first one whose manifest says ``"mode": "cascade"``,
    else the first. Original images are read from where the verdicts say; one that is gone becomes a placeholder.

    Args:
        runs: at least one; several are compared side by side.
        sweep: points of :mod:`saec.calibrate.sweep`, drawn into the escalation curve.

    Raises:
        BadInput: no runs, or ``out`` cannot be written.
    """
    if not runs:
        raise BadInput("no run to report on", fix="pass at least one run folder")
    write_atomically(out, render(runs, sweep=sweep))


def render(runs: Sequence[RunFolder], *, sweep: Sequence[SweepPoint] | None = None) -> str:
    """Return the page as text. The same runs and images give the same bytes."""
    run = next((r for r in runs if r.manifest.get("mode") == "cascade"), runs[0])
    s, script = run.summary, _asset("report.js")
    scores, scores_left_out = charts.score_charts(run)
    columns, rows = view.comparison(runs)
    return page(
        "report.html.j2",
        js=Markup(script),  # noqa: S704 - our own file, not input
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        run=run,
        runs=runs,
        headline=words.headline(s),
        uncertainty=words.uncertainty(s),
        attention=words.attention(s),
        drifted=words.drifted(s),
        main_cards=view.main_cards(s),
        more_cards=view.more_cards(s),
        comparison_columns=columns,
        comparison_rows=rows,
        gallery=view.gallery(run),
        quality_charts=_present(charts.threshold_chart(run), charts.risk_coverage_chart(runs)),
        routing_charts=_present(charts.escalation_chart(runs, sweep)),
        latency_charts=_present(charts.latency_chart(run)),
        score_charts=scores,
        scores_left_out=scores_left_out,
        reasons=view.reason_rows(s),
        products=view.product_rows(s),
        stages=_stages(s["time"]),
        calibration=_calibration(s["calibration"]),
        drift=view.drift_rows(s),
        facts=_facts(run),
        terms=words.TERMS,
    )


def page(template: str, **values: object) -> str:
    """Return one of our templates, filled in and with the style sheet inside; a value that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("saec.evaluate"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    css = Markup(_asset("report.css"))  # noqa: S704 - our own file, not input
    return environment.get_template(template).render(css=css, version=__version__, **values)


def _asset(name: str) -> str:
    return resources.files("saec.evaluate").joinpath("templates", name).read_text(encoding="utf-8")


def _present(*found: Chart | None) -> list[Chart]:
    return [chart for chart in found if chart is not None]


def _stages(time: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = (
        ("wall_s", "Whole run"),
        ("decode_s", "Decode"),
        ("scene_s", "Scene"),
        ("edge_s", "Edge"),
        ("cloud_s", "Cloud"),
        ("explain_s", "Explanations"),
    )
    return [(name, words.number(time.get(key), "s", 2)) for key, name in names]


def _calibration(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Statements first, then each product's own, then whatever else was stored as flat rows."""
    products = calibration.get("products")
    of_products = products if isinstance(products, Mapping) else {}
    rest = {key: value for key, value in calibration.items() if key not in ("statement", "products")}
    return {
        "statement": calibration.get("statement"),
        "products": [
            (name, p.get("statement"), flatten({k: v for k, v in p.items() if k != "statement"}))
            for name, p in of_products.items()
            if isinstance(p, Mapping)
        ],
        "rest": flatten(rest),
    }


def _facts(run: RunFolder) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(heading, what it is, rows) of the things that let somebody repeat the run."""
    manifest = {key: value for key, value in run.manifest.items() if key != "environment"}
    energy, machine = run.summary["energy"], run.summary.get("machine", {})
    measured = [
        ("energy", f"{energy['status']}: {energy.get('detail') or 'no detail'}"),
        ("processor time", words.number(machine.get("cpu_s"), "s")),
        ("GPU utilisation, mean", words.number(machine.get("gpu_utilisation"), "%")),
        ("GPU power, mean", words.number(machine.get("gpu_w"), "W")),
    ]
    return [
        ("Models", "Versions and hashes of what judged", flatten(run.summary["models"])),
        ("Machine", "Where the run was made", flatten(run.manifest.get("environment") or {})),
        ("Measured", "How cost was measured", measured),
        ("Manifest", "The run's own record", flatten(manifest)),
    ]


def flatten(tree: object, prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as rows ``("a.b", "value")``, in order; long lists are cut with their length stated."""
    if isinstance(tree, Mapping):
        return [row for key, value in tree.items() for row in flatten(value, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(tree, list | tuple):
        text = ", ".join(str(item) for item in tree[:8]) + (f", … ({len(tree)} in all)" if len(tree) > 8 else "")
    elif isinstance(tree, float):
        text = f"{tree:.6g}"
    else:
        text = words.DASH if tree is None else str(tree)
    return [(prefix, text)]
