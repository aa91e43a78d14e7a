"""The wire format: what goes in comes out, and what is wrong is refused with a reason."""

from __future__ import annotations

import json
import struct

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_fakes import query
from saec.cloud import wire
from saec.cloud.images import encode_jpeg, is_grey, shrink
from saec.data.decode import decode_image
from saec.types import Box, Evidence, Opinion, Query
from saec.vlm.geometry import to_original

names = st.text(min_size=1, max_size=40).filter(lambda text: text.isprintable())
probabilities = st.floats(0, 1)
quick = settings(deadline=None, max_examples=40)


def body_of(question: Query, references: tuple[str, ...] = ()) -> bytes:
    return wire.encode_question(question, references, max_side=1024, jpeg_quality=92)


def back(body: bytes, **references: np.ndarray) -> Query:
    return wire.parse_question(body).decode(references, max_pixels=10**7)


def with_header(body: bytes, **changes: object) -> bytes:
    (length,) = struct.unpack_from(">I", body, 5)
    header = json.dumps({**json.loads(body[9 : 9 + length]), **changes}).encode()
    return body[:5] + struct.pack(">I", len(header)) + header + body[9 + length :]


@quick
@given(
    part_id=names,
    product=names,
    p=st.none() | probabilities,
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    crop=st.booleans(),
)
def test_a_question_arrives_as_it_was_asked(
    part_id: str, product: str, p: float | None, size: tuple[int, int], crop: bool
) -> None:
    image = np.full((size[1], size[0], 3), 128, np.uint8)
    region = Box(3, 5, 3 + size[0], 5 + size[1]) if crop else None
    asked = Query(part_id, product, image, (100, 100), region=region, edge_p_defect=p, evidence=p != 0.5)
    arrived = back(body_of(asked))
    assert (arrived.part_id, arrived.product, arrived.edge_p_defect) == (part_id, product, p)
    assert arrived.evidence == asked.evidence
    assert (arrived.original_size, arrived.region) == ((100, 100), region)
    assert arrived.image.shape == image.shape
    assert np.abs(arrived.image.astype(int) - image).max() <= 1


def test_the_image_is_shrunk_to_the_longest_side_and_never_enlarged() -> None:
    image = np.zeros((300, 1200, 3), np.uint8)
    assert shrink(image, 400).shape == (100, 400, 3)
    assert shrink(image, 1200) is image
    assert shrink(np.zeros((1, 5000, 3), np.uint8), 64).shape == (1, 64, 3)


def test_grey_images_go_as_one_channel_and_colour_keeps_its_full_resolution() -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    grey = cv2.merge([ramp, ramp, ramp])
    assert is_grey(grey)
    assert cv2.imdecode(np.frombuffer(encode_jpeg(grey, 92), np.uint8), cv2.IMREAD_UNCHANGED).ndim == 2
    assert np.abs(decode_image(encode_jpeg(grey, 92), name="x").astype(int) - grey).max() <= 3

    line = np.zeros((64, 64, 3), np.uint8)
    line[:, 32] = (0, 0, 255)  # a red scratch, one pixel wide
    assert not is_grey(line)
    # With halved chroma the red of the line would come back below 130.
    assert decode_image(encode_jpeg(line, 92), name="x")[:, 32, 2].min() > 230


def test_one_coloured_pixel_makes_an_image_colour() -> None:
    image = np.full((33, 47, 3), 99, np.uint8)
    image[17, 23, 0] = 98
    assert not is_grey(image)


@quick
@given(st.integers(1, 20), st.integers(1, 20), st.floats(-1e3, 1e3), st.floats(0, 1e3), st.integers(0, 2**31))
def test_the_anomaly_map_keeps_its_values_to_half_a_step_of_256(
    rows: int, columns: int, low: float, span: float, seed: int
) -> None:
    values = low + span * np.random.default_rng(seed).random((rows, columns))
    sent = values.astype(np.float32)
    arrived = back(body_of(query(anomaly_map=sent))).anomaly_map
    assert arrived is not None
    assert arrived.dtype == np.float32
    assert arrived.shape == sent.shape
    step = (float(sent.max()) - float(sent.min())) / 255
    assert np.abs(arrived - sent).max() <= step / 2 + 1e-6 * (abs(low) + span)


