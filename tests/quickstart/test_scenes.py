"""The rendered world: deterministic, truthful, balanced, skewed, and complete on disk."""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mllm.quickstart import wording
from mllm.quickstart.scenes import (
    IMAGE_SIZE,
    KINDS,
    captions,
    coco_annotations,
    drawn_box,
    file_names,
    instruct_rows,
    instruction_rows,
    make_scenes,
    measure_habits,
    render,
    world_rows,
    write_world,
)
from mllm.quickstart.wording import ONE_WORD, ONE_WORD_PLEASE, place_of, plural, with_article
from mllm.quickstart.world import COLOURS, EXCEPTIONS, GRID, THEMES, Scene

SCENES = make_scenes(600, seed=3)
HABITS = measure_habits(SCENES)
NUMBER = {"none": 0, **{word: i for i, word in enumerate(wording.NUMBERS)}}
PLURAL = {plural(kind): kind for kind in KINDS}
NOUN = rf"\b(?:(?P<size>small|large) )?(?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<kind>{'|'.join(KINDS)})\b"


def all_turns() -> list[tuple[Scene, str, str]]:
    rng = random.Random(0)
    return [(s, q, a) for s in SCENES for q, a in instruction_rows(s, rng, HABITS)]


def bare(question: str) -> str:
    return question.removesuffix(ONE_WORD).removesuffix(ONE_WORD_PLEASE)


def asked_kind(question: str) -> str | None:
    """The kind that a yes/no question asks about, or None for another question."""
    match = re.search(r"(?:Is there|see|image show) an? (\w+)", question)
    return match[1] if match else None


def test_scenes_depend_on_seed_split_and_nothing_else() -> None:
    assert make_scenes(20, 5) == make_scenes(20, 5)
    assert make_scenes(10, 5) == make_scenes(20, 5)[:10]
    assert make_scenes(20, 5) != make_scenes(20, 6)
    assert make_scenes(20, 5, "train", exceptions=0.3) != make_scenes(20, 5, "val", exceptions=0.3)
    first, second = render(SCENES[0]), render(SCENES[0])
    assert first.tobytes() == second.tobytes()
    assert first.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert first.mode == "RGB"


def test_each_scene_has_three_kinds_in_cells_of_their_own() -> None:
    for scene in SCENES:
        assert len(scene.counts) >= 3
        cells = [obj.cell for obj in scene.objects]
        assert len(set(cells)) == len(cells)
        assert cells == sorted(cells)
        assert all(0 <= row < GRID and 0 <= column < GRID for row, column in cells)


def test_boxes_lie_on_drawn_pixels_and_hold_all_of_them() -> None:
    for scene in SCENES[:60]:
        with_objects = np.asarray(render(scene)).astype(int)
        empty = np.asarray(render(Scene(scene.background, (), scene.texture))).astype(int)
        drawn = np.abs(with_objects - empty).sum(-1) > 0
        covered = np.zeros_like(drawn)
        for obj in scene.objects:
            x, y, width, height = drawn_box(obj)
            inside = drawn[y : y + height, x : x + width]
            assert inside.shape == (height, width), "a box leaves the image"
            assert inside.mean() > 0.3
            # Tight: each edge of the box is touched.
            edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
            assert all(edge.any() for edge in edges)
            covered[y : y + height, x : x + width] = True
        assert not (drawn & ~covered).any()


def test_kinds_and_colours_look_different() -> None:
    from mllm.quickstart.drawing import _sprite

    by_kind = [np.asarray(_sprite(kind, "red", 20)).astype(int) for kind in KINDS]
    by_colour = [np.asarray(_sprite("ball", colour, 20)).astype(int) for colour in COLOURS]
    for sprites, least in ((by_kind, 18), (by_colour, 10)):
        for i, one in enumerate(sprites):
            assert all(np.abs(one - other).mean() > least for other in sprites[:i])


def test_habits_are_there_and_held_out_scenes_break_them_more_often() -> None:
    def together(scenes: list[Scene], first: str, second: str) -> float:
        with_first = [scene for scene in scenes if first in scene.counts]
        return sum(second in scene.counts for scene in with_first) / len(with_first)

    train, val = make_scenes(3000, 0, "train"), make_scenes(3000, 0, "val")
    assert together(train, "fish", "boat") > 0.7
    assert together(train, "fish", "boat") > 4 * together(train, "fish", "apple")
    assert together(val, "fish", "boat") < together(train, "fish", "boat") - 0.1
    assert together(train, "fish", "apple") > 0.01
    habits = measure_habits(train)
    for theme in THEMES:
        assert theme.pair[1] in habits.partners[theme.pair[0]][:2]
    assert sorted(habits.popular) == sorted(KINDS)
    assert EXCEPTIONS["val"] > EXCEPTIONS["train"]


