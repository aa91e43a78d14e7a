"""A run in a process of its own, to be killed at any moment: ``python route_killed_run.py FOLDER PARTS``.

It appends to ``FOLDER/log`` what the edge looked at and what was acknowledged, each line in one write.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from route_fakes import FakeCloud, FakeEdge, FakeExplainer, fake_decode, fake_scene, make_parts, make_settings
from saec.fleet.ledger import Ledger
from saec.route.pipeline import inspect_stream
from saec.types import EdgeResult, Evidence, Image, Opinion, Query, Verdict


def main(folder: Path, count: int) -> None:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(what: str, name: str) -> None:
        os.write(log, f"{what} {name}\n".encode())

    class LoggedEdge(FakeEdge):
        def predict(self, image: Image, product: str) -> EdgeResult:
            note("edge", str(int(image[0, 0, 0]) + 251 * int(image[0, 0, 1])))
            return super().predict(image, product)

    class LoggedCloud(FakeCloud):
        def judge(self, query: Query, *, deadline_s: float) -> Opinion:
            note("cloud", str(int(query.part_id.split("-")[0])))
            return super().judge(query, deadline_s=deadline_s)

    class LoggedExplainer(FakeExplainer):
        def explain(self, query: Query, *, deadline: float) -> Evidence | None:
            note("explain", str(int(query.part_id.split("-")[0])))
            return super().explain(query, deadline=deadline)

    def on_verdict(verdict: Verdict, final: bool) -> None:
        what = "explained" if verdict.explanation is not None else "final" if final else "local"
        note(what, str(int(verdict.part_id.split("-")[0])))

    settings = make_settings(route={"budget_share": 0.25, "queue": 4}, cloud={"in_flight": 2})
    with Ledger(folder / "ledger.sqlite") as ledger:
        note("begin", str(time.time_ns()))
        inspect_stream(
            make_parts(count),
            LoggedEdge(0.002),
            decode=fake_decode,
            scene=fake_scene,
            cloud=LoggedCloud(0.008),
            settings=settings,
            ledger=ledger,
            explainer=LoggedExplainer(),
            on_verdict=on_verdict,
        )
        ledger.export_jsonl(folder / "predictions.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
