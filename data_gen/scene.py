"""Facts that follow from boxes: what is there, how many, where, and what is known to be absent."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cached_property

from data_gen.contexts import Box, Context
from data_gen.wording import a, counted, is_measured, many, mentions, plural, singular

# A box that is smaller than this share of the image is too small to say where it is.
_SMALLEST_PLACED = 0.002
# Two boxes stand side by side if they overlap by no more than this share of the image.
_TOUCH = 0.02


class Scene:
    """What can be said about one image with certainty, from its boxes."""

    def __init__(self, context: Context) -> None:
        self.context = context

    @cached_property
    def crowds(self) -> set[str]:
        """Categories whose number is not known: one box stands for many."""
        return {box.category for box in self.context.boxes if box.crowd}

    @cached_property
    def counts(self) -> dict[str, int]:
        """Boxes per category, the categories that take up most room first. A crowd counts as one."""
        area: dict[str, float] = defaultdict(float)
        for box in self.context.boxes:
            area[box.category] += box.width * box.height
        number = Counter(box.category for box in self.context.boxes)
        return {name: number[name] for name in sorted(area, key=lambda name: (-area[name], name))}

    @cached_property
    def countable(self) -> dict[str, int]:
        """Counts of the categories that have a number: no crowds, no pieces and pairs."""
        return {
            name: count
            for name, count in self.counts.items()
            if name not in self.crowds and not is_measured(name)
        }

    @cached_property
    def singles(self) -> dict[str, Box]:
        """The one box of each category that occurs once, so that `the dog` is clear; largest first."""
        once = {name for name, count in self.countable.items() if count == 1}
        least = _SMALLEST_PLACED * self.context.width * self.context.height
        boxes = {box.category: box for box in self.context.boxes if box.category in once}
        return {
            name: boxes[name]
            for name in self.counts
            if name in boxes and boxes[name].width * boxes[name].height >= least
        }

    @cached_property
    def absent(self) -> list[str]:
        """Categories that annotators looked for and did not find, and that no caption hints at."""
        text = " ".join(self.context.captions)
        return [
            name for name in self.context.categories if name not in self.counts and not mentions(text, name)
        ]

    def amount(self, name: str) -> str:
        """`a dog`, `two dogs`, or `many dogs` for a crowd."""
        return many(name) if name in self.crowds else counted(name, self.counts[name])

    def verb(self, name: str) -> str:
        """`is` or `are`, for what `amount` says."""
        amount = self.amount(name)
        return "is" if amount == a(name) or amount.startswith("much ") else "are"

    def center(self, box: Box) -> tuple[float, float]:
        """The middle of a box as shares of the image's width and height."""
        left, top, right, bottom = self.context.corners(box)
        return (left + right) / 2, (top + bottom) / 2

    def place(self, box: Box) -> str:
        """Where a box is, as the end of a sentence: `is on the left side of the image`."""
        left, top, right, bottom = self.context.corners(box)
        across = _third((left + right) / 2, right - left)
        down = _third((top + bottom) / 2, bottom - top)
        if across is None and down is None:
            return "takes up a large part of the image"
        if across is None:
            part = {"low": "upper part", "mid": "middle", "high": "lower part"}[str(down)]
            return f"stretches across the {part} of the image"
        side = {"low": "left", "mid": "", "high": "right"}[across]
        height = {"low": "upper", "mid": "", "high": "lower", None: ""}[down]
        if side and height:
            return f"is in the {height} {side} part of the image"
        if side:
            return f"is on the {side} side of the image"
        if height:
            return f"is in the {height} part of the image"
        return "is near the center of the image" if down else "is in the middle of the image"

    def relation(self, first: Box, second: Box) -> str | None:
        """How `first` stands to `second` in the image, if their boxes are clearly apart."""
        left, top, right, bottom = self.context.corners(first)
        other_left, other_top, other_right, other_bottom = self.context.corners(second)
        if right <= other_left + _TOUCH and left < other_left:
            return "to the left of"
        if other_right <= left + _TOUCH and other_left < left:
            return "to the right of"
        if bottom <= other_top + _TOUCH and top < other_top:
            return "higher up than"
        if other_bottom <= top + _TOUCH and other_top < top:
            return "lower down than"
        return None


def the(name: str, count: int = 1) -> str:
    """`the dog`, `the dogs`."""
    return f"the {singular(name) if count == 1 else plural(name)}"


def _third(middle: float, length: float) -> str | None:
    """Which third of the image a middle lies in; None for what is too long to lie in one."""
    if length > 0.6:
        return None
    return "low" if middle < 0.36 else "high" if middle > 0.64 else "mid"