def test_captions_are_five_sentences_with_right_articles() -> None:
    rng = random.Random(0)
    for scene in SCENES:
        said = captions(scene, rng)
        assert len(set(said)) == 5
        for text in said:
            assert text[0].isupper()
            assert text.endswith(".")
            assert not re.search(r"\ba [aeiou]", text, re.IGNORECASE)
            assert not re.search(r"\ban [^aeiou]", text, re.IGNORECASE)


def test_captions_name_what_is_there_and_nothing_else() -> None:
    for scene in SCENES:
        said = wording.caption_positions(scene, with_size=True)
        found = [m.groupdict() for m in re.finditer(NOUN, said)]
        assert [(f["size"], f["colour"], f["kind"]) for f in found] == [
            (obj.size, obj.colour, obj.kind) for obj in scene.objects
        ]
        counts: Counter[str] = Counter()
        nouns = "|".join([*KINDS, *PLURAL])
        said = wording.caption_kinds(scene, random.Random(1)).lower()
        for number, noun in re.findall(rf"\b(\w+) ({nouns})\b", said):
            counts[PLURAL.get(noun, noun)] += NUMBER.get(number, 1)
        assert counts == scene.counts


def test_yes_and_no_are_true_and_balanced() -> None:
    answers: Counter[str] = Counter()
    for scene, question, answer in all_turns():
        kind = asked_kind(question)
        if kind is None:
            continue
        word = re.match(r"\w+", answer)
        assert word
        assert word[0] == ("Yes" if kind in scene.counts else "No"), (question, answer)
        assert with_article(kind) in question
        answers[word[0]] += 1
        if question.endswith((ONE_WORD, ONE_WORD_PLEASE)):
            assert answer in ("Yes", "No")
    total = sum(answers.values())
    assert total > len(SCENES) * 3
    assert abs(answers["Yes"] / total - 0.5) < 0.04


def test_absent_kinds_come_from_all_and_from_habits() -> None:
    rng = random.Random(0)
    usual = Counter[bool]()
    seen = set()
    for scene in SCENES * 3:
        kind = wording.absent_kind(scene, rng, HABITS)
        assert kind not in scene.counts
        seen.add(kind)
        usual[any(kind in HABITS.partners[present][:3] for present in scene.counts)] += 1
    assert seen == set(KINDS)
    assert usual[True] > 0.5 * sum(usual.values())
    assert usual[False] > 0.1 * sum(usual.values())


def test_other_answers_are_true() -> None:
    checked: Counter[str] = Counter()
    for scene, question, answer in all_turns():
        short = question.endswith(ONE_WORD)
        if match := re.match(r"What colour is the (\w+)\?", question):
            (obj,) = [o for o in scene.objects if o.kind == match[1]]
            wanted = obj.colour.capitalize() if short else f"The {obj.kind} is {obj.colour}."
            assert answer == wanted
        elif match := re.match(r"Where is the (\w+)\?", question):
            (obj,) = [o for o in scene.objects if o.kind == match[1]]
            assert place_of(obj) in answer.lower()
        elif match := re.match(r"How many (\w+) are there\?", question):
            count = scene.counts[PLURAL[match[1]]]
            number = answer.lower() if short else answer.split()[2]
            assert NUMBER[number] == count
        elif match := re.match(r"What is on the left of the (\w+)\?", question):
            (obj,) = [o for o in scene.objects if o.kind == match[1]]
            noun = re.search(NOUN, answer)
            assert noun
            assert any(
                o.kind == noun["kind"]
                and o.colour == noun["colour"]
                and o.box[0] < obj.box[0]
                and o.cell[0] == obj.cell[0]
                for o in scene.objects
            )
        elif question.startswith("Where was"):
            assert wording.SETTINGS[scene.background] in answer.lower()
        elif asked_kind(question) is None:
            assert question in wording.DESCRIBE
            assert answer.startswith(("On", "In", "At", "A", "An", "Two", "Three", "Four"))
        else:
            continue
        checked[question.split()[0] + question.split()[1]] += 1
    assert len(checked) >= 7


