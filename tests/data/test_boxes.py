"""Boxes as text: the published forms to the letter, and back again to half a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm.data.boxes import BOX_STYLES, Box
from mllm.errors import DataError

STYLES = list(BOX_STYLES)


@pytest.mark.parametrize(
    ("style", "one", "two"),
    [
        # 400 x 200 is padded to 400 x 400: 100 pixels above.
        ("llava", "[0.25, 0.38, 0.5, 0.75]", "[0.25, 0.38, 0.5, 0.75], [0.0, 0.25, 1.0, 0.75]"),
        ("minigpt_v2", "{<25><25><50><100>}", "{<25><25><50><100>}<delim>{<0><0><100><100>}"),
        ("cogvlm", "[[250,250,500,999]]", "[[250,250,500,999;000,000,999,999]]"),
        (
            "visionllm",
            "<p-128> <p-128> <p0> <p256>",
            "<p-128> <p-128> <p0> <p256> <p-256> <p-256> <p256> <p256>",
        ),
    ],
)
def test_the_published_forms(style: str, one: str, two: str) -> None:
    boxes: list[Box] = [(100, 50, 200, 200), (0, 0, 400, 200)]
    assert BOX_STYLES[style].write(boxes[:1], 400, 200) == one
    assert BOX_STYLES[style].write(boxes, 400, 200) == two


def test_padding_is_above_a_wide_picture_and_left_of_a_tall_one() -> None:
    llava = BOX_STYLES["llava"]
    assert llava.write([(0, 0, 100, 50)], 100, 50) == "[0.0, 0.25, 1.0, 0.75]"
    assert llava.write([(0, 0, 50, 100)], 50, 100) == "[0.25, 0.0, 0.75, 1.0]"
    assert replace(llava, pad=False).write([(0, 0, 50, 100)], 50, 100) == "[0.0, 0.0, 1.0, 1.0]"


@st.composite
def pictures(draw: st.DrawFn) -> tuple[int, int, list[Box]]:
    width, height = draw(st.integers(1, 2000)), draw(st.integers(1, 2000))

    def interval(size: int) -> tuple[float, float]:
        start = draw(st.floats(0, size * 0.99))
        return start, draw(st.floats(start, size, exclude_min=True))

    boxes = []
    for _ in range(draw(st.integers(1, 4))):
        (x1, x2), (y1, y2) = interval(width), interval(height)
        boxes.append((x1, y1, x2, y2))
    return width, height, boxes


@pytest.mark.parametrize("name", STYLES)
@given(picture=pictures())
def test_read_gives_back_what_was_written_to_half_a_step(
    name: str, picture: tuple[int, int, list[Box]]
) -> None:
    width, height, boxes = picture
    style = BOX_STYLES[name]
    frame = (max(width, height),) * 2 if style.pad else (width, height)
    again = style.read(f"A box {style.write(boxes, width, height)}, that is all.", width, height)
    assert len(again) == len(boxes)
    for box, read in zip(boxes, again, strict=True):
        for i, (wanted, found) in enumerate(zip(box, read, strict=True)):
            # The last step that CogVLM writes is 999: a whole step short of the far edge.
            steps = 1.0 if style.last < style.steps and wanted > frame[i % 2] * 0.999 else 0.5
            assert abs(wanted - found) <= steps * frame[i % 2] / style.steps + 1e-6


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize(
    "box",
    [
        (30, 10, 20, 40),  # swapped
        (10, 40, 20, 30),
        (10, 10, 10, 40),  # no area
        (10, 50, 20, 50.5),  # none after it is clipped
        (100, 10, 100.5, 40),
        (-1.5, 10, 20, 40),
        (10, 10, 101.5, 40),
        (10, 10, 20, 51.5),
        (120, 10, 130, 40),
        (float("nan"), 10, 20, 40),
        (10, 10, float("nan"), 40),
        (10, 10, 20, float("inf")),
    ],
)
def test_a_box_that_is_none_is_an_error_of_its_row(name: str, box: Box) -> None:
    with pytest.raises(DataError) as caught:
        BOX_STYLES[name].write([(0, 0, 10, 10), box], 100, 50, "a.json: row 3")
    assert str(caught.value) == (
        f"a.json: row 3: box {list(box)} must have x1 < x2 and y1 < y2 inside the picture of "
        "100 x 50 pixels; mend or remove it"
    )


@pytest.mark.parametrize("name", STYLES)
def test_a_pixel_over_the_edge_is_moved_onto_it(name: str) -> None:
    style = BOX_STYLES[name]
    assert style.write([(-1, -0.5, 101, 50.5)], 100, 50) == style.write([(0, 0, 100, 50)], 100, 50)


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("text", ["", "No box here.", "[1, 2] {<3>} <p4> [[x0,y0,x1,y1]]", "<c0> 1 2 3 4"])
def test_a_text_without_boxes(name: str, text: str) -> None:
    assert BOX_STYLES[name].read(text, 100, 50) == []


@pytest.mark.parametrize(
    ("name", "text", "boxes"),
    [
        # Spaces are the model's own. Swapped corners and numbers off the scale are no boxes.
        ("llava", "[0.5,0.5,.75,1] [0.9, 0.5, 0.1, 0.6] [97, 514, 283, 996]", [(50, 25, 75, 50)]),
        ("minigpt_v2", "<p>a</p> {<50><0><75><100>}<delim>{<0><0><101><9>}", [(50, 0, 75, 50)]),
        ("cogvlm", "a [[500, 000, 750, 500]] b [[500,0,750,500;1,2]]", [(50, 0, 75, 25)] * 2),
        ("visionllm", "<c3><p0><p-256> <p128> <p0> <c1> <p0> <p0> <p300> <p9>", [(50, 0, 75, 25)]),
    ],
)
def test_answers_of_models(name: str, text: str, boxes: list[Box]) -> None:
    assert BOX_STYLES[name].read(text, 100, 50) == boxes


def test_a_box_in_the_padding_is_clipped_to_the_picture() -> None:
    assert BOX_STYLES["llava"].read("[0.0, 0.0, 0.5, 0.5]", 100, 50) == [(0, 0, 50, 25)]
