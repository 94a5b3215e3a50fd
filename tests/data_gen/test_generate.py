"""Instruction data: only what the annotations say, in English, the same bytes for the same seed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen import wording
from data_gen.captions import is_noun_phrase, summary, tell
from data_gen.contexts import Box, Context, read_coco
from data_gen.generate import generate
from data_gen.reasoning import GENERAL, TOPICAL, where_it_is, which_order
from data_gen.scene import Scene
from data_gen.teachers import KINDS, TEACHERS, NotEnoughError, TemplateTeacher
from mllm.data.rows import open_rows
from mllm.data.schema import images_of, message_text
from mllm.errors import ConfigError, DataError

COCO = Path(os.environ.get("MLLM_TEST_DATA", Path(__file__).parents[3] / "shared/data"), "coco_tiny")
needs_coco = pytest.mark.skipif(not COCO.is_dir(), reason=f"no real COCO data at {COCO}")

CATEGORIES = (
    *("person", "car", "dog", "cat", "bus", "sheep", "knife", "wine glass", "scissors", "skis"),
    *("broccoli", "umbrella", "orange", "tv", "mouse", "couch", "bench", "sandwich", "toothbrush"),
    *("oven", "sink", "refrigerator", "suitcase", "elephant", "laptop", "kite"),
)


def box(category: str, x: float, y: float, w: float = 20, h: float = 20, crowd: bool = False) -> Box:
    return Box(category, x, y, w, h, crowd)


STREET = Context(
    image_id=7,
    file_name="7.jpg",
    width=200,
    height=100,
    captions=["A man walks his dog down a street.", "a man with a dog near a car"],
    boxes=[box("person", 10, 40, 30, 50), box("dog", 50, 70), box("car", 150, 10, 45, 30)],
    categories=CATEGORIES,
)


# --- Contexts --------------------------------------------------------------------------------------


def test_text_form_is_llavas() -> None:
    context = Context(1, "1.jpg", 640, 480, ["A cat.", "Two  cats \n here"], [])
    context.boxes = [box("cat", 64, 48, 128, 1000), box("wine glass", -5, 0, 645, 2)]
    assert context.text() == (
        "A cat.\nTwo cats here\n\ncat: [0.1, 0.1, 0.3, 1.0]\nwine glass: [0.0, 0.0, 1.0, 0.004]"
    )
    assert context.text(boxes=False) == "A cat.\nTwo cats here"
    assert context.text(captions=False).startswith("cat: [0.1,")


def coco_files(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 80} for i in (1, 2)]
    captions = {
        "images": images,
        "annotations": [{"id": 5, "image_id": 2, "caption": " A dog. \n"}],
    }
    instances = {
        "images": images[:1],
        "categories": [{"id": 1, "name": "dog"}, {"id": 9, "name": "cat"}],
        "annotations": [{"id": 3, "image_id": 1, "category_id": 9, "bbox": [1, 2, 3, 4], "iscrowd": 1}],
    }
    return json.loads(json.dumps(captions)), json.loads(json.dumps(instances))


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_read_coco_joins_captions_and_boxes(tmp_path: Path) -> None:
    captions, instances = coco_files(tmp_path)
    captions, instances = write(tmp_path / "c.json", captions), write(tmp_path / "i.json", instances)
    first, second = read_coco(captions, instances)
    assert first.boxes == [Box("cat", 1, 2, 3, 4, crowd=True)]
    assert (first.captions, first.categories) == ([], ("dog", "cat"))
    # The instances file does not know the second image, so nothing is known to be absent from it.
    assert (second.captions, second.boxes, second.categories) == (["A dog."], [], ())
    assert [c.image_id for c in read_coco(captions=captions)] == [1, 2]
    assert [c.image_id for c in read_coco(instances=instances)] == [1]
    with pytest.raises(DataError, match="give a COCO captions file"):
        read_coco()


BREAKS: list[tuple[str, Any, str]] = [
    ("images/0/file_name", "", "i.json: images[0] (id 1): field 'file_name' must be a non-empty string"),
    ("images/0/width", 0, "i.json: images[0] (id 1): field 'width' must be at least 1, found 0"),
    ("images/0/height", "x", "i.json: images[0] (id 1): field 'height' must be a number, found x"),
    ("images/0/width", 99, "i.json: images[0] (id 1): 'width' is 99 here and 100 in another record"),
    ("images", None, "i.json: field 'images' must be a list; give COCO-style annotations"),
    ("annotations/0", 3, "i.json: annotations[0] must be an object, found 3"),
    ("annotations/0/image_id", 8, "i.json: annotations[0] (id 3): image_id 8 is not in 'images'"),
    ("annotations/0/image_id", None, "i.json: annotations[0] (id 3): field 'image_id' must be a number"),
    (
        "annotations/0/category_id",
        4,
        "i.json: annotations[0] (id 3): category_id 4 is not in 'categories'; add it",
    ),
    ("annotations/0/bbox", [1, 2], "i.json: annotations[0] (id 3): field 'bbox' must be [x, y, width"),
    ("annotations/0/bbox", [1, 2, -3, 4], "i.json: annotations[0] (id 3): field 'bbox' must be at least"),
    ("annotations/0/bbox", [1, 2, "a", 4], "i.json: annotations[0] (id 3): field 'bbox' must be a number"),
    ("annotations/0/bbox", [500, 2, 3, 4], "i.json: annotations[0] (id 3): field 'bbox' [500, 2, 3, 4] l"),
    ("categories", [], "i.json: field 'categories' is empty; give an instances file, not captions"),
    ("categories/0/name", 5, "i.json: categories[0] (id 1): field 'name' must be a non-empty string"),
]


@pytest.mark.parametrize(("where", "value", "message"), BREAKS)
def test_broken_annotations_are_named(tmp_path: Path, where: str, value: Any, message: str) -> None:
    captions, instances = coco_files(tmp_path)
    *path, last = where.split("/")
    target: Any = instances
    for step in path:
        target = target[int(step) if step.isdigit() else step]
    target[int(last) if last.isdigit() else last] = value
    with pytest.raises(DataError) as caught:
        read_coco(write(tmp_path / "c.json", captions), write(tmp_path / "i.json", instances))
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(caught.value)


def test_unreadable_annotation_files(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for name, message in (
        ("none.json", "there is no such file"),
        ("bad.json", "not a JSON file"),
        ("list.json", "found list"),
        ("", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            read_coco(tmp_path / name)


# --- Words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noun", "one", "two", "some"),
    [
        ("person", "a person", "two people", "people"),
        ("knife", "a knife", "two knives", "knives"),
        ("wine glass", "a wine glass", "two wine glasses", "wine glasses"),
        ("sheep", "a sheep", "two sheep", "sheep"),
        ("scissors", "a pair of scissors", "two pairs of scissors", "scissors"),
        ("skis", "a pair of skis", "two pairs of skis", "skis"),
        ("broccoli", "a piece of broccoli", "two pieces of broccoli", "broccoli"),
        ("mouse", "a mouse", "two mice", "mice"),
        ("bus", "a bus", "two buses", "buses"),
        ("bench", "a bench", "two benches", "benches"),
        ("toothbrush", "a toothbrush", "two toothbrushes", "toothbrushes"),
        ("tv", "a TV", "two TVs", "TVs"),
        ("umbrella", "an umbrella", "two umbrellas", "umbrellas"),
        ("orange", "an orange", "two oranges", "oranges"),
        ("unicycle", "a unicycle", "two unicycles", "unicycles"),
        ("hourglass", "an hourglass", "two hourglasses", "hourglasses"),
        ("baby", "a baby", "two babies", "babies"),
        ("toy", "a toy", "two toys", "toys"),
        ("box", "a box", "two boxes", "boxes"),
        ("red cube", "a red cube", "two red cubes", "red cubes"),
        ("child", "a child", "two children", "children"),
        ("hair drier", "a hair drier", "two hair driers", "hair driers"),
    ],
)
def test_nouns(noun: str, one: str, two: str, some: str) -> None:
    assert (wording.a(noun), wording.counted(noun, 2), wording.plural(noun)) == (one, two, some)


def test_numbers_and_lists() -> None:
    assert wording.counted("book", 10) == "ten books"
    assert wording.counted("book", 11) == "more than ten books"
    assert wording.listed(["a"]) == "a"
    assert wording.listed(["a", "b", "c"]) == "a, b and c"
    assert wording.sentence(" a dog , here ") == "A dog, here."


@pytest.mark.parametrize(
    ("caption", "noun", "expected"),
    [
        ("Two men in a room", "person", True),
        ("A bike on the street", "bicycle", True),
        ("A puppy", "dog", True),
        ("a table", "dining table", True),
        ("A catalogue on the floor", "cat", False),
        ("A cat", "dog", False),
    ],
)
def test_mentions(caption: str, noun: str, expected: bool) -> None:
    assert wording.mentions(caption, noun) is expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man with a red helmet on a small moped.", True),
        ("Two men that are standing in a kitchen.", True),
        ("A group of people sitting at desk using computers.", True),
        ("A man is riding a horse", False),
        ("A truck carries a large amount of items", False),
        ("A man in a red shirt is on a motorcycle", False),
        ("A group of people prepare dinner", False),
        ("A group of people cross the street", False),
        ("A group of elephants with water in front", True),
        ("There is a toilet", False),
        ("Children sitting at a table", False),
        ("Elephant", False),
    ],
)
def test_noun_phrases_are_told_from_sentences(caption: str, expected: bool) -> None:
    assert is_noun_phrase(caption) is expected
    told = tell(caption, random.Random(0))
    assert told.endswith(caption[1:].rstrip(".") + ".")
    assert (told[0] == caption[0] and len(told) <= len(caption) + 1) is not expected


def test_summaries_are_sentences_or_nothing() -> None:
    rng = random.Random(0)
    assert summary("A dog runs on grass", rng).endswith(", a dog runs on grass.")
    assert summary("a young kid with head phones on using a laptop", rng) is None
    assert summary("London is a city", rng) is None
    assert summary("A kitchen with wood floors and lots of cows", rng) is None


# --- What the template teacher says ----------------------------------------------------------------


def test_facts_from_boxes() -> None:
    scene = Scene(STREET)
    assert scene.counts == {"person": 1, "car": 1, "dog": 1}
    assert scene.place(STREET.boxes[0]) == "is in the lower left part of the image"
    assert scene.place(STREET.boxes[2]) == "is in the upper right part of the image"
    assert scene.relation(STREET.boxes[0], STREET.boxes[1]) == "to the left of"
    assert scene.relation(STREET.boxes[2], STREET.boxes[1]) == "to the right of"
    low, high = box("dog", 0, 60), box("cat", 5, 0)
    assert scene.relation(low, high) == "lower down than"
    assert scene.relation(high, low) == "higher up than"
    assert scene.relation(low, replace(low, x=5)) is None
    assert scene.place(box("bus", 0, 0, 200, 100)) == "takes up a large part of the image"
    assert scene.place(box("bus", 0, 60, 200, 40)) == "stretches across the lower part of the image"
    assert scene.place(box("cat", 90, 40)) == "is near the center of the image"


def test_what_captions_hint_at_is_not_called_absent() -> None:
    absent = Scene(STREET).absent
    assert not {"person", "dog", "car"} & set(absent)
    assert "elephant" in absent
    assert Scene(replace(STREET, captions=["A kitten"])).absent.count("cat") == 0
    assert Scene(replace(STREET, categories=())).absent == []


def test_crowds_are_not_counted() -> None:
    context = replace(STREET, boxes=[*STREET.boxes, box("person", 100, 50, 60, 40, crowd=True)])
    scene = Scene(context)
    assert scene.amount("person") == "many people"
    assert "person" not in scene.countable
    assert "person" not in scene.singles


boxes = st.builds(
    Box,
    category=st.sampled_from(CATEGORIES),
    x=st.integers(0, 180),
    y=st.integers(0, 90),
    width=st.integers(0, 200),
    height=st.integers(0, 100),
    crowd=st.booleans(),
)
contexts = st.builds(
    Context,
    image_id=st.integers(0, 10**6),
    file_name=st.just("a.jpg"),
    width=st.just(200),
    height=st.just(100),
    captions=st.lists(st.sampled_from([*STREET.captions, "Some place outdoors."]), max_size=3),
    boxes=st.lists(boxes, max_size=14),
    categories=st.sampled_from([CATEGORIES, ()]),
)

NUMBER_WORDS = {wording.number(n): n for n in range(11)}


def answers(context: Context, seed: int = 0, teacher: TemplateTeacher | None = None):
    for kind in KINDS:
        rng = random.Random(f"{seed}-{context.image_id}-{kind}")
        try:
            for question, answer in (teacher or TemplateTeacher()).answer(context, kind, rng):
                yield kind, question, answer
        except NotEnoughError:
            continue


@settings(deadline=None, max_examples=150)
@given(context=contexts, seed=st.integers(0, 99))
def test_yes_and_no_and_counts_are_true(context: Context, seed: int) -> None:
    """Answers are checked against the boxes, from their text alone."""
    names = {form: name for name in CATEGORIES for form in (wording.a(name), wording.plural(name))}
    number_of = Scene(context).counts
    crowds = {b.category for b in context.boxes if b.crowd}
    yes = no = 0
    for _, question, answer in answers(context, seed, TemplateTeacher(yes_no_pairs=2)):
        asked = re.fullmatch(
            r"(?:Is there|Can you see|Does the image show|Are there any|Is there any) "
            r"(.+?)(?: in the image| in this picture| here)?\?",
            question,
        )
        if asked:
            name = names[asked[1].removeprefix("any ")]
            assert answer.startswith("Yes, " if name in number_of else "No, ")
            yes, no = yes + (name in number_of), no + (name not in number_of)
            assert name in number_of or name in context.categories
        counted = re.search(
            r"How many (.+?) (?:are|can)|count the (.+) here|number of (.+) in this", question
        )
        if counted:
            name = names[next(filter(None, counted.groups()))]
            assert name not in crowds
            said = re.search(rf"\b(more than ten|{'|'.join(NUMBER_WORDS)})\b", answer)
            true = sum(b.category == name for b in context.boxes)
            assert (true > 10) if said[1] == "more than ten" else NUMBER_WORDS[said[1]] == true
    assert yes == no


@settings(deadline=None, max_examples=150)
@given(context=contexts, seed=st.integers(0, 99))
def test_positions_are_true(context: Context, seed: int) -> None:
    one = {
        f"the {wording.singular(b.category)}": b
        for b in context.boxes
        if sum(o.category == b.category for o in context.boxes) == 1
    }
    for _, _, answer in answers(context, seed):
        for first, how, second in re.findall(
            r"(the [a-zA-Z ]+?) is (to the left of|to the right of|higher up than|lower down than) "
            r"(the [a-zA-Z ]+)\.",
            answer,
        ):
            a, b = one[first], one[second]
            holds = {
                "to the left of": a.x < b.x and a.x + a.width <= b.x + 4,
                "to the right of": b.x < a.x and b.x + b.width <= a.x + 4,
                "higher up than": a.y < b.y and a.y + a.height <= b.y + 2,
                "lower down than": b.y < a.y and b.y + b.height <= a.y + 2,
            }
            assert holds[how]


@settings(deadline=None, max_examples=150)
@given(context=contexts, seed=st.integers(0, 99))
def test_language_is_clean(context: Context, seed: int) -> None:
    for _, question, answer in answers(context, seed):
        for text in (question, answer):
            assert text == " ".join(text.split())
            assert re.match(r"[A-Z]", text)
            assert text.endswith((".", "?", "!"))
            assert not re.search(r"\b(caption|box|boxes|annotat\w+|coordinates?|bounding|category)\b", text)
            assert not re.search(r"\ba ([aeio]|umb)\w", text), text
            assert not re.search(r"\ban [^aeiou]", text), text
            assert not re.search(r"\b(persons|knifes|sheeps|mouses|scissorses|glasss|broccolis)\b", text)
            assert not re.search(
                r"\bthere is (two|three|four|five|six|seven|eight|nine|ten|more|many)\b", text, re.I
            ), text
            assert "  " not in text
            assert ".." not in text


def test_reasoning_questions_leak_nothing() -> None:
    for context in (STREET, KITCHEN, SLOPE, TABLE):
        for kind, question, _ in answers(context):
            if kind == "reasoning":
                assert not any(wording.mentions(question, b.category) for b in context.boxes)


def scene_of(*categories: str, captions: tuple[str, ...] = ()) -> Context:
    placed = [box(c, 5 + 15 * i, 40, 10, 10) for i, c in enumerate(categories)]
    return Context(3, "3.jpg", 200, 100, list(captions), placed, CATEGORIES)


KITCHEN = scene_of("oven", "sink", "refrigerator", captions=("A kitchen with an oven.",))
SLOPE = scene_of("person", "skis")
TABLE = scene_of("fork", "pizza", "cup")


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (KITCHEN, ["an oven, a refrigerator and a sink", "most likely a kitchen", "fits this"]),
        (SLOPE, ["a person and a pair of skis", "skiing", "cannot be told from a single image"]),
        (scene_of("person", "car"), ["a car and a person", "a person and a car"]),
        (scene_of("umbrella"), ["an umbrella", "rain", "does not decide"]),
        (TABLE, ["a meal or a snack is likely"]),
        (scene_of("dog"), ["a dog", "fresh water"]),
        (scene_of("elephant"), ["an elephant", "keep a good distance"]),
        (scene_of("person", "suitcase"), ["suitcases", "on the way"]),
        (scene_of("laptop"), ["a laptop", "stays open"]),
        (scene_of("cube", "ball", "cone"), ["So the order is: the cube, the ball and the cone."]),
        (scene_of("cube", "cube", "cube", "ball"), ["Three minus one is two, so the cubes lead by two."]),
    ],
)
def test_reasoning_names_its_evidence(context: Context, words: list[str]) -> None:
    turns = [t for c in (*TOPICAL, *GENERAL) if (t := c(Scene(context), random.Random(0)))]
    assert any(any(word in answer for word in words) for _, answer in turns)
    if context is KITCHEN:
        assert all(word in turns[0][1] for word in words)


def test_two_settings_that_fit_equally_give_no_conclusion() -> None:
    assert where_it_is(Scene(scene_of("oven", "toilet", "sink")), random.Random(0)) is None
    assert where_it_is(Scene(scene_of("knife", "sink")), random.Random(0)) is None


def test_toys_need_no_care() -> None:
    likeness = scene_of("giraffe", "cow", captions=("Some toy animals on the floor.",))
    for conclude in TOPICAL:
        assert conclude(Scene(likeness), random.Random(0)) is None


def test_order_is_not_told_where_it_is_close() -> None:
    close = scene_of("cube", "ball", "cone")
    close.boxes[1] = replace(close.boxes[1], x=8)
    assert which_order(Scene(close), random.Random(0)) is None


def test_too_little_is_refused_with_a_reason() -> None:
    teacher, rng = TemplateTeacher(), random.Random(0)
    empty = Context(1, "1.jpg", 10, 10)
    for kind, reason in (
        ("conversation", "neither captions nor boxes"),
        ("detail", "no boxes"),
        ("reasoning", "no boxes"),
    ):
        with pytest.raises(NotEnoughError, match=reason):
            teacher.answer(empty, kind, rng)
    with pytest.raises(NotEnoughError, match="no conclusion"):
        teacher.answer(replace(empty, boxes=[box("cube", 1, 1, 5, 5)]), "reasoning", rng)
    with pytest.raises(ValueError, match="unknown kind"):
        teacher.answer(STREET, "poem", rng)


def test_captions_alone_give_a_conversation() -> None:
    context = replace(STREET, boxes=[], categories=())
    turns = TemplateTeacher().answer(context, "conversation", random.Random(0))
    assert len(turns) == 1
    assert "dog" in turns[0][1]


def test_the_list_of_objects_comes_last() -> None:
    """Before the other questions it would answer them."""
    for seed in range(20):
        turns = TemplateTeacher().answer(STREET, "conversation", random.Random(seed))
        assert re.match(r"(Which objects|What things|Can you list|Name the)", turns[-1][0])
        assert not any(re.match(r"(Which objects|What things)", q) for q, _ in turns[:-1])


def test_wording_varies() -> None:
    assert len({answer for seed in range(60) for _, _, answer in answers(STREET, seed)}) > 80


# --- Files -----------------------------------------------------------------------------------------

MANY = [replace(STREET, image_id=i, file_name=f"{i}.jpg") for i in range(6)]
MANY.insert(2, Context("empty", "e.jpg", 10, 10))


def run(output: Path, contexts=MANY, seed: int = 0, kinds=KINDS, **options: Any):
    return generate(contexts, TEACHERS["template"](), kinds, output, seed, progress=False, **options)


def test_rows_are_in_our_schema(tmp_path: Path) -> None:
    summary = run(tmp_path / "deep" / "out.jsonl", image_folder="train/")
    assert json.loads(json.dumps(asdict(summary), default=str))["rows"]["detail"] == 6
    assert summary.rows == {"conversation": 6, "detail": 6, "reasoning": 6}
    assert summary.skipped == {
        "conversation: neither captions nor boxes": 1,
        "detail: no boxes": 1,
        "reasoning: no boxes": 1,
    }
    rows = open_rows(tmp_path / "deep" / "out.jsonl")
    assert [row["id"] for row in rows][:3] == ["0-conversation", "0-detail", "0-reasoning"]
    for row in rows:
        assert images_of(row["messages"]) == [f"train/{row['id'].split('-')[0]}.jpg"]
        assert message_text(row["messages"][0]).startswith("\n")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out.jsonl"]


def test_a_row_depends_on_its_image_and_the_seed_alone(tmp_path: Path) -> None:
    def lines(name: str, **options: Any) -> list[str]:
        run(tmp_path / name, **options)
        return (tmp_path / name).read_text().splitlines()

    first = lines("a")
    assert lines("b") == first
    assert sorted(lines("c", contexts=MANY[::-1])) == sorted(first)
    assert set(lines("d", contexts=MANY[3:4], kinds=["detail"])) < set(first)
    asked = {message_text(row["messages"][0]) for row in open_rows(tmp_path / "a")}
    assert len(asked) > 6  # equal scenes of six images are not worded the same
    changed = lines("e", seed=1)
    assert len(changed) == len(first)
    assert not set(changed) & set(first)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    run(whole)
    data = whole.read_bytes()
    output = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    for cut in (0, 10, len(data) // 3, len(data) // 2, len(data) - 1, len(data)):
        partial.write_bytes(data[:cut])
        summary = run(output)
        assert output.read_bytes() == data
        assert summary.resumed == data[:cut].count(b"\n")
        assert not partial.exists()
        assert sum(summary.rows.values()) == 18


@pytest.mark.parametrize("change", ["seed", "annotation", "more", "less", "garbage"])
def test_rows_of_another_run_are_made_again(tmp_path: Path, change: str) -> None:
    whole = tmp_path / "whole.jsonl"
    run(whole)
    partial = tmp_path / "out.jsonl.partial"
    lines = whole.read_bytes().splitlines(keepends=True)
    resumed = 0
    if change == "seed":
        run(tmp_path / "other.jsonl", seed=5)
        partial.write_bytes((tmp_path / "other.jsonl").read_bytes())
    elif change == "annotation":
        moved = [replace(c, captions=[*c.captions, "A new caption."]) for c in MANY]
        run(tmp_path / "other.jsonl", contexts=moved)
        partial.write_bytes((tmp_path / "other.jsonl").read_bytes())
    elif change == "more":
        partial.write_bytes(b"".join(lines) + lines[0] * 3)
        resumed = 18
    elif change == "less":
        partial.write_bytes(b"".join(lines[:4] + lines[5:]))
        resumed = 4
    else:
        partial.write_bytes(b"".join(lines[:4]) + b"\x00\xff garbage\n" + lines[4])
        resumed = 4
    summary = run(tmp_path / "out.jsonl")
    assert summary.resumed == resumed
    assert (tmp_path / "out.jsonl").read_bytes() == whole.read_bytes()


SLOW_RUN = """
import sys, time
sys.path.insert(0, {tests!r})
import test_generate as t
from data_gen.generate import generate