def test_references_travel_by_name() -> None:
    name, image = "ab" * 32, np.zeros((4, 4, 3), np.uint8)
    body = body_of(query(), (name,))
    assert wire.parse_question(body).references == [name]
    assert back(body, **{name: image}).references[0] is image


def test_what_cannot_be_asked_is_refused_before_it_is_sent() -> None:
    for asked in (
        query(anomaly_map=np.array([[np.nan]], np.float32)),
        query(image=np.zeros((0, 5, 3), np.uint8)),
        query(image=np.zeros((5, 5), np.uint8)),
        query(edge_p_defect=1.5),
        query(edge_p_defect=float("nan")),
        query(part_id=""),
    ):
        with pytest.raises(wire.WireError):
            body_of(asked)


@quick
@given(st.data())
def test_a_damaged_body_is_refused_and_nothing_else_happens(data: st.DataObject) -> None:
    body = bytearray(body_of(query(size=16, anomaly_map=np.eye(4, dtype=np.float32))))
    if data.draw(st.booleans()):
        del body[data.draw(st.integers(0, len(body) - 1)) :]
    else:
        body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        arrived = back(bytes(body))
    except wire.WireError:
        return
    # A flipped bit in the header's free text is all that can pass: no checksum covers it, and no pixel depends on it.
    assert np.array_equal(arrived.image, back(body_of(query(size=16))).image)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": [0, 0, 65, 64]}, "not inside an image of 64 x 64"),
        ({"region": [5, 0, 5, 64]}, "not inside"),
        ({"edge_p_defect": 1.0001}, "less than or equal to 1"),
        ({"edge_p_defect": float("nan")}, "edge_p_defect"),
        ({"references": ["../etc/passwd"]}, "references"),
        ({"references": ["ab" * 32] * 9}, "references"),
        ({"part_id": ""}, "part_id"),
        ({"surprise": 1}, "surprise"),
        ({"image": {"length": 10**9, "crc32": 0}}, "ends inside the image"),
    ],
)
def test_a_header_out_of_range_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(wire.WireError, match=message):
        wire.parse_question(with_header(body_of(query()), **changes))


def test_another_version_is_named() -> None:
    body = bytearray(body_of(query()))
    body[4] = 9
    with pytest.raises(wire.WireError, match="wire version 9, this service speaks 1"):
        wire.parse_question(body)


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(wire.WireError, match="3 bytes after the last part"):
        wire.parse_question(body_of(query()) + b"abc")


def test_a_compressed_map_cannot_claim_more_cells_than_it_holds() -> None:
    body = body_of(query(anomaly_map=np.eye(4, dtype=np.float32)))
    (length,) = struct.unpack_from(">I", body, 5)
    part = json.loads(body[9 : 9 + length])["anomaly_map"]
    for rows in (5, 1 << 20):
        claimed = wire.parse_question(with_header(body, anomaly_map={**part, "rows": rows, "columns": 1 << 10}))
        with pytest.raises(wire.WireError, match="does not hold"):
            claimed.decode({}, max_pixels=10**6)


def test_a_huge_image_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(wire.WireError, match="64 x 64 pixels are more than the limit of 4000"):
        wire.parse_question(body_of(query())).decode({}, max_pixels=4000)


boxes = st.tuples(st.integers(0, 99), st.integers(0, 49), st.integers(1, 100), st.integers(1, 50)).map(
    lambda c: Box(min(c[0], c[2] - 1), min(c[1], c[3] - 1), c[2], c[3], 0.5)
)


