"""The quickstart's world: what can stand in a scene, and how often things come together.

Scenes are drawn from themes. A theme has a background, a pair of kinds that nearly always come
together (a boat comes with a fish, on water) and extras. The skew is on purpose: it gives a language
model something to hallucinate. `exceptions` is the chance that a scene breaks the habit.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

IMAGE_SIZE = 96  # pixels a side
GRID = 3  # objects stand in the cells of a GRID x GRID raster
CELL = IMAGE_SIZE // GRID

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (40, 150, 60),
    "blue": (40, 90, 210),
    "purple": (130, 60, 170),
    "pink": (245, 130, 180),
    "white": (245, 245, 245),
}
# A kind's natural colour, taken more often than the others.
KINDS: dict[str, str] = {
    "apple": "red",
    "ball": "orange",
    "bird": "blue",
    "boat": "white",
    "box": "yellow",
    "car": "red",
    "cup": "blue",
    "fish": "orange",
    "flower": "pink",
    "house": "purple",
    "lamp": "yellow",
    "star": "yellow",
    "tree": "green",
    "umbrella": "purple",
}
SIZES: dict[str, tuple[int, int]] = {"small": (20, 23), "large": (28, 31)}  # pixels, inclusive
JITTER = 3  # pixels that an object may be off the centre of its cell


@dataclass(frozen=True)
class Theme:
    """A background with the kinds that are usual on it."""

    background: str
    pair: tuple[str, str]
    extras: tuple[str, ...]


THEMES: tuple[Theme, ...] = (
    Theme("water", ("boat", "fish"), ("bird", "umbrella", "box")),
    Theme("sand", ("umbrella", "ball"), ("star", "bird", "boat", "cup")),
    Theme("grass", ("tree", "flower"), ("apple", "bird", "ball", "house")),
    Theme("street", ("car", "house"), ("lamp", "tree", "box", "flower")),
    Theme("room", ("cup", "lamp"), ("apple", "box", "flower", "ball")),
    Theme("night", ("star", "house"), ("lamp", "tree", "car")),
)
BACKGROUNDS: tuple[str, ...] = tuple(theme.background for theme in THEMES)
# Exceptions a split: held-out scenes break the habits more often, so that guessing by habit shows.
# The vision encoder learns on scenes with few habits: it should see, not guess.
EXCEPTIONS: dict[str, float] = {
    "pretrain_vision": 0.7,
    "pretrain_language": 0.25,
    "train": 0.15,
    "val": 0.3,
}


@dataclass(frozen=True)
class SceneObject:
    """One drawn thing; `box` is the square (x, y, width, height) in pixels it is drawn in."""

    kind: str
    colour: str
    size: str
    box: tuple[int, int, int, int]

    @property
    def cell(self) -> tuple[int, int]:
        """(row, column) of the raster cell that holds the centre of the object."""
        x, y, width, height = self.box
        return int(y + height / 2) // CELL, int(x + width / 2) // CELL


@dataclass(frozen=True)
class Scene:
    """A background and the objects on it, in reading order (top row first)."""

    background: str
    objects: tuple[SceneObject, ...]
    texture: int = 0  # seed of the background's speckles

    @property
    def counts(self) -> Counter[str]:
        """How many objects there are of each kind."""
        return Counter(obj.kind for obj in self.objects)


@dataclass(frozen=True)
class Habits:
    """Which kinds are frequent, and which come together, measured on scenes."""

    popular: tuple[str, ...]  # most frequent first
    partners: dict[str, tuple[str, ...]]  # kind -> other kinds, most often seen together first


def make_scenes(n: int, seed: int, split: str = "train", exceptions: float | None = None) -> list[Scene]:
    """Draw `n` scenes; the same (seed, split) always gives the same ones, other splits give others.

    Args:
        n: how many scenes.
        seed: any integer.
        split: names the random stream; one in `EXCEPTIONS` sets the default of `exceptions`.
        exceptions: chance, 0 to 1, that a scene breaks a habit of its theme.
    """
    chance = EXCEPTIONS.get(split, 0.2) if exceptions is None else exceptions
    return [_make_scene(random.Random(f"{split}/{seed}/{i}"), chance) for i in range(n)]


def measure_habits(scenes: Iterable[Scene]) -> Habits:
    """Count on `scenes` how frequent each kind is and which kinds share an image."""
    frequency: Counter[str] = Counter()
    together: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for scene in scenes:
        kinds = sorted(scene.counts)
        frequency.update(kinds)
        for kind in kinds:
            together[kind].update(other for other in kinds if other != kind)
    return Habits(
        popular=_ranked(frequency, [*KINDS]),
        partners={
            kind: _ranked(together[kind], [other for other in KINDS if other != kind]) for kind in KINDS
        },
    )


def _ranked(counts: Counter[str], kinds: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(kinds, key=lambda kind: (-counts[kind], kind)))


def _make_scene(rng: random.Random, exceptions: float) -> Scene:
    theme = rng.choice(THEMES)
    kinds = _choose_kinds(rng, theme, exceptions)
    if rng.random() < 0.35:
        kinds += [rng.choice(kinds)] * rng.choice([1, 1, 2])
    cells = rng.sample([(r, c) for r in range(GRID) for c in range(GRID)], len(kinds))
    objects = [_place(rng, kind, cell) for kind, cell in zip(kinds, sorted(cells), strict=True)]
    return Scene(theme.background, tuple(objects), texture=rng.randrange(2**31))


def _choose_kinds(rng: random.Random, theme: Theme, exceptions: float) -> list[str]:
    """At least three distinct kinds: the theme's pair (or half of it) and extras, shuffled."""
    chosen = set(theme.pair)
    if rng.random() < exceptions:
        chosen.remove(rng.choice(theme.pair))
    broken = set(theme.pair) - chosen
    for _ in range(20):
        if (len(chosen) >= 3 and rng.random() < 0.5) or len(chosen) == 5:
            break
        pool = tuple(KINDS) if rng.random() < exceptions else theme.extras
        kind = rng.choice(pool)
        if kind not in broken:
            chosen.add(kind)
    spare = [kind for kind in KINDS if kind not in chosen | broken]
    chosen.update(rng.sample(spare, max(0, 3 - len(chosen))))
    return rng.sample(sorted(chosen), len(chosen))


def _place(rng: random.Random, kind: str, cell: tuple[int, int]) -> SceneObject:
    colour = KINDS[kind] if rng.random() < 0.35 else rng.choice([*COLOURS])
    size = rng.choice([*SIZES])
    pixels = rng.randint(*SIZES[size])
    row, column = cell
    margin = (CELL - pixels) // 2
    jitter = min(margin, JITTER)
    x = column * CELL + margin + rng.randint(-jitter, jitter)
    y = row * CELL + margin + rng.randint(-jitter, jitter)
    return SceneObject(kind, colour, size, (x, y, pixels, pixels))
