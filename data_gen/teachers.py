"""Teachers: a context and a kind in, questions and answers out.

`TemplateTeacher` needs no network and no model: it says only what follows from the annotations, in
LLaVA's three kinds (conversation, detailed description, complex reasoning). Teachers that ask a
language model get a file of their own here, their prompts go to `prompts/<kind>/`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from data_gen.captions import overlap, readable, summary, tell
from data_gen.contexts import Box, Context
from data_gen.reasoning import GENERAL, TOPICAL, exactly
from data_gen.scene import Scene, the
from data_gen.wording import a, listed, number, plural, sentence

KINDS = ("conversation", "detail", "reasoning")

Turn = tuple[str, str]


class NotEnoughError(Exception):
    """A context does not hold what a kind of data needs; the message says what is missing."""


class Teacher(Protocol):
    """Whoever turns what is known about an image into questions and answers."""

    @property
    def name(self) -> str:
        """Short name for records, settings that change the answers included."""

    def answer(self, context: Context, kind: str, rng: random.Random) -> list[Turn]:
        """Questions with their answers, in order; `NotEnoughError` if the context holds too little."""


@dataclass(frozen=True)
class TemplateTeacher:
    """Sentences filled in from captions and boxes.

    Attributes:
        yes_no_pairs: how many times a conversation asks for something that is there and for something
            that is not. Always in pairs, so that neither answer is the safe guess.
    """

    yes_no_pairs: int = 1

    @property
    def name(self) -> str:
        """`template`, with the settings that differ from the defaults."""
        return "template" if self.yes_no_pairs == 1 else f"template,yes_no_pairs={self.yes_no_pairs}"

    def answer(self, context: Context, kind: str, rng: random.Random) -> list[Turn]:
        """See `Teacher`."""
        scene = Scene(context)
        if kind == "conversation":
            return _conversation(scene, self.yes_no_pairs, rng)
        if kind == "detail":
            return [_detail(scene, rng)]
        if kind == "reasoning":
            return [_reasoning(scene, rng)]
        raise ValueError(f"unknown kind {kind!r}; use one of {', '.join(KINDS)}")


TEACHERS: dict[str, type[TemplateTeacher]] = {"template": TemplateTeacher}


# --- Conversation ----------------------------------------------------------------------------------


def _conversation(scene: Scene, pairs: int, rng: random.Random) -> list[Turn]:
    """What happens first, the list of objects last (it would give the other answers away)."""
    context = scene.context
    if not context.captions and not context.boxes:
        raise NotEnoughError("neither captions nor boxes")
    turns = [_happening(context, rng)] if context.captions else []
    middle = _yes_no(scene, pairs, rng) + list(_about_objects(scene, rng))
    rng.shuffle(middle)
    turns += middle
    if scene.counts:
        turns.append(_objects(scene, rng))
    return turns


def _happening(context: Context, rng: random.Random) -> Turn:
    question = rng.choice(
        (
            "What is happening in this image?",
            "What can be seen in this picture?",
            "Could you tell me what this image shows?",
            "What is going on here?",
            "Please describe this picture in a sentence.",
        )
    )
    return question, tell(rng.choice(readable(context.captions)), rng)


def _yes_no(scene: Scene, pairs: int, rng: random.Random) -> list[Turn]:
    """As many questions about what is there as about what is not."""
    there, absent = list(scene.counts), scene.absent
    pairs = min(pairs, len(there), len(absent))
    turns = [_yes(scene, name, rng) for name in rng.sample(there, pairs)]
    return turns + [_no(name, rng) for name in rng.sample(absent, pairs)]


def _asked(name: str, rng: random.Random) -> str:
    return rng.choice(
        (
            f"Is there {a(name)} in the image?",
            f"Can you see {a(name)} in this picture?",
            f"Does the image show {a(name)}?",
            f"{'Is' if name == 'broccoli' else 'Are'} there any {plural(name)} here?",
        )
    )


def _yes(scene: Scene, name: str, rng: random.Random) -> Turn:
    amount, verb = scene.amount(name), scene.verb(name)
    answers = [
        f"Yes, there {verb} {amount} in the image.",
        f"Yes, the image shows {amount}.",
        f"Yes, I can see {amount}.",
    ]
    if name in scene.singles:
        answers.append(f"Yes, there is {amount}: it {scene.place(scene.singles[name])}.")
    return _asked(name, rng), rng.choice(answers)


def _no(name: str, rng: random.Random) -> Turn:
    answers = (
        f"No, there {'is' if name == 'broccoli' else 'are'} no {plural(name)} in the image.",
        f"No, I cannot see any {plural(name)} here.",
        f"No, the image does not show {a(name)}.",
        f"No, {a(name)} is not part of this scene.",
    )
    return _asked(name, rng), rng.choice(answers)


def _about_objects(scene: Scene, rng: random.Random) -> Iterator[Turn]:
    """A count, a comparison, a place and a relation, each where the boxes allow it."""
    if scene.countable:
        yield _count(*rng.choice(sorted(scene.countable.items())), rng)
    comparison = _comparison(scene, rng)
    if comparison and rng.random() < 0.5:
        yield comparison
    singles = sorted(scene.singles.items())
    if singles:
        yield _location(scene, *rng.choice(singles), rng)
    relations = list(_relations(scene))
    if relations:
        yield _relation(*rng.choice(relations), rng)


def _count(name: str, count: int, rng: random.Random) -> Turn:
    things, amount = plural(name), exactly(name, count)
    question = rng.choice(
        (
            f"How many {things} are there in the image?",
            f"How many {things} can you see?",
            f"Can you count the {things} here?",
            f"What is the number of {things} in this picture?",
        )
    )
    answers = (
        f"There {'is' if count == 1 else 'are'} {amount} in the image.",
        f"I can see {amount}.",
        f"The image shows {amount}.",
    )
    return question, rng.choice(answers)


def _comparison(scene: Scene, rng: random.Random) -> Turn | None:
    """Which of two kinds there is more of; numbers beyond ten are not sure enough to compare."""
    counts = [(name, count) for name, count in sorted(scene.countable.items()) if count <= 10]
    unequal = [(p, q) for p in counts for q in counts if p[1] > q[1]]
    if not unequal:
        return None
    (more, many), (less, few) = rng.choice(unequal)
    first, second = (more, less) if rng.random() < 0.5 else (less, more)
    question = f"Are there more {plural(first)} or more {plural(second)} in the image?"
    answer = f"There are more {plural(more)}: {exactly(more, many)} against {exactly(less, few)}."
    return question, answer


def _location(scene: Scene, name: str, box: Box, rng: random.Random) -> Turn:
    question = rng.choice(
        (
            f"Where is {the(name)} in the image?",
            f"In which part of the picture can {the(name)} be found?",
            f"Where can I see {the(name)}?",
        )
    )
    return question, sentence(f"{the(name)} {scene.place(box)}")


def _relations(scene: Scene) -> Iterator[tuple[str, str, str]]:
    """Pairs of single things that are clearly apart, with how the first stands to the second."""
    singles = list(scene.singles.items())[:6]
    for first, first_box in singles:
        for second, second_box in singles:
            relation = scene.relation(first_box, second_box) if first != second else None
            if relation:
                yield first, relation, second


def _relation(first: str, relation: str, second: str, rng: random.Random) -> Turn:
    question = rng.choice(
        (
            f"Where is {the(first)} in relation to {the(second)}?",
            f"How is {the(first)} placed relative to {the(second)}?",
        )
    )
    return question, _related(first, relation, second)


def _related(first: str, relation: str, second: str) -> str:
    return sentence(f"in the image, {the(first)} is {relation} {the(second)}")


def _objects(scene: Scene, rng: random.Random) -> Turn:
    question = rng.choice(
        (
            "Which objects can be seen in the image?",
            "What things are in this picture?",
            "Can you list what you see here?",
            "Name the things in this image.",
        )
    )
    return question, _inventory(scene, rng)


def _inventory(scene: Scene, rng: random.Random, after: str = "") -> str:
    """The categories with their numbers; beyond eight of them, those that take up most room.

    It does not begin as the sentence `after` which it comes does.
    """
    names = list(scene.counts)[:8]
    items = listed([scene.amount(name) for name in names])
    if len(names) < len(scene.counts):
        frame = rng.choice(("Among other things, there", "Among the things here, there"))
        return sentence(f"{frame} {scene.verb(names[0])} {items}")
    frames = (
        sentence(f"the image shows {items}"),
        sentence(f"there {scene.verb(names[0])} {items} in the image"),
        sentence(f"I can see {items}"),
    )
    return rng.choice([frame for frame in frames if frame.split()[0] != after.split(" ")[0]])


# --- Detailed description --------------------------------------------------------------------------


def _detail(scene: Scene, rng: random.Random) -> Turn:
    """A paragraph: what it shows, what is there, where the main things are, and a summary."""
    if not scene.counts:
        raise NotEnoughError("no boxes")
    captions = readable(scene.context.captions)
    rng.shuffle(captions)
    sentences = [tell(captions[0], rng)] if captions else []
    sentences.append(_inventory(scene, rng, after=sentences[0] if sentences else ""))
    sentences += _layout(scene, rng)
    rest = sorted(captions[1:], key=lambda caption: overlap(captions[0], caption))
    endings = [text for text in (summary(caption, rng) for caption in rest) if text]
    sentences += endings[:1]
    if len(sentences) < 2:
        raise NotEnoughError("too few facts for a paragraph")
    question = rng.choice(
        (
            "Describe this image in detail.",
            "Please give a full description of the picture.",
            "Tell me everything that you can see here.",
            "What does this image look like? Go into detail.",
            "Walk me through this picture as exactly as you can.",
            "Write a thorough description of the scene.",
            "Can you explain in detail what the photo contains?",
        )
    )
    return question, " ".join(sentences)


def _layout(scene: Scene, rng: random.Random) -> list[str]:
    """Where the largest single things are, and how some of them stand to each other."""
    sentences = []
    placed = list(scene.singles.items())[:3]
    for name, box in placed:
        sentences.append(sentence(f"{the(name)} {scene.place(box)}"))
    sentences += [s for s in (_side(scene, name) for name in scene.countable) if s][:2]
    pairs = [pair for pair in _relations(scene) if pair[1] in ("to the left of", "higher up than")]
    for first, relation, second in rng.sample(pairs, min(2, len(pairs))):
        sentences.append(_related(first, relation, second))
    return sentences


def _side(scene: Scene, name: str) -> str | None:
    """Several things of a kind that all stand on one side, or on both."""
    count = scene.countable[name]
    if not 2 <= count <= 10:
        return None
    across = [scene.center(box)[0] for box in scene.context.boxes if box.category == name]
    every = f"both {plural(name)}" if count == 2 else f"all {number(count)} {plural(name)}"
    if max(across) < 0.4:
        return sentence(f"{every} are on the left side of the image")
    if min(across) > 0.6:
        return sentence(f"{every} are on the right side of the image")
    if count == 2 and min(across) < 0.4 and max(across) > 0.6:
        things = plural(name)
        return f"One of the {things} is on the left side of the image and the other on the right."
    return None


# --- Complex reasoning -----------------------------------------------------------------------------


def _reasoning(scene: Scene, rng: random.Random) -> Turn:
    if not scene.counts:
        raise NotEnoughError("no boxes")
    for conclusions in (TOPICAL, GENERAL):
        found = [turn for turn in (conclude(scene, rng) for conclude in conclusions) if turn]
        if found:
            return rng.choice(found)
    raise NotEnoughError("no conclusion follows from the objects")