class Slow:
    name = "template"
    def answer(self, context, kind, rng):
        time.sleep(0.2)
        return t.TemplateTeacher().answer(context, kind, rng)

generate(t.MANY, Slow(), t.KINDS, {output!r}, 0, progress=False)
"""


def test_kill_and_rerun_gives_the_same_file(tmp_path: Path) -> None:
    run(tmp_path / "whole.jsonl")
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    code = SLOW_RUN.format(tests=str(Path(__file__).parent), output=str(output))
    process = subprocess.Popen([sys.executable, "-c", code])
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > 0):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    summary = run(output)
    assert 0 < summary.resumed < 18
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_failing_teacher_leaves_no_output(tmp_path: Path) -> None:
    class Fails:
        name = "template"

        def answer(self, context, kind, rng):
            if context.image_id == 4:
                raise RuntimeError("no luck")
            return TemplateTeacher().answer(context, kind, rng)

    with pytest.raises(RuntimeError, match="no luck"):
        generate(MANY, Fails(), KINDS, tmp_path / "out.jsonl", 0, progress=False)
    assert not (tmp_path / "out.jsonl").exists()
    assert run(tmp_path / "out.jsonl").resumed == 12


def test_nothing_to_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no context gives a row: detail: no boxes \(1\)"):
        run(tmp_path / "out.jsonl", contexts=[MANY[2]], kinds=["detail"])
    with pytest.raises(DataError, match="no contexts"):
        run(tmp_path / "out.jsonl", contexts=[])
    for kinds in (["poem"], [], ["detail", "detail"]):
        with pytest.raises(ConfigError, match="use some of conversation, detail, reasoning"):
            run(tmp_path / "out.jsonl", kinds=kinds)
    assert list(tmp_path.iterdir()) == []


@needs_coco
def test_real_photos(tmp_path: Path) -> None:
    folder = COCO / "annotations"
    found = read_coco(folder / "captions_train2017.json", folder / "instances_train2017.json")
    assert len(found) == 50
    summary = run(tmp_path / "instruct.jsonl", contexts=found)
    assert summary.rows["conversation"] == 50
    assert summary.rows["detail"] >= 45
    assert summary.rows["reasoning"] >= 35
    assert sum(summary.rows.values()) + sum(summary.skipped.values()) == 150
    rows = open_rows(tmp_path / "instruct.jsonl", image_root=COCO / "train2017", check_images=True)
    assert len(list(rows)) == sum(summary.rows.values())
