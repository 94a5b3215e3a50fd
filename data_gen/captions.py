"""Captions as sentences: which ones read well, and how to tell them in running text."""

from __future__ import annotations

import random
import re

from data_gen.wording import plural, sentence


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ARTICLES = _words(
    """
    a an the some two three four five six several many this
    """
)
_PLAIN = _ARTICLES | {"there", "one", "people", "men", "women", "children"}
_GROUP = re.compile(r"(?:group|crowd|couple|bunch|herd|flock|number|pair|line)s? of ([a-z]+ )([a-z]+)")
_AFTER_NOUN = _words(
    """
    in on at by near next of with and or who that which are is along around aboard beside
    behind under over inside outside up down out from together dressed seated gathered
    """
)
_NUMBERS = _words(
    """
    one two three four five six seven eight nine ten several many some few
    """
)
_PRONOUNS = _words(
    """
    he she it they his her their its i you we
    """
)
_ABOUT_PICTURES = re.compile(r"\b(image|photo|photograph|picture|pic|caption|view|shot)s?\b", re.I)
_RELATIVE = re.compile(r"\b(that|who|which|where|what|as|while|because|when|and)\b")
_FINITE = _words(
    """
    is are was were has have had can does do there's isn't aren't sits stands holds looks
    lies rests plays rides walks wears stares smiles jumps eats cooks uses flies runs hangs
    leans waits hits swings throws catches watches reads talks sleeps drives pulls pushes
    carries plugs swims surfs skis poses prepares works takes makes gets goes comes shows
    features contains sit stand hold lie rest play ride walk wear stare eat look hang wait
    watch fly grazes graze inhales consists appears seems leads crosses passes passed
    overlooks sees drinks cuts serves feeds touches fills moves turns keeps puts gives tries
    performs attempts enjoys lays sat stood held lay laid ran listens points
    """
)
_BEFORE_PLURAL = _NUMBERS | _words(
    """
    different various other small large big little old young new black white red blue green
    brown yellow orange gray grey pink purple dark bright colorful colored wooden metal
    metallic steel stainless glass modern empty full these those all both most more lots of
    with and or its his her their the in on at by near wild tall parked wearing holding
    stuffed baby male female
    """
)


def readable(captions: list[str]) -> list[str]:
    """The captions that read best, in their order: not about the picture itself, no loose `he`."""
    by_fault: dict[int, list[str]] = {}
    for caption in captions:
        by_fault.setdefault(_faults(caption), []).append(" ".join(caption.split()))
    return by_fault[min(by_fault)] if by_fault else []


def _faults(caption: str) -> int:
    words = caption.lower().split()
    return (
        4 * (len(words) < 4)
        + 2 * bool(_ABOUT_PICTURES.search(caption))
        + 2 * (bool(words) and words[0] in _PRONOUNS)
        + (len(re.findall(r"[.!?](?=\s)", caption)) > 0)
        + 2 * bool(re.search(r"[^\x20-\x7e‘’“”é]", caption.strip()))
    )


def tell(caption: str, rng: random.Random) -> str:
    """The caption as a sentence: `a man on a horse` becomes `The image shows a man on a horse.`"""
    if not is_noun_phrase(caption):
        return sentence(caption)
    frame = rng.choice(("The image shows", "The scene shows", "In the image there is", "This is"))
    if frame.startswith(("In", "This")) and not re.match(r"(a|an|one|the)\b", caption.lower()):
        frame = "The image shows"
    return sentence(f"{frame} {lowered(caption)}")


def summary(caption: str, rng: random.Random) -> str | None:
    """The caption as the last sentence of a paragraph; None if it may not make a sentence."""
    if is_noun_phrase(caption):
        frame = rng.choice(("All in all, the scene shows", "Taken together, what we see is"))
        return sentence(f"{frame} {lowered(caption)}")
    words = re.findall(r"[a-z'-]+", caption.lower())
    if caption.split()[0].lower() not in _PLAIN or not _FINITE.intersection(words):
        return None
    start = rng.choice(("All in all", "Taken together", "Overall"))
    return sentence(f"{start}, {lowered(caption)}")


def lowered(caption: str) -> str:
    """The caption without its capital, if its first word is no name."""
    plain = caption.split()[0].lower() in _PLAIN
    return caption[0].lower() + caption[1:] if plain else caption


def is_noun_phrase(caption: str) -> bool:
    """Whether a caption is surely `a man riding a horse`, not `a man rides a horse`.

    Unsure captions are told as they stand, which is right for both, so the test is strict: a known
    article in front, no finite verb outside of a relative clause, and no word in -s that could be one.
    """
    words = re.findall(r"[a-z'-]+", caption.lower())
    if not words or words[0] not in _ARTICLES or re.search(r"[.!?;:](?=\s)", caption):
        return False
    # `a group of people prepare dinner`: a verb without its -s.
    group = _GROUP.search(" ".join(words))
    if group and group[2] not in _AFTER_NOUN and not re.search(r"(ing|ed|[^s]s)$", group[2]):
        return False
    before = ""
    for word in words:
        if _RELATIVE.fullmatch(word) and word != "and":
            break  # what follows has a verb of its own
        if word in _FINITE or (word == "there" and before == ""):
            return False
        if _may_be_verb(word, before):
            return False
        before = word
    else:
        return True
    rest = words[words.index(word) + 1 :]
    # One verb belongs to the clause; a second may be the main one.
    return sum(w in _FINITE for w in rest) <= 1


def _may_be_verb(word: str, before: str) -> bool:
    if not word.endswith("s") or word.endswith(("ss", "us", "is", "'s")) or word in ("skis", "bus"):
        return False
    return before not in _BEFORE_PLURAL and plural(word[:-1]) == word and not before.endswith("ing")


def overlap(first: str, second: str) -> float:
    """The share of words that two captions have in common."""
    one, two = (set(re.findall(r"[a-z]+", text.lower())) for text in (first, second))
    return len(one & two) / max(1, min(len(one), len(two)))
