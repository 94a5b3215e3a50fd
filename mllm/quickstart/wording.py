"""What is said about a scene: captions, questions with true answers, and text about the world.

Every sentence is made from the scene's objects, so it is true by construction.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mllm.quickstart.world import KINDS, THEMES, Habits, Scene, SceneObject

ONE_WORD = "\nAnswer the question using a single word or phrase."
PLURALS = {"box": "boxes", "fish": "fish"}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
SETTINGS = {
    "water": "on the water",
    "sand": "on the sand",
    "grass": "on the grass",
    "street": "on the street",
    "room": "in a room",
    "night": "at night",
}
PRESENCE = (
    "Is there {a_kind} in the image?",
    "Is there {a_kind} in the image?",
    "Is there {a_kind} in the picture?",
    "Can you see {a_kind}?",
    "Does the image show {a_kind}?",
)
# Wording of the official VCD scripts, asked now and then so that it is not new to the model.
ONE_WORD_PLEASE = " Please answer this question with one word."
DESCRIBE = (
    "Describe the image.",
    "What is in the image?",
    "What do you see in the picture?",
    "Provide a one-sentence caption for the provided image.",
)

Turn = tuple[str, str]


def article(noun: str) -> str:
    """'a' or 'an', as the noun phrase wants."""
    return "an" if noun[0] in "aeiou" or noun.startswith("umbrella") else "a"


def with_article(noun: str) -> str:
    """The noun phrase with 'a' or 'an' in front."""
    return f"{article(noun)} {noun}"


def plural(noun: str) -> str:
    """Plural of a kind, or of a phrase that ends with one."""
    head, _, kind = noun.rpartition(" ")
    return f"{head} {PLURALS.get(kind, kind + 's')}".strip()


def counted(noun: str, count: int) -> str:
    """'a red ball' for one, 'two red balls' for more."""
    return with_article(noun) if count == 1 else f"{NUMBERS[count]} {plural(noun)}"


def enumerate_phrases(phrases: Sequence[str]) -> str:
    """'a, b and c'."""
    *head, last = phrases
    return f"{', '.join(head)} and {last}" if head else last


def sentence(text: str) -> str:
    """First letter raised, full stop at the end."""
    return text[0].upper() + text[1:] + "."


def place_of(obj: SceneObject) -> str:
    """Where on the canvas: 'at the top left', 'in the middle', ..."""
    row, column = obj.cell
    return PLACES[row][column]


def noun_of(obj: SceneObject, with_size: bool = False) -> str:
    """'red ball' or 'small red ball'."""
    return f"{obj.size} {obj.colour} {obj.kind}" if with_size else f"{obj.colour} {obj.kind}"


def _grouped(nouns: Sequence[str]) -> list[str]:
    """Equal nouns counted together, in order of first appearance."""
    return [counted(noun, nouns.count(noun)) for noun in dict.fromkeys(nouns)]


def caption_positions(scene: Scene, with_size: bool = False) -> str:
    """Every object with colour and place, in reading order."""
    phrases = [f"{with_article(noun_of(obj, with_size))} {place_of(obj)}" for obj in scene.objects]
    return sentence(f"{SETTINGS[scene.background]} there is {enumerate_phrases(phrases)}")


def caption_colours(scene: Scene, with_size: bool = False) -> str:
    """Every object with its colour, and the background."""
    phrases = _grouped([noun_of(obj, with_size) for obj in scene.objects])
    return sentence(f"{enumerate_phrases(phrases)} {SETTINGS[scene.background]}")


def caption_kinds(scene: Scene, rng: random.Random) -> str:
    """Every kind with its number, in any order."""
    kinds = [obj.kind for obj in scene.objects]
    phrases = _grouped(rng.sample(kinds, len(kinds)))
    opening = rng.choice(("", "there is ", "a picture of ", "an image of "))
    return sentence(f"{opening}{enumerate_phrases(phrases)} {SETTINGS[scene.background]}")


def caption_brief(scene: Scene, rng: random.Random) -> str:
    """Two of the objects, as people caption what strikes them first."""
    first, second = rng.sample(scene.objects, 2)
    phrases = enumerate_phrases([with_article(noun_of(first)), with_article(noun_of(second))])
    return sentence(f"{phrases} {SETTINGS[scene.background]}")


def captions(scene: Scene, rng: random.Random, n: int = 5) -> list[str]:
    """`n` varied captions: places, colours, sizes, kinds only, and a brief one, in turn."""
    kinds = (
        lambda: caption_positions(scene),
        lambda: caption_colours(scene),
        lambda: caption_kinds(scene, rng),
        lambda: caption_positions(scene, with_size=True),
        lambda: caption_brief(scene, rng),
    )
    return [kinds[i % len(kinds)]() for i in range(n)]


def instruction_rows(scene: Scene, rng: random.Random, habits: Habits, n_turns: int = 6) -> list[Turn]:
    """Questions about a scene with true answers; about two thirds ask whether a kind is there.

    Yes and no are equally likely. The absent kinds come in thirds from: any kind, frequent kinds,
    and kinds that usually come with one that is there.
    """
    turns: list[Turn] = []
    asked: set[str] = set()
    for wanted in _plan(rng, n_turns, limit=len(scene.counts)):
        turn, subject = None, ""
        while turn is None or subject in asked:
            if wanted is None:
                turn = rng.choice(OTHER_QUESTIONS)(scene, rng, habits)
                subject = turn[0].removesuffix(ONE_WORD) if turn else ""
            else:
                subject = rng.choice([*scene.counts]) if wanted else absent_kind(scene, rng, habits)
                turn = _presence(scene, subject, rng)
        asked.add(subject)
        turns.append(turn)
    return turns


def _plan(rng: random.Random, n_turns: int, limit: int) -> list[bool | None]:
    """For each turn: a question to be answered Yes (True), No (False), or another one (None).

    At most `limit` of either, as there are only so many kinds to say yes about; the rule is the same
    for both, so they stay balanced.
    """
    while True:
        plan = [rng.choice((True, False)) if rng.random() < 0.65 else None for _ in range(n_turns)]
        if max(plan.count(True), plan.count(False)) <= limit:
            return plan


def _presence(scene: Scene, kind: str, rng: random.Random) -> Turn:
    there = kind in scene.counts
    question = rng.choice(PRESENCE).format(a_kind=with_article(kind))
    style = rng.random()
    if style < 0.6:
        return question + ONE_WORD, "Yes" if there else "No"
    if style < 0.7:
        return question + ONE_WORD_PLEASE, "Yes" if there else "No"
    if not there:
        return question, f"No, there is no {kind} in the image."
    obj = rng.choice([obj for obj in scene.objects if obj.kind == kind])
    return question, f"Yes, there is {with_article(noun_of(obj))} {place_of(obj)}."


def absent_kind(scene: Scene, rng: random.Random, habits: Habits) -> str:
    """A kind that is not in the scene: any, a frequent one, or one that usually comes along."""
    present = scene.counts
    pool = [kind for kind in KINDS if kind not in present]
    way = rng.randrange(3)
    if way == 1:
        pool = [kind for kind in habits.popular if kind not in present][:4]
    elif way == 2:
        partners = habits.partners[rng.choice([*present])]
        pool = [kind for kind in partners if kind not in present][:2]
    return rng.choice(pool)


def _single(scene: Scene, rng: random.Random) -> SceneObject | None:
    """An object that is the only one of its kind, so that 'the ball' is clear."""
    singles = [obj for obj in scene.objects if scene.counts[obj.kind] == 1]
    return rng.choice(singles) if singles else None


def _answer(question: str, short: str, long: str, rng: random.Random) -> Turn:
    return (question + ONE_WORD, short) if rng.random() < 0.6 else (question, long)


def _colour(scene: Scene, rng: random.Random, habits: Habits) -> Turn | None:
    obj = _single(scene, rng)
    if obj is None:
        return None
    long = f"The {obj.kind} is {obj.colour}."
    return _answer(f"What colour is the {obj.kind}?", obj.colour.capitalize(), long, rng)


def _where(scene: Scene, rng: random.Random, habits: Habits) -> Turn | None:
    obj = _single(scene, rng)
    if obj is None:
        return None
    short = place_of(obj)
    long = f"The {obj.kind} is {short}."
    return _answer(f"Where is the {obj.kind}?", short[0].upper() + short[1:], long, rng)


def _how_many(scene: Scene, rng: random.Random, habits: Habits) -> Turn:
    kind = rng.choice([*scene.counts]) if rng.random() < 0.8 else absent_kind(scene, rng, habits)
    count = scene.counts[kind]
    verb, noun = ("is", kind) if count == 1 else ("are", plural(kind))
    question = f"How many {plural(kind)} are there?"
    short = NUMBERS[count].capitalize() if count else "None"
    return _answer(question, short, f"There {verb} {NUMBERS[count]} {noun}.", rng)


def left_neighbour(scene: Scene, obj: SceneObject) -> SceneObject | None:
    """The nearest object on the left in the same row of the raster, if there is one."""
    row, column = obj.cell
    left = [o for o in scene.objects if o.cell[0] == row and o.cell[1] < column]
    return max(left, key=lambda o: o.cell[1]) if left else None


def _left_of(scene: Scene, rng: random.Random, habits: Habits) -> Turn | None:
    obj = _single(scene, rng)
    neighbour = left_neighbour(scene, obj) if obj else None
    if obj is None or neighbour is None:
        return None
    phrase = with_article(noun_of(neighbour))
    question = f"What is on the left of the {obj.kind}?"
    return _answer(question, sentence(phrase)[:-1], f"There is {phrase}.", rng)


def _background(scene: Scene, rng: random.Random, habits: Habits) -> Turn:
    setting = SETTINGS[scene.background]
    return _answer(
        "Where was the picture taken?",
        setting[0].upper() + setting[1:],
        f"It was taken {setting}.",
        rng,
    )


def _describe(scene: Scene, rng: random.Random, habits: Habits) -> Turn:
    caption = rng.choice((caption_positions, caption_colours))(scene, with_size=rng.random() < 0.3)
    return rng.choice(DESCRIBE), caption


OTHER_QUESTIONS = (_colour, _where, _how_many, _left_of, _background, _describe)


def world_rows(rng: random.Random) -> list[Turn]:
    """Two questions about how the world usually is; they need no image."""
    theme, other = rng.sample(THEMES, 2)
    first, second = rng.sample(theme.pair, 2)
    turns = [
        (f"What usually comes with {with_article(first)}?", sentence(with_article(second))),
        (
            f"Where do you usually see {with_article(other.pair[0])}?",
            sentence(SETTINGS[other.background]),
        ),
        (
            f"What do you usually see {SETTINGS[theme.background]}?",
            sentence(enumerate_phrases([with_article(kind) for kind in theme.pair])),
        ),
    ]
    return rng.sample(turns, 2)
