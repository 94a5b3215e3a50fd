"""Pictures of scenes: every kind drawn four times too large, reduced, and put on a background."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from mllm.quickstart.world import COLOURS, IMAGE_SIZE, Scene, SceneObject

OVERSAMPLING = 4
OUTLINE = (35, 30, 35)
BROWN = (120, 80, 45)
Colour = tuple[int, int, int]

# Background -> (colour at the top, colour at the bottom, height of the horizon or None).
GROUNDS: dict[str, tuple[Colour, Colour, float | None]] = {
    "water": ((150, 205, 235), (70, 140, 175), 0.3),
    "sand": ((175, 215, 235), (225, 205, 150), 0.35),
    "grass": ((185, 220, 240), (140, 190, 110), 0.35),
    "street": ((190, 190, 195), (125, 125, 130), 0.55),
    "room": ((225, 210, 190), (170, 130, 95), 0.7),
    "night": ((25, 25, 60), (45, 45, 75), None),
}


def render(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of IMAGE_SIZE x IMAGE_SIZE pixels."""
    image = Image.fromarray(_background(scene))
    for obj in scene.objects:
        x, y, width, _ = obj.box
        sprite = _sprite(obj.kind, obj.colour, width)
        image.paste(sprite, (x, y), sprite)
    return image


def drawn_box(obj: SceneObject) -> tuple[int, int, int, int]:
    """The tight (x, y, width, height), in pixels, of what `render` draws for an object."""
    x, y, width, _ = obj.box
    bounds = _sprite(obj.kind, obj.colour, width).getchannel("A").getbbox()
    if bounds is None:
        raise ValueError(f"the shape of {obj.kind!r} draws nothing at {width} pixels")
    left, top, right, bottom = bounds
    return x + left, y + top, right - left, bottom - top


