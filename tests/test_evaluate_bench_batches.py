"""Decisions over the batch size, on fakes, and ``saec bench cloud`` in its three forms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from cli_run import saec
from cloud_fakes import FakeBackend, query, service_process
from saec.errors import BadInput
from saec.evaluate.bench_batches import bench_batches
from saec.evaluate.meter import Meter
from saec.types import Evidence, Opinion, Query


class Board(FakeBackend):
    """Takes as long for eight as for one, and has no memory for nine."""

    device = "Imaginary GPU"

    def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
        if len(queries) > 8:
            raise MemoryError("out of memory")
        return super().judge(queries)


def unmetered() -> Meter:
    return Meter(probes=())


def test_the_curve_shows_decisions_a_second_and_ends_where_the_memory_does() -> None:
    backend = Board(seconds=0.02)
    table = bench_batches(backend, [query("a"), query("b")], sizes=(1, 8, 16, 32), seconds=0.1, meter=unmetered)
    assert table.title == "Decisions of fake-1 on Imaginary GPU"
    one, eight = table.rows
    assert (one["batch"], eight["batch"]) == (1, 8)
    assert isinstance(one["per_s"], float)
    assert isinstance(eight["per_s"], float)
    assert 0 < one["per_s"] < 50
    assert eight["per_s"] > 3 * one["per_s"]
    assert [note for note in table.notes if note.startswith("batches of 16")] == [
        "batches of 16: MemoryError: out of memory"
    ]
    assert {query.part_id for query in backend.seen} == {"a", "b"}, "the images take turns"


def test_what_was_not_measured_is_no_figure() -> None:
    table = bench_batches(FakeBackend(), [query()], sizes=(1,), seconds=0.02, meter=unmetered)
    unknown = ("gpu_percent", "gpu_w", "gpu_mb", "mWh_each")
    assert [table.rows[0][name] for name in unknown] == [None] * 4
    assert any(note.startswith("energy unavailable") for note in table.notes)


def test_evidence_among_the_decisions_is_said() -> None:
    class Talks(FakeBackend):
        def _one(self, query: Query) -> Opinion | Exception:
            return Opinion(1.0, Evidence(source="fake"), self.model_id, {"evidence": 900.0})

    table = bench_batches(Talks(), [query()], sizes=(2,), seconds=0.02, meter=unmetered)
    assert any("followed by evidence" in note for note in table.notes)


def test_a_backend_that_does_not_answer_is_bad_input() -> None:
    with pytest.raises(BadInput, match=r"does not answer \(RuntimeError: out of memory"):
        bench_batches(FakeBackend(), [query("crash")], sizes=(1,), seconds=0.1, meter=unmetered)
    with pytest.raises(BadInput, match=r"does not answer \(ValueError: no such product"):
        bench_batches(FakeBackend(), [query("bad")], sizes=(1,), seconds=0.1, meter=unmetered)
    with pytest.raises(BadInput, match="nothing to ask"):
        bench_batches(FakeBackend(), [], sizes=(1,))


def test_the_command_bursts_a_service(tmp_path: Path) -> None:
    with service_process(tmp_path) as (_, url):
        found = saec("bench", "cloud", url, "--burst", "20", "--limit", "2", "--json", "-")
    (table,) = json.loads(found.out)["tables"]
    assert [row["questions"] for row in table["rows"]] == ["one by one", "2 at once", "20 at once", "20 at once"]
    assert all(row["failed"] == 0 for row in table["rows"])


def test_the_command_wants_a_service_or_a_backend() -> None:
    assert "choose what to measure" in saec("bench", "cloud").error()
    assert "choose what to measure" in saec("bench", "cloud", "http://127.0.0.1:9", "--backend", "openai").error()
    assert "choose what to measure" in saec("bench", "cloud", "--backend", "openai", "--burst", "20").error()
    assert "needs its station" in saec("bench", "cloud", "--backend", "expert").error()
    refused = saec("bench", "cloud", "--backend", "openai", "--set", "openai.base_url=http://127.0.0.1:9/v1").error()
    assert "the model endpoint cannot be used" in refused
