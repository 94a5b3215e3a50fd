"""English words for things and numbers: plurals, articles, counted nouns, lists, sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence

_IRREGULAR = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "knife": "knives",
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "leaf": "leaves",
    "shelf": "shelves",
    "loaf": "loaves",
    "wolf": "wolves",
    "calf": "calves",
    "ox": "oxen",
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
    "aircraft": "aircraft",
    "potato": "potatoes",
    "tomato": "tomatoes",
}
# One box holds a pair, or a piece: these nouns are counted with a measure word in front.
_MEASURED = {
    "scissors": ("pair", "pairs"),
    "skis": ("pair", "pairs"),
    "pants": ("pair", "pairs"),
    "glasses": ("pair", "pairs"),
    "broccoli": ("piece", "pieces"),
}
_SPELT = {"tv": "TV"}
_NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
# Written with a vowel but spoken with a consonant, and the other way round.
_CONSONANT_SOUND = re.compile(r"(uni|use|euro|ewe|one\b|once\b|ukulele|u[rst]ensil)", re.IGNORECASE)
_SILENT_H = re.compile(r"(hour|honest|heir)", re.IGNORECASE)


def singular(noun: str) -> str:
    """The noun as a sentence writes it: `tv` is `TV`."""
    return " ".join(_SPELT.get(word, word) for word in noun.split())


def is_measured(noun: str) -> bool:
    """Whether the noun has no number of its own (scissors, broccoli)."""
    return noun.split()[-1] in _MEASURED


def plural(noun: str) -> str:
    """More than one of it, or the noun itself where it has no other form."""
    *front, last = singular(noun).split()
    return " ".join([*front, _plural_word(last)])


def _plural_word(word: str) -> str:
    if word in _MEASURED:
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if re.search(r"(s|x|z|ch|sh)$", word):
        return f"{word}es"
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}s"


def a(noun: str) -> str:
    """The noun with `a` or `an`; a measured noun with its measure word."""
    phrase = singular(noun)
    if is_measured(noun):
        phrase = f"{_MEASURED[noun.split()[-1]][0]} of {phrase}"
    vowel = bool(re.match(r"[aeiou]", phrase, re.IGNORECASE)) and not _CONSONANT_SOUND.match(phrase)
    return f"an {phrase}" if vowel or _SILENT_H.match(phrase) else f"a {phrase}"


def number(count: int) -> str:
    """A count in words up to ten; above it only `more than ten`, which is as far as counting is sure."""
    return _NUMBERS[count] if count <= 10 else "more than ten"


def counted(noun: str, count: int) -> str:
    """`a dog`, `two dogs`, `three pairs of skis`, `more than ten books`."""
    if count == 1:
        return a(noun)
    if is_measured(noun):
        return f"{number(count)} {_MEASURED[noun.split()[-1]][1]} of {singular(noun)}"
    return f"{number(count)} {plural(noun)}"


def many(noun: str) -> str:
    """A group whose number is not known."""
    return f"many {plural(noun)}" if noun.split()[-1] != "broccoli" else "much broccoli"


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def sentence(text: str) -> str:
    """White space evened out, a capital in front and a full stop behind."""
    text = " ".join(text.split()).rstrip(" ,;:-")
    text = re.sub(r"\s+([.,!?;:])", r"\1", text)
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def mentions(text: str, noun: str) -> bool:
    """Whether a text names the noun, its last word or an everyday name of it, in either number.

    Cautious on purpose: it decides what is *not* asked, so a false alarm costs nothing.
    """
    words = set(re.findall(r"[a-z]+", text.lower()))
    candidates = {noun, noun.split()[-1], *_ALSO.get(noun, ())}
    return any(
        set(form.lower().split()) <= words
        for candidate in candidates
        for form in (candidate, plural(candidate))
    )


# Other words that captions use for COCO's categories, and so must not be called absent.
_ALSO: dict[str, tuple[str, ...]] = {
    "person": (
        *("man", "woman", "boy", "girl", "child", "kid", "baby", "guy", "lady", "player", "rider"),
        *("skier", "surfer", "crowd", "gentleman", "toddler", "chef", "cook", "adult", "couple"),
        *("skater", "snowboarder", "batter", "he", "she", "his", "her", "someone", "worker"),
    ),
    "bicycle": ("bike", "cyclist", "biker"),
    "motorcycle": ("motorbike", "bike", "moped", "scooter", "biker", "motor", "motorcyclist"),
    "car": ("vehicle", "taxi", "cab", "van", "suv", "sedan", "automobile", "jeep", "traffic"),
    "airplane": ("plane", "jet", "aircraft", "airliner"),
    "truck": ("vehicle", "van", "pickup", "lorry", "trailer"),
    "bus": ("vehicle", "van", "trolley"),
    "train": ("locomotive", "subway", "tram", "trolley", "engine"),
    "boat": ("ship", "canoe", "kayak", "yacht", "sailboat", "raft", "vessel", "ferry"),
    "traffic light": ("signal", "stoplight"),
    "bird": ("duck", "goose", "parrot", "pigeon", "gull", "seagull", "owl", "swan", "chicken"),
    "cat": ("kitten", "kitty", "animal"),
    "dog": ("puppy", "pup", "animal", "terrier", "retriever"),
    "horse": ("pony", "foal", "animal"),
    "sheep": ("lamb", "ram", "goat", "animal"),
    "cow": ("cattle", "bull", "calf", "ox", "yak", "buffalo", "livestock", "animal"),
    "bear": ("cub", "animal"),
    "backpack": ("bag", "pack", "luggage", "knapsack"),
    "handbag": ("bag", "purse", "luggage"),
    "suitcase": ("bag", "luggage", "baggage", "trunk"),
    "umbrella": ("parasol",),
    "tie": ("necktie", "bowtie", "suit"),
    "skis": ("ski", "skiing", "skier"),
    "snowboard": ("board", "snowboarder", "snowboarding"),
    "skateboard": ("board", "skateboarder", "skateboarding", "skater"),
    "surfboard": ("board", "surfer", "surfing"),
    "sports ball": ("soccer", "baseball", "basketball", "football", "tennis", "volleyball"),
    "baseball glove": ("mitt", "baseball"),
    "tennis racket": ("racquet", "tennis"),
    "baseball bat": ("baseball", "batter"),
    "bottle": ("beer", "wine", "water", "beverage", "drink"),
    "wine glass": ("wine", "beverage", "drink"),
    "cup": ("mug", "glass", "coffee", "tea", "drink", "beverage"),
    "fork": ("utensil", "silverware", "cutlery"),
    "knife": ("utensil", "silverware", "cutlery", "blade"),
    "spoon": ("utensil", "silverware", "cutlery"),
    "bowl": ("dish", "pot"),
    "sandwich": ("burger", "hamburger", "toast", "sub", "food"),
    "orange": ("fruit", "food", "citrus"),
    "apple": ("fruit", "food"),
    "banana": ("fruit", "food"),
    "broccoli": ("vegetable", "veggie", "food", "salad"),
    "carrot": ("vegetable", "veggie", "food", "salad"),
    "hot dog": ("hotdog", "sausage", "bun", "food"),
    "pizza": ("food", "slice"),
    "donut": ("doughnut", "pastry", "food", "dessert"),
    "cake": ("dessert", "pastry", "cupcake", "food", "pie"),
    "chair": ("seat", "stool", "armchair", "furniture", "recliner", "bench"),
    "bench": ("seat", "pew"),
    "couch": ("sofa", "loveseat", "furniture", "futon"),
    "potted plant": ("plant", "flower", "tree", "pot"),
    "bed": ("mattress", "bunk", "bedroom", "furniture"),
    "dining table": ("table", "desk", "counter", "furniture"),
    "toilet": ("commode", "urinal", "bathroom", "restroom", "latrine"),
    "tv": ("television", "monitor", "screen", "computer", "game", "wii"),
    "laptop": ("computer", "notebook"),
    "mouse": ("computer",),
    "remote": ("controller", "control", "wii", "game"),
    "keyboard": ("computer", "laptop", "piano"),
    "cell phone": ("phone", "cellphone", "smartphone", "mobile"),
    "microwave": ("appliance", "oven"),
    "oven": ("stove", "appliance", "range", "kitchen", "cooker"),
    "toaster": ("appliance", "kitchen"),
    "sink": ("basin", "faucet", "bathroom", "kitchen", "washbasin"),
    "refrigerator": ("fridge", "appliance", "freezer", "kitchen"),
    "book": ("magazine", "novel", "bookshelf", "bookcase", "library"),
    "clock": ("watch", "time", "tower"),
    "vase": ("jar", "pot", "flower", "pottery"),
    "scissors": ("shears",),
    "teddy bear": ("teddy", "toy", "doll", "stuffed", "bear"),
    "hair drier": ("dryer", "blow"),
    "toothbrush": ("brush", "teeth"),
}
