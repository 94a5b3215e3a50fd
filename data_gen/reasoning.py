"""Conclusions that annotations support: questions beyond description, answered step by step.

Each conclusion is a function of a scene. It returns None where the scene does not support it. Answers
name the evidence, the general knowledge that links it to the conclusion, and what stays uncertain.
The questions give nothing away of what is in the image.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from data_gen.scene import Scene, the
from data_gen.wording import a, counted, listed, mentions, number, plural, sentence

Answer = tuple[str, str]
Conclusion = Callable[[Scene, random.Random], Answer | None]


@dataclass(frozen=True)
class Setting:
    """A kind of place: things that speak for it alone, and others that support them."""

    place: str
    core: frozenset[str]
    support: frozenset[str]
    needed: int = 2


@dataclass(frozen=True)
class Activity:
    """What a thing is made for, and what doing it takes."""

    thing: str
    doing: str
    takes: str


def _clues(text: str) -> frozenset[str]:
    return frozenset(clue.strip() for clue in text.split(","))


_FOOD = "pizza, cake, donut, sandwich, hot dog, banana, apple, orange, broccoli, carrot"
_ANIMALS = _clues("dog, cat, horse, cow, sheep")
# A toy or a picture of an animal is annotated as the animal.
_LIKENESS = _clues(
    "toy, doll, stuffed, plush, painting, drawing, picture, statue, sculpture, figurine, poster"
)
_WILD = _clues("elephant, giraffe, zebra, bear")
_VEHICLES = _clues("car, truck, bus, motorcycle, train")
_LUGGAGE = _clues("suitcase, backpack")
_TABLE = _clues(f"fork, knife, spoon, bowl, cup, wine glass, dining table, {_FOOD}")
_WORK = _clues("laptop, keyboard, mouse")

SETTINGS = (
    Setting("kitchen", _clues("oven, refrigerator, microwave, toaster"), _clues("sink, bowl, knife, spoon")),
    Setting("bathroom", _clues("toilet, toothbrush, hair drier"), _clues("sink")),
    Setting("living room", _clues("couch"), _clues("tv, remote, potted plant, vase, chair")),
    Setting("bedroom", _clues("bed"), _clues("teddy bear, clock, book, couch")),
    Setting("workplace with a computer", _WORK, _clues("tv, cell phone, book, chair")),
    Setting(
        "street",
        _clues("car, bus, traffic light, stop sign, fire hydrant, parking meter"),
        _clues("truck, motorcycle, bicycle"),
    ),
    Setting("place for meals", _clues("dining table"), _clues(f"fork, wine glass, chair, cup, {_FOOD}"), 3),
)

ACTIVITIES = (
    Activity("skis", "skiing", "balance, strong legs and attention to the slope"),
    Activity("snowboard", "snowboarding", "balance, strong legs and attention to the slope"),
    Activity("surfboard", "surfing", "balance, good swimming and a feeling for the waves"),
    Activity("skateboard", "skateboarding", "balance, practice and the courage to fall"),
    Activity("tennis racket", "playing tennis", "a quick eye, fast feet and good timing"),
    Activity("baseball bat", "playing baseball", "a quick eye, strength and good timing"),
    Activity("baseball glove", "playing baseball", "a quick eye, a sure catch and a strong throw"),
    Activity("frisbee", "throwing and catching a frisbee", "a good aim and quick movements"),
    Activity("kite", "flying a kite", "a steady wind, open space and a feeling for the line"),
    Activity("bicycle", "cycling", "balance, some stamina and attention to others on the way"),
)


def where_it_is(scene: Scene, rng: random.Random) -> Answer | None:
    """The kind of place, from things that go together; None if two places fit equally well."""
    found = [
        (len((setting.core | setting.support) & scene.counts.keys()), setting)
        for setting in SETTINGS
        if setting.core & scene.counts.keys()
    ]
    best = max((count for count, _ in found), default=0)
    fitting = [setting for count, setting in found if count == best and best >= setting.needed]
    if len(fitting) != 1:
        return None
    place = fitting[0].place
    clues = fitting[0].core | fitting[0].support
    evidence = [name for name in scene.counts if name in clues][:5]
    question = rng.choice(
        (
            "What kind of place is this likely to be, and what points to it?",
            "Where might this have been taken? Explain how you can tell.",
            "Which sort of surroundings does this look like, and why?",
        )
    )
    said = set(" ".join(scene.context.captions).lower().split())
    confirmed = set(place.split()) <= said
    close = (
        "The rest of the scene fits this."
        if confirmed
        else "Other places can hold such things too, so this is likely but not certain."
    )
    answer = (
        f"{_there(scene, evidence)} Each of these can be found in many places, but they are most "
        f"often found together in {a(place)}. So this is most likely {a(place)}. {close}"
    )
    return question, answer


def what_it_takes(scene: Scene, rng: random.Random) -> Answer | None:
    """The skills of an activity, where a person and its equipment are both there."""
    found = [activity for activity in ACTIVITIES if activity.thing in scene.counts]
    if "person" not in scene.counts or not found:
        return None
    activity = found[0] if len({f.doing for f in found}) == 1 else rng.choice(found)
    things = plural(activity.thing)
    question = rng.choice(
        (
            "What abilities would help with what is probably going on here?",
            "What would someone need to be good at to take part in this?",
            "Which skills does the likely activity call for, and how can you tell?",
        )
    )
    answer = (
        f"{_there(scene, ['person', activity.thing])} {sentence(things)[:-1]} are made for "
        f"{activity.doing}, so that is the likely activity, or it is about to start or just over. "
        f"{sentence(activity.doing)[:-1]} calls for {activity.takes}. How far the people here have "
        "mastered this cannot be told from a single image."
    )
    return question, answer


def what_to_watch(scene: Scene, rng: random.Random) -> Answer | None:
    """Safety, where people and vehicles are both there."""
    vehicles = [name for name in scene.counts if name in _VEHICLES]
    if "person" not in scene.counts or not vehicles:
        return None
    question = rng.choice(
        (
            "What should everyone here pay attention to in order to stay safe?",
            "Which risks might there be in this situation, and what could be done about them?",
            "What caution does this scene call for, and why?",
        )
    )
    answer = (
        f"{_there(scene, ['person', *vehicles[:3]])} Vehicles are heavy and cannot stop at once, and "
        "people outside of them have little protection. So anyone on foot should keep a safe distance "
        "and look before stepping into the way, and whoever drives should be ready to brake. How great "
        "the risk really is depends on speeds, which a single image does not show."
    )
    return question, answer


def what_weather(scene: Scene, rng: random.Random) -> Answer | None:
    """Weather, from an umbrella."""
    if "umbrella" not in scene.counts:
        return None
    question = rng.choice(
        (
            "What can be guessed about the weather, and how sure is that?",
            "Is there a hint about the weather here? Explain.",
        )
    )
    answer = (
        f"{_there(scene, ['umbrella'])} Umbrellas keep off the rain, and some people use them against "
        "strong sun. So rain, or the fear of it, is one explanation, and bright sun is the other. The "
        "umbrella alone does not decide between them: wet ground would speak for rain, and hard "
        "shadows for sun."
    )
    return question, answer


def what_meal(scene: Scene, rng: random.Random) -> Answer | None:
    """That a meal is near, from at least three things for eating."""
    found = [name for name in scene.counts if name in _TABLE]
    if len(found) < 3:
        return None
    question = rng.choice(
        (
            "What is probably about to happen here, or has just happened?",
            "What occasion might this be, and what makes you think so?",
        )
    )
    answer = (
        f"{_there(scene, found[:5])} One such thing could be there by chance, but several of them "
        "together are what is used or served when people eat. So a meal or a snack is likely being "
        "prepared, going on or just over. Which of these it is depends on the moment, and the things "
        "alone do not tell."
    )
    return question, answer


def what_care(scene: Scene, rng: random.Random) -> Answer | None:
    """What tame animals need."""
    found = _alive(scene, _ANIMALS)
    if not found:
        return None
    question = rng.choice(
        (
            "What responsibilities might come with a scene like this?",
            "What would someone who looks after what is seen here have to think of?",
        )
    )
    kinds = listed([plural(name) for name in found])
    answer = (
        f"{_there(scene, found)} Many {kinds} depend on people for food, fresh water, shelter and "
        "treatment when they are ill. So whoever looks after animals like these has to provide for "
        "that every day. It cannot be seen whether they have an owner; if they live in the wild, the "
        "best care is to leave them in peace."
    )
    return question, answer


def what_distance(scene: Scene, rng: random.Random) -> Answer | None:
    """How to behave near large wild animals."""
    found = _alive(scene, _WILD)
    if not found:
        return None
    question = rng.choice(
        (
            "How should a visitor behave in a place like this, and why?",
            "What would be wise to keep in mind for someone who stood here?",
        )
    )
    kinds = listed([plural(name) for name in found])
    answer = (
        f"{_there(scene, found)} Although {kinds} may look calm, they are strong wild animals, and one "
        "that feels threatened can hurt a person. So a visitor should keep a good distance, move "
        "quietly, and never feed them or block their way. If they live in a zoo or a reserve, which the "
        "animals alone do not show, its rules come first."
    )
    return question, answer


def what_journey(scene: Scene, rng: random.Random) -> Answer | None:
    """Travel, from luggage and people."""
    found = [name for name in scene.counts if name in _LUGGAGE]
    if not found or "person" not in scene.counts:
        return None
    question = rng.choice(
        (
            "What plans might someone here have?",
            "What may have come just before this moment, or come next?",
        )
    )
    kinds = listed([plural(name) for name in found])
    answer = (
        f"{_there(scene, ['person', *found])} People use {kinds} to take things along when they go "
        "somewhere. So someone here may be on the way, about to leave or newly arrived. Whether it is "
        "a long journey or only a short way cannot be told from what is carried."
    )
    return question, answer


def what_work(scene: Scene, rng: random.Random) -> Answer | None:
    """What a computer may be used for."""
    found = [name for name in scene.counts if name in _WORK]
    if not found:
        return None
    question = rng.choice(
        (
            "What tasks could be done at this spot, and what suggests that?",
            "What might someone come to this place to do?",
        )
    )
    kinds = listed([plural(name) for name in found])
    answer = (
        f"{_there(scene, found)} Things like {kinds} are made for using a computer. So someone could "
        "write, look things up, study, play or talk to others here. What it is really used for would "
        "show on a screen, or in what else lies about, and stays open otherwise."
    )
    return question, answer


def which_order(scene: Scene, rng: random.Random) -> Answer | None:
    """The order of single things from left to right, for any categories."""
    middles = sorted((scene.center(box)[0], name) for name, box in scene.singles.items())
    gaps = [right[0] - left[0] for left, right in pairwise(middles)]
    if len(middles) < 3 or len(middles) > 6 or min(gaps) < 0.05:
        return None
    names = [name for _, name in middles]
    question = rng.choice(
        (
            "If you let your eyes move from the left edge to the right edge, in which order would you "
            "meet the things that occur only once?",
            "Suppose a line swept over the image from left to right. In which order would it pass the "
            "middle of each thing that is there only once?",
        )
    )
    steps = [f"The middle of {the(names[0])} lies furthest to the left."]
    steps += [f"Next comes {the(name)}." for name in names[1:-1]]
    steps += [f"Furthest to the right is {the(names[-1])}."]
    answer = (
        f"The things that occur once are {listed([a(name) for name in sorted(names)])}. "
        f"{' '.join(steps)} So the order is: {listed([the(name) for name in names])}."
    )
    return question, answer


def which_most(scene: Scene, rng: random.Random) -> Answer | None:
    """The most frequent kind of thing and its lead, for any categories."""
    counts = sorted(scene.countable.items(), key=lambda item: (-item[1], item[0]))
    if len(counts) < 2 or len(counts) < len(scene.counts) or counts[0][1] > 10:
        return None
    (first, most), (_, next_most) = counts[:2]
    if most == next_most or len(counts) > 6:
        return None
    question = rng.choice(
        (
            "Which kind of thing is the most common here, and by how much does it lead?",
            "Count kind by kind: what is there most of, and how far is the runner-up behind?",
        )
    )
    seconds = [name for name, count in counts if count == next_most]
    behind = listed([plural(name) if next_most > 1 else the(name) for name in seconds])
    answer = (
        f"{_there(scene, [name for name, _ in counts])} The largest of these numbers is "
        f"{number(most)}, for the {plural(first)}. The next is {number(next_most)}, for "
        f"{'the ' if next_most > 1 else ''}{behind}. {number(most).capitalize()} minus "
        f"{number(next_most)} is {number(most - next_most)}, so the {plural(first)} lead by "
        f"{number(most - next_most)}."
    )
    return question, answer


# Conclusions about the world come first; the last two need no knowledge of the categories.
TOPICAL: tuple[Conclusion, ...] = (
    where_it_is,
    what_it_takes,
    what_to_watch,
    what_weather,
    what_meal,
    what_care,
    what_distance,
    what_journey,
    what_work,
)
GENERAL: tuple[Conclusion, ...] = (which_order, which_most)


def _alive(scene: Scene, animals: frozenset[str]) -> list[str]:
    """The animals among the objects, unless a caption hints that they are toys or pictures."""
    text = " ".join(scene.context.captions)
    if any(mentions(text, word) for word in _LIKENESS):
        return []
    return [name for name in scene.counts if name in animals]


def _there(scene: Scene, names: list[str]) -> str:
    """`There are two people and a car.`, as sure as the annotations are."""
    items = [scene.amount(name) for name in names]
    verb = scene.verb(names[0])
    return f"There {verb} {listed(items)} here."


def exactly(name: str, count: int) -> str:
    """`one dog`, `two dogs`: where the number is the point."""
    return f"one {a(name).split(' ', 1)[1]}" if count == 1 else counted(name, count)