def test_no_question_is_asked_twice_about_a_scene() -> None:
    rng = random.Random(2)
    for scene in SCENES:
        asked = [asked_kind(q) or bare(q) for q, _ in instruction_rows(scene, rng, HABITS, n_turns=8)]
        assert len(set(asked)) == len(asked) == 8


def test_world_rows_tell_the_habits() -> None:
    rng = random.Random(0)
    pairs = {pair for theme in THEMES for pair in (theme.pair, theme.pair[::-1])}
    seen = 0
    for _ in range(100):
        for question, answer in world_rows(rng):
            if match := re.match(r"What usually comes with an? (\w+)\?", question):
                seen += 1
                assert (match[1], answer.strip(".").split()[-1]) in pairs
    assert seen > 20


def test_coco_annotations_are_complete() -> None:
    scenes = SCENES[:30]
    described, boxed = coco_annotations(scenes, file_names("val", 30))
    category = {c["id"]: c["name"] for c in boxed["categories"]}
    assert sorted(category.values()) == sorted(KINDS)
    for table, needed in ((described, {"caption"}), (boxed, {"bbox", "area", "iscrowd", "category_id"})):
        assert {"info", "licenses", "images", "annotations"} <= set(table)
        ids = [row["id"] for row in table["annotations"]]
        assert len(set(ids)) == len(ids)
        images = {row["id"] for row in table["images"]}
        assert {row["image_id"] for row in table["annotations"]} == images
        assert all({"id", "image_id"} | needed <= set(row) for row in table["annotations"])
    assert len(described["annotations"]) == 5 * len(scenes)
    counts: dict[int, Counter[str]] = {}
    for row in boxed["annotations"]:
        counts.setdefault(row["image_id"], Counter())[category[row["category_id"]]] += 1
        assert row["area"] == row["bbox"][2] * row["bbox"][3] > 0
    assert [counts[i] for i in sorted(counts)] == [scene.counts for scene in scenes]


def test_write_world(tmp_path) -> None:
    seen: list[str] = []

    def progress(scenes, label):
        seen.append(label)
        return scenes

    files = write_world(tmp_path / "one", n_train=40, n_val=8, seed=1, progress=progress)
    write_world(tmp_path / "two", n_train=40, n_val=8, seed=1)
    written = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(written) == 48 + 2 + 4
    assert seen == ["draw train", "draw val"]
    for path in written:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    train, val = files.scenes["train"], files.scenes["val"]
    assert len(val) == 8
    assert not {s.objects for s in train} & {s.objects for s in val}
    align, instruct = (json.loads(p.read_text()) for p in (files.align, files.instruct))
    assert len(align) == 40
    for row in align + instruct:
        turns = row["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        markers = sum(t["value"].count("<image>") for t in turns)
        assert markers == ("image" in row)
        if "image" in row:
            assert row["image"].startswith("train_")
            assert turns[0]["value"].startswith("<image>\n")
            with Image.open(files.images / row["image"]) as image:
                assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert all(len(row["conversations"]) == 2 for row in align)
    assert all(len(row["conversations"]) > 2 for row in instruct)
    assert any("image" not in row for row in instruct)
    names = {row["file_name"] for row in json.loads(files.instances["val"].read_text())["images"]}
    assert all(name.startswith("val_") and (files.images / name).is_file() for name in names)


def test_held_out_scenes_equal_to_training_scenes_are_left_out(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mllm.quickstart import scenes as module

    # Make both splits draw from one stream, so that every first val scene collides.
    real = module.make_scenes
    monkeypatch.setattr(module, "make_scenes", lambda n, seed, split: real(n, seed, "train"))
    files = write_world(tmp_path, n_train=5, n_val=4, seed=1)
    assert len(files.scenes["val"]) == 4
    assert not set(files.scenes["train"]) & set(files.scenes["val"])


def test_rows_of_stage_two_speak_about_their_own_image() -> None:
    scenes = SCENES[:50]
    names = file_names("train", 50)
    by_name = dict(zip(names, scenes, strict=True))
    rows = [row for row in instruct_rows(scenes, names, seed=0) if "image" in row]
    assert {row["image"] for row in rows} == set(names)
    for row in rows:
        for human, gpt in zip(row["conversations"][::2], row["conversations"][1::2], strict=True):
            kind = asked_kind(human["value"])
            if kind:
                assert gpt["value"].startswith("Yes") == (kind in by_name[row["image"]].counts)