def _background(scene: Scene) -> np.ndarray:
    """uint8 [IMAGE_SIZE, IMAGE_SIZE, 3]: sky and ground, with light speckles."""
    sky, ground, horizon = GROUNDS[scene.background]
    height = np.arange(IMAGE_SIZE)[:, None, None] / IMAGE_SIZE
    share = height if horizon is None else (height > horizon).astype(float)
    colour = (1 - share) * np.array(sky) + share * np.array(ground)
    rng = np.random.default_rng(scene.texture)
    speckles = rng.normal(0.0, 9.0, (IMAGE_SIZE // 2, IMAGE_SIZE // 2, 1)).repeat(2, 0).repeat(2, 1)
    light = rng.uniform(-14.0, 14.0)
    return np.clip(colour + speckles + light, 0, 255).astype(np.uint8)


@lru_cache(maxsize=4096)
def _sprite(kind: str, colour: str, pixels: int) -> Image.Image:
    """RGBA square of `pixels` a side, filled from edge to edge in at least one direction."""
    side = pixels * OVERSAMPLING
    canvas = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    SHAPES[kind](Pen(ImageDraw.Draw(canvas), side, COLOURS[colour]))
    return canvas.resize((pixels, pixels), Image.Resampling.BOX)


class Pen:
    """Draws on a unit square, x to the right and y down, with a dark outline."""

    def __init__(self, draw: ImageDraw.ImageDraw, side: int, colour: Colour) -> None:
        self.draw, self.side, self.colour = draw, side, colour
        self.width = max(2, side // 22)

    def _scale(self, values: tuple[float, ...]) -> list[float]:
        return [value * (self.side - 1) for value in values]

    def ellipse(self, *box: float, fill: Colour | None = None) -> None:
        """Ellipse within (left, top, right, bottom)."""
        self.draw.ellipse(self._scale(box), fill or self.colour, OUTLINE, self.width)

    def rectangle(self, *box: float, fill: Colour | None = None) -> None:
        """Rectangle (left, top, right, bottom)."""
        self.draw.rectangle(self._scale(box), fill or self.colour, OUTLINE, self.width)

    def polygon(self, *points: float, fill: Colour | None = None) -> None:
        """Polygon through x1, y1, x2, y2, ..."""
        self.draw.polygon(self._scale(points), fill or self.colour, OUTLINE, self.width)

    def line(self, *points: float, fill: Colour = OUTLINE, width: int = 1) -> None:
        """Line through x1, y1, x2, y2, ...; `width` in outlines."""
        self.draw.line(self._scale(points), fill, self.width * width)

    def pie(self, *box: float, start: float, end: float) -> None:
        """Part of an ellipse, from `start` to `end` degrees, clockwise from the right."""
        self.draw.pieslice(self._scale(box), start, end, self.colour, OUTLINE, self.width)

    def arc(self, *box: float, start: float, end: float) -> None:
        """Part of an ellipse's edge."""
        self.draw.arc(self._scale(box), start, end, OUTLINE, self.width * 2)


def _apple(pen: Pen) -> None:
    pen.ellipse(0.04, 0.24, 0.62, 0.98)
    pen.ellipse(0.38, 0.24, 0.96, 0.98)
    pen.draw.ellipse(pen._scale((0.16, 0.32, 0.84, 0.9)), pen.colour)
    pen.line(0.5, 0.34, 0.54, 0.04, fill=BROWN, width=2)
    pen.ellipse(0.55, 0.04, 0.92, 0.24, fill=(90, 170, 70))


def _ball(pen: Pen) -> None:
    pen.ellipse(0.02, 0.02, 0.98, 0.98)
    pen.line(0.05, 0.36, 0.95, 0.36, fill=(250, 250, 250), width=2)
    pen.line(0.05, 0.64, 0.95, 0.64, fill=(250, 250, 250), width=2)


def _bird(pen: Pen) -> None:
    pen.ellipse(0.0, 0.36, 0.72, 0.86)
    pen.ellipse(0.54, 0.14, 0.9, 0.52)
    pen.polygon(0.86, 0.26, 1.0, 0.36, 0.86, 0.42, fill=(240, 160, 30))
    pen.polygon(0.14, 0.5, 0.52, 0.5, 0.1, 0.06)
    pen.line(0.36, 0.84, 0.36, 1.0)
    pen.line(0.48, 0.82, 0.48, 1.0)


def _boat(pen: Pen) -> None:
    pen.polygon(0.0, 0.68, 1.0, 0.68, 0.8, 0.98, 0.2, 0.98)
    pen.line(0.46, 0.68, 0.46, 0.02, fill=BROWN, width=2)
    pen.polygon(0.52, 0.04, 0.92, 0.58, 0.52, 0.58, fill=(250, 250, 240))


def _box(pen: Pen) -> None:
    pen.rectangle(0.04, 0.14, 0.96, 0.96)
    pen.line(0.04, 0.38, 0.96, 0.38, width=2)
    pen.rectangle(0.38, 0.14, 0.62, 0.6, fill=(235, 225, 200))


def _car(pen: Pen) -> None:
    pen.polygon(0.22, 0.5, 0.34, 0.2, 0.68, 0.2, 0.82, 0.5, fill=(200, 230, 245))
    pen.rectangle(0.0, 0.46, 1.0, 0.74)
    pen.ellipse(0.1, 0.62, 0.38, 0.9, fill=(40, 40, 45))
    pen.ellipse(0.62, 0.62, 0.9, 0.9, fill=(40, 40, 45))


def _cup(pen: Pen) -> None:
    pen.arc(0.58, 0.3, 1.0, 0.74, start=-100, end=100)
    pen.polygon(0.04, 0.14, 0.74, 0.14, 0.64, 0.94, 0.14, 0.94)
    pen.ellipse(0.04, 0.06, 0.74, 0.24, fill=(90, 60, 40))


def _fish(pen: Pen) -> None:
    pen.polygon(0.68, 0.5, 1.0, 0.2, 1.0, 0.8)
    pen.ellipse(0.0, 0.22, 0.8, 0.78)
    pen.ellipse(0.14, 0.36, 0.26, 0.48, fill=(250, 250, 250))
    pen.arc(0.2, 0.26, 0.44, 0.74, start=-70, end=70)


def _flower(pen: Pen) -> None:
    pen.line(0.5, 0.6, 0.5, 1.0, fill=(40, 120, 50), width=2)
    for x, y in ((0.5, 0.16), (0.24, 0.34), (0.76, 0.34), (0.34, 0.6), (0.66, 0.6)):
        pen.ellipse(x - 0.17, y - 0.17, x + 0.17, y + 0.17)
    pen.ellipse(0.36, 0.26, 0.64, 0.54, fill=(250, 220, 60))


def _house(pen: Pen) -> None:
    pen.rectangle(0.12, 0.46, 0.88, 0.98)
    pen.polygon(0.0, 0.48, 0.5, 0.02, 1.0, 0.48, fill=(150, 70, 50))
    pen.rectangle(0.4, 0.64, 0.6, 0.98, fill=BROWN)


def _lamp(pen: Pen) -> None:
    pen.line(0.5, 0.4, 0.5, 0.9, width=2)
    pen.polygon(0.3, 0.04, 0.7, 0.04, 0.94, 0.46, 0.06, 0.46)
    pen.rectangle(0.24, 0.88, 0.76, 0.98, fill=(90, 90, 95))


def _star(pen: Pen) -> None:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 0.5, 0.21)
    points = np.stack([0.5 + radii * np.cos(angles), 0.53 + radii * np.sin(angles)], axis=1)
    pen.polygon(*points.clip(0, 1).ravel().tolist())


def _tree(pen: Pen) -> None:
    pen.rectangle(0.42, 0.66, 0.58, 1.0, fill=BROWN)
    pen.polygon(0.14, 0.76, 0.5, 0.3, 0.86, 0.76)
    pen.polygon(0.22, 0.48, 0.5, 0.02, 0.78, 0.48)


def _umbrella(pen: Pen) -> None:
    pen.line(0.5, 0.1, 0.5, 0.92, width=2)
    pen.arc(0.5, 0.8, 0.7, 1.0, start=0, end=180)
    pen.pie(0.0, 0.04, 1.0, 1.04, start=180, end=360)
    pen.line(0.5, 0.06, 0.32, 0.54)
    pen.line(0.5, 0.06, 0.68, 0.54)


SHAPES: dict[str, Callable[[Pen], None]] = {
    "apple": _apple,
    "ball": _ball,
    "bird": _bird,
    "boat": _boat,
    "box": _box,
    "car": _car,
    "cup": _cup,
    "fish": _fish,
    "flower": _flower,
    "house": _house,
    "lamp": _lamp,
    "star": _star,
    "tree": _tree,
    "umbrella": _umbrella,
}
