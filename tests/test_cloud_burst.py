"""A burst against the real service in a process of its own: the fast form of ``saec bench cloud --burst``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from cloud_fakes import query, service_process
from saec.config import CloudSettings
from saec.errors import BadInput
from saec.evaluate.bench_burst import RECOVERY_S, Wave, bench_burst, run_burst

PLANT, BURST, QUEUE = 72, 720, 128
SIDE = 112
QUESTIONS = [query(f"p{i}", size=SIDE, edge_p_defect=i / BURST) for i in range(BURST)]
"""The fake answers with the edge's probability, so that every question can know its own answer."""


def statuses(wave: Wave) -> Counter[int]:
    return Counter(answer.status for answer in wave.answers)


def test_a_tenfold_burst_is_queued_or_refused_with_a_time_and_the_service_recovers(tmp_path: Path) -> None:
    with service_process(tmp_path, seconds=0.05, max_queue=QUEUE) as (process, url):
        alone, plant, *bursts = run_burst(url, CloudSettings(), QUESTIONS, waves=(PLANT, BURST, BURST))
        assert process.poll() is None
    assert statuses(alone) == {200: 5}
    assert statuses(plant) == {200: PLANT}, "what fits into the queue is queued"
    for wave in (plant, *bursts):
        assert set(statuses(wave)) <= {200, 429}, "load is no fault of the service"
        assert wave.counted == {str(status): number for status, number in statuses(wave).items()}, "each answered once"
        for i, answer in enumerate(wave.answers):
            if answer.status == 200:
                assert answer.p_defect == pytest.approx(i / BURST), "everyone gets the answer to the own question"
            else:
                assert answer.retry_after_s is not None
                assert answer.retry_after_s >= 1
        assert wave.recovery_s is not None
        assert wave.recovery_s < RECOVERY_S
    assert all(statuses(wave)[200] >= QUEUE // 2 for wave in bursts), "a burst does not stop the work"
    assert alone.rss and plant.rss and bursts[0].rss and bursts[1].rss
    queue_bytes = QUEUE * SIDE * SIDE * 3
    assert max(wave.rss or 0 for wave in bursts) - plant.rss < queue_bytes + 40e6, "the queue is what bounds memory"
    assert bursts[1].rss - bursts[0].rss < 15e6, "a second burst needs no more than the first"


def test_a_model_too_slow_for_a_burst_means_429_too_not_a_missed_deadline(tmp_path: Path) -> None:
    settings = CloudSettings(timeout_s=2.0)
    with service_process(tmp_path, seconds=0.25, max_batch=4, max_wait_ms=0) as (_, url):
        waves = run_burst(url, settings, QUESTIONS[:100], waves=(100, 100))
    for wave in waves[1:]:
        assert set(statuses(wave)) == {200, 429}
    # Once the pace of a full queue is known, who would wait in vain is told so at the door.
    assert (
        sorted(answer.seconds for answer in waves[2].answers if answer.status == 429)[len(waves[2].answers) // 2] < 0.8
    )


def test_the_table_of_a_burst_says_what_failed(tmp_path: Path) -> None:
    with service_process(tmp_path) as (_, url):
        crash = [query("p1", size=32)] * 5 + [query("crash", size=32)]
        table = bench_burst(url, CloudSettings(), crash, waves=(6,))
        with pytest.raises(BadInput, match="nothing to ask"):
            bench_burst(url, CloudSettings(), [], waves=(6,))
        with pytest.raises(BadInput, match=r"does not answer questions one by one \(503, "):
            bench_burst(url.replace("127.0.0.1", "localhost"), CloudSettings(), [query("crash")], waves=(6,))
    assert [row["questions"] for row in table.rows] == ["one by one", "6 at once"]
    assert table.rows[1]["failed"]
    assert any("with 503" in note for note in table.notes)
    with pytest.raises(BadInput, match="no answer"):
        bench_burst(url, CloudSettings(timeout_s=0.5), [query()], waves=(6,))
