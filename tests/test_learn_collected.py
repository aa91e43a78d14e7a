"""What a desk has collected: whose word counts for a part, and what is left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_parts import SETTINGS
from learn_parts import desk_of, knows
from saec.config import LearnSettings
from saec.errors import BadInput
from saec.learn.collected import collected
from saec.learn.judged import LABELS
from saec.learn.rulings import OPINIONS
from saec.learn.samples import for_probe
from saec.learn.teacher import HOME


def teachable(verdicts):
    return {sha256 for sha256 in verdicts if not for_probe(sha256)}


def test_each_judged_part_is_there_once_with_its_image_but_for_the_probe_set(tmp_path):
    desk, verdicts = desk_of(tmp_path, 12)
    found, bare = collected(desk, SETTINGS)
    assert bare == 0
    assert {each.sha256 for each in found} == teachable(verdicts)
    assert len(teachable(verdicts)) < 12  # some are held out
    for each in found:
        assert each.query.image is not None
        assert each.p_defect == (0.95 if each.query.part_id.startswith("bad") else 0.05)


def test_an_opinion_that_is_not_sure_enough_teaches_nothing(tmp_path):
    desk, _ = desk_of(tmp_path, judge=lambda queries: [replace(knows(query), p_defect=0.6) for query in queries])
    assert collected(desk, SETTINGS) == ([], 0)


def test_a_person_in_the_clouds_list_wins_also_after_the_model_has_spoken(tmp_path):
    desk, verdicts = desk_of(tmp_path)
    sha256 = min(teachable(verdicts))
    other = 0.0 if verdicts[sha256].part_id.startswith("bad") else 1.0
    (desk / HOME / LABELS).write_text(f"part,label\n{verdicts[sha256].part_id},{['good', 'defect'][int(other)]}\n")
    found, _ = collected(desk, SETTINGS)
    assert [each.p_defect for each in found if each.sha256 == sha256] == [other]


def test_maps_are_in_the_units_in_which_the_teacher_saw_them(tmp_path):
    asked = []

    def judge(queries):
        asked.extend(queries)
        return [knows(query) for query in queries]

    desk, _ = desk_of(tmp_path, judge=judge, background=(0.01, 0.02))  # all of them are hotter than good parts were
    seen = {query.part_id: query.anomaly_map for query in asked}
    found, _ = collected(desk, SETTINGS)
    for each in found:
        np.testing.assert_allclose(each.query.anomaly_map, seen[each.query.part_id], rtol=1e-5)


def test_frames_that_the_desk_threw_away_are_left_out_and_a_damaged_one_is_told(tmp_path):
    desk, _ = desk_of(tmp_path)
    files = sorted(file for file in (desk / "frames").glob("*/*"))
    for file in files[1:]:
        file.unlink()
    assert len(collected(desk, SETTINGS)[0]) <= 1
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.raises(BadInput, match="damaged frame"):
        collected(desk, SETTINGS.model_copy(update={"learn": LearnSettings(min_teacher=0.5)}))


def test_a_folder_without_opinions_is_no_desk(tmp_path):
    with pytest.raises(BadInput, match="cloud serve --learn"):
        collected(tmp_path, SETTINGS)
    (tmp_path / HOME).mkdir()
    (tmp_path / HOME / OPINIONS).write_text("{}\n")
    with pytest.raises(BadInput, match="not opinions"):
        collected(tmp_path, SETTINGS)