@quick
@given(probabilities, st.lists(boxes, max_size=5).map(tuple), st.none() | names, st.dictionaries(names, probabilities))
def test_an_opinion_arrives_as_it_was_given(
    p: float, found: tuple[Box, ...], text: str | None, figures: dict[str, float]
) -> None:
    given_ = Opinion(p, Evidence(found, text, text, "m"), "m-1", figures, diagnostics=figures)
    assert wire.decode_opinion(wire.encode_opinion(given_, (100, 50)), (100, 50)) == given_


def test_numpy_numbers_of_a_backend_become_plain_ones() -> None:
    found = (Box(np.int64(1), np.int64(2), np.int64(3), np.int64(4), np.float32(0.5)),)  # type: ignore[arg-type]
    opinion = wire.check_opinion(Opinion(np.float32(0.25), Evidence(found), "m"), (9, 9))  # type: ignore[arg-type]
    assert opinion.evidence.boxes == (Box(1, 2, 3, 4, 0.5),)
    assert type(opinion.p_defect) is float


@pytest.mark.parametrize(
    "opinion",
    [
        Opinion(float("nan"), Evidence(), "m"),
        Opinion(1.0000001, Evidence(), "m"),
        Opinion(-0.1, Evidence(), "m"),
        Opinion(0.5, Evidence(), ""),
        Opinion(0.5, Evidence((Box(0, 0, 101, 10),)), "m"),
        Opinion(0.5, Evidence((Box(-1, 0, 10, 10),)), "m"),
        Opinion(0.5, Evidence((Box(10, 0, 10, 10),)), "m"),
        Opinion(0.5, Evidence((Box(0, 0, 10.7, 10),)), "m"),  # type: ignore[arg-type]
        Opinion(0.5, Evidence((Box(0, 0, 10, 10, float("inf")),)), "m"),
        Opinion(0.5, Evidence(), "m", {"forward": float("nan")}),
        Opinion("0.5x", Evidence(), "m"),  # type: ignore[arg-type]
        None,
    ],
)
def test_an_opinion_that_breaks_the_contract_is_refused_not_repaired(opinion: Opinion) -> None:
    with pytest.raises(wire.BadAnswer):
        wire.check_opinion(opinion, (100, 50))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"<html>",
        b'{"p_defect": 0.5}',
        b'{"p_defect": NaN, "model_id": "m", "evidence": {}}',
        b'{"p_defect": "0.5", "model_id": "m", "evidence": {}}',
        b'{"p_defect": 0.5, "model_id": "m", "evidence": {}, "version": 2}',
        b'{"p_defect": 0.5, "model_id": "m", "evidence": {"boxes": [{"x1": 0, "y1": 0, "x2": 101, "y2": 5}]}}',
    ],
)
def test_an_answer_of_another_form_is_refused(text: bytes) -> None:
    with pytest.raises(wire.BadAnswer):
        wire.decode_opinion(text, (100, 50))


@quick
@given(st.integers(1, 300), st.integers(1, 300), boxes, st.integers(0, 50), st.integers(0, 50))
def test_a_mapped_box_covers_what_was_marked_and_stays_in_the_shown_region(
    width: int, height: int, marked: Box, left: int, top: int
) -> None:
    region = Box(left, top, left + width, top + height)
    asked = query(original_size=(400, 400), region=region)
    box = to_original((marked.x1, marked.y1, marked.x2, marked.y2), (100, 50), asked)
    assert region.x1 <= box.x1 < box.x2 <= region.x2
    assert region.y1 <= box.y1 < box.y2 <= region.y2
    assert box.x1 <= left + marked.x1 * width / 100 + 1e-6
    assert box.y2 >= top + marked.y2 * height / 50 - 1e-5


def test_an_unscaled_box_is_mapped_to_itself() -> None:
    assert to_original((3, 4, 30, 40), (64, 64), query()) == Box(3, 4, 30, 40)
    # 512 pixels seen of an original of 300: 51.2 / 512 * 300 = 30 exactly, whatever floating point makes of it.
    assert to_original((51.2, 0, 102.4, 512), (512, 512), query(original_size=(300, 300))) == Box(30, 0, 60, 300)
