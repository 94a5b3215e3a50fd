"""Boxes as text, in the ways of LLaVA, MiniGPT-v2, CogVLM and VisionLLM.

A style writes boxes in pixels as text, and reads the boxes of a text back: the same to half a step of its
scale. All scales start at the top left corner of the picture, x first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mllm.errors import DataError

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels: left, top, right, bottom


@dataclass(frozen=True)
class BoxStyle:
    """How one system writes boxes.

    Attributes:
        steps: steps of the scale from one edge of the picture to the other.
        last: the largest step that is written.
        number: a step's text.
        step: the step of a number's text, the inverse of `number`.
        box: one box, from four numbers.
        between: what stands between two boxes.
        around: what stands around all of them.
        pattern: one box in a text, with a group for each number.
        pad: the scale is that of the picture padded to a square, not of the picture itself.
    """

    steps: int
    last: int
    number: Callable[[int], str]
    step: Callable[[str], float]
    box: str
    between: str
    pattern: re.Pattern[str]
    around: str = "{}"
    pad: bool = False

    def write(self, boxes: Sequence[Box], width: float, height: float, where: str = "") -> str:
        """The text of one or several boxes.

        Annotations pass the edges by rounding: up to one pixel outside is moved onto the edge.

        Args:
            boxes: at least one, in pixels.
            width: of the picture that the boxes were drawn on.
            height: of the same picture.
            where: the row, put in front of every message.

        Raises:
            DataError: a box has no area, swapped corners, no finite number, or lies outside the picture.
        """
        (left, top), (wide, high) = self._frame(width, height)
        texts = []
        for box in boxes:
            x1, y1, x2, y2 = _clip(_checked(box, width, height, where), width, height)
            shares = (x1 + left) / wide, (y1 + top) / high, (x2 + left) / wide, (y2 + top) / high
            texts.append(self.box.format(*(self.number(self._round(share)) for share in shares)))
        return self.around.format(self.between.join(texts))

    def read(self, text: str, width: float, height: float) -> list[Box]:
        """The boxes of a text, in pixels and inside the picture; none is an empty list.

        Numbers off the scale and swapped corners are no box. Equal corners are one: small boxes are
        rounded to them.
        """
        (left, top), (wide, high) = self._frame(width, height)
        boxes = []
        for found in self.pattern.finditer(text):
            x1, y1, x2, y2 = (self.step(number) / self.steps for number in found.groups())
            if 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1:
                box = x1 * wide - left, y1 * high - top, x2 * wide - left, y2 * high - top
                boxes.append(_clip(box, width, height))
        return boxes

    def _round(self, share: float) -> int:
        return min(round(share * self.steps), self.last)

    def _frame(self, width: float, height: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """Where the picture starts on its frame, and the frame's size."""
        if not self.pad:
            return (0, 0), (width, height)
        side = max(width, height)
        return ((side - width) // 2, (side - height) // 2), (side, side)  # whole pixels, as it is padded


def _checked(box: Box, width: float, height: float, where: str) -> Box:
    x1, y1, x2, y2 = box
    # Comparisons with NaN are false, so it fails here too.
    across = x1 >= -1 and x2 <= width + 1 and max(x1, 0) < min(x2, width)
    down = y1 >= -1 and y2 <= height + 1 and max(y1, 0) < min(y2, height)
    if not (across and down):
        raise DataError(
            f"{where}{': ' if where else ''}box {list(box)} must have x1 < x2 and y1 < y2 inside the picture "
            f"of {width} x {height} pixels; mend or remove it"
        )
    return box


def _clip(box: Box, width: float, height: float) -> Box:
    x1, y1, x2, y2 = box
    return _within(x1, width), _within(y1, height), _within(x2, width), _within(y2, height)


def _within(value: float, size: float) -> float:
    return min(max(value, 0.0), size)


def _pattern(number: str, between: str, around: str = "{}") -> re.Pattern[str]:
    return re.compile(around.format(between.join([f"({number})"] * 4)))


BOX_STYLES: dict[str, BoxStyle] = {
    # LLaVA-1.5's RefCOCO and VG rows: shares of the padded square, no zeros at the end ("0.5").
    "llava": BoxStyle(
        steps=100,
        last=100,
        number=lambda step: str(step / 100),
        step=lambda text: float(text) * 100,
        box="[{}, {}, {}, {}]",
        between=", ",
        pattern=_pattern(r"\d*\.?\d+", r",\s*", r"\[{}\]"),
        pad=True,
    ),
    # The released code cuts numbers off where this rounds them: up to a step larger, and without its bias.
    "minigpt_v2": BoxStyle(
        steps=100,
        last=100,
        number=str,
        step=int,
        box="{{<{}><{}><{}><{}>}}",
        between="<delim>",
        pattern=_pattern(r"\d{1,3}", "><", r"\{{<{}>\}}"),
    ),
    # Thousandths in three digits: 1000 has four, so the far edge is 999. Boxes of one phrase share brackets.
    "cogvlm": BoxStyle(
        steps=1000,
        last=999,
        number="{:03}".format,
        step=int,
        box="{},{},{},{}",
        between=";",
        around="[[{}]]",
        pattern=_pattern(r"\d{1,3}", r",\s*", r"(?:\[\[|;)\s*{}\s*(?=;|\]\])"),
    ),
    # <p-512> .. <p512> are offsets in 512ths of the picture. VisionLLM's are from the place that comes with
    # each image token out of its unreleased detection head; ours are from the centre: <p-256> .. <p256>.
    "visionllm": BoxStyle(
        steps=512,
        last=512,
        number=lambda step: f"<p{step - 256}>",
        step=lambda text: int(text) + 256,
        box="{} {} {} {}",
        between=" ",
        pattern=_pattern(r"-?\d{1,3}", r">\s*<p", "<p{}>"),
    ),
}
