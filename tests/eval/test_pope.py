"""POPE: building, loading, prompts, the two scoring rules, matching, and the tables over runs."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.compare import four_columns, summarise
from eval.records import read_predictions, to_lines
from eval.score import means, score
from eval.tasks import pope
from eval.tasks.pope_build import question_about, select_images
from mllm.errors import ConfigError, DataError

DATA = Path(os.environ.get("MLLM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
official_files = pytest.mark.skipif(not (DATA / "pope").is_dir(), reason=f"no POPE files in {DATA}")
coco_tiny = pytest.mark.skipif(not (DATA / "coco_tiny").is_dir(), reason=f"no coco_tiny in {DATA}")

# (answer, official says yes, VCD says yes where gold is yes, VCD says yes where gold is no, unparsed,
# ambiguous), worked out by hand from the two scripts.
GOLDEN = [
    ("Yes.", True, True, True, False, False),
    ("yes", True, True, True, False, False),
    ("No", False, False, False, False, False),
    ("no", False, False, False, False, False),
    ("no.", False, False, False, False, False),
    ("No, there is not.", False, False, False, False, False),
    ("maybe", True, False, True, True, False),
    ("No, but yes", False, True, False, False, True),
    ("yes, no", False, True, False, False, True),
    ("", True, False, True, True, False),
    ("NO", True, False, False, False, False),  # not one of the official words; VCD lower-cases
    ("no\n", True, False, False, False, False),  # only single spaces part words
    ("There isn't", True, False, True, True, False),
    ("There is not", False, False, False, False, False),
    ("I know", True, False, False, True, False),  # "no" inside "know"
    ("nope", True, False, False, True, False),
    ("It is a dog. no", True, False, False, False, False),  # the first sentence only
    (".no", True, False, False, False, False),
    ("n,o", False, False, True, True, False),  # commas are deleted before the words are read
    ("eyes", True, True, True, True, False),
    ("Not at all", True, False, False, False, False),  # "Not" is not in the official list, "not" is
]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text(to_lines(rows), encoding="utf-8")
    return path


def instances(path: Path, images: list[list[str]]) -> Path:
    """COCO-style annotations; each image is its list of objects, repeats allowed."""
    names = sorted({o for objects in images for o in objects})
    content = {
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 10)],
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(len(images))],
        "annotations": [
            {"id": 100 * i + j, "image_id": i, "category_id": names.index(o) + 10}
            for i, objects in enumerate(images)
            for j, o in enumerate(objects)
        ],
    }
    path.write_text(json.dumps(content))
    return path


# ------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(("answer", "official", "vcd_yes", "vcd_no", "unparsed", "ambiguous"), GOLDEN)
def test_one_answer_by_each_rule(answer, official, vcd_yes, vcd_no, unparsed, ambiguous):
    for rule, label, said_yes in (
        ("official", "yes", official),
        ("official", "no", official),
        ("vcd", "yes", vcd_yes),
        ("vcd", "no", vcd_no),
    ):
        got = pope.score([label], [answer], rule)
        cell = {"yes": {True: "tp", False: "fn"}, "no": {True: "fp", False: "tn"}}[label][said_yes]
        counts = {k: got[k] for k in ("tp", "fp", "tn", "fn")}
        assert counts == {"tp": 0, "fp": 0, "tn": 0, "fn": 0} | {cell: 1}, (rule, label)
        assert got["unparsed"] == unparsed
        assert got["ambiguous"] == ambiguous


def test_metrics_by_hand():
    labels = ["yes"] * 4 + ["no"] * 6
    answers = ["Yes", "yes", "Yes.", "No", "No", "no", "No.", "no", "Yes", "perhaps"]
    got = pope.score(labels, answers)  # TP 3, FN 1, TN 4, FP 2 ("perhaps" is a yes)
    assert (got["tp"], got["fn"], got["tn"], got["fp"]) == (3, 1, 4, 2)
    assert got["accuracy"] == 0.7
    assert got["precision"] == 3 / 5
    assert got["recall"] == 3 / 4
    assert got["f1"] == pytest.approx(2 / 3)
    assert got["yes_ratio"] == 0.5
    assert (got["n"], got["unparsed"], got["notes"]) == (10, 1, [])
    low, high = got["accuracy_ci95"]  # Wilson for 7 of 10, as tabled: 0.397 to 0.892
    assert (round(low, 3), round(high, 3)) == (0.397, 0.892)


def test_nothing_answered_yes_is_zero_with_a_note():
    got = pope.score(["yes", "no"], ["no", "no"])
    assert (got["precision"], got["recall"], got["f1"], got["accuracy"]) == (0.0, 0.0, 0.0, 0.5)
    assert any("precision" in note for note in got["notes"])
    assert pope.score(["no"], ["no"])["recall"] == 0.0


@pytest.mark.parametrize(
    ("labels", "answers", "rule", "error"),
    [
        ([], [], "official", DataError),
        (["yes"], [], "official", DataError),
        (["Yes"], ["yes"], "official", DataError),
        (["yes"], ["yes"], "lmms", ConfigError),
    ],
)
def test_score_refuses(labels, answers, rule, error):
    with pytest.raises(error):
        pope.score(labels, answers, rule)


@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.text()), min_size=1))
def test_counts_add_up(rows):
    labels, answers = zip(*rows, strict=True)
    for rule in pope.RULES:
        got = pope.score(labels, answers, rule)
        assert got["tp"] + got["fn"] == labels.count("yes")
        assert got["fp"] + got["tn"] == labels.count("no")
        low, high = got["accuracy_ci95"]
        assert 0 <= low <= got["accuracy"] <= high <= 1


# --------------------------------------------------------------------------------------------- prompts


def test_prompts():
    question = "Is there a dog in the image?"
    assert pope.prompt(question, "llava") == question + "\nAnswer the question using a single word or phrase."
    assert pope.prompt(question, "vcd") == question + " Please answer this question with one word."
    assert pope.prompt(question, "plain") == question
    # LLaVA's question file has the suffix already.
    assert pope.prompt(pope.prompt(question, "llava"), "llava") == pope.prompt(question, "llava")
    assert pope.prompt(pope.prompt(question, "llava"), "vcd") == pope.prompt(question, "vcd")
    with pytest.raises(ConfigError, match="llava, vcd, plain"):
        pope.prompt(question, "LLaVA")


# ---------------------------------------------------------------------------------------------- build

WORLD = [
    ["cat", "sofa", "tv", "cat"],
    ["cat", "sofa", "lamp"],
    ["dog", "sofa", "apple", "tv"],
    ["dog", "car", "bus"],
    ["car", "bus", "oven"],
    ["cat", "tv", "lamp", "sofa"],
    ["cat", "dog"],
]


def objects_in(world: list[list[str]], image: str) -> set[str]:
    return set(world[int(image.removesuffix(".jpg"))])


@pytest.mark.parametrize("split", pope.SPLITS)
@pytest.mark.parametrize("seed", range(5))
def test_build_is_balanced_true_and_seeded(tmp_path, split, seed):
    file = instances(tmp_path / "i.json", WORLD)
    rows = pope.build(file, split, n_images=500, n_per_image=6, seed=seed)
    assert rows == pope.build(file, split, n_images=500, n_per_image=6, seed=seed)
    assert len(rows) == 6 * 6  # the image with two kinds does not qualify
    assert [r["question_id"] for r in rows] == list(range(1, len(rows) + 1))
    per_image = Counter((r["image"], r["label"]) for r in rows)
    assert set(per_image.values()) == {3}
    assert len({(r["image"], r["text"]) for r in rows}) == len(rows)
    for row in rows:
        thing = pope.asked_object(row["text"])
        assert (thing in objects_in(WORLD, row["image"])) == (row["label"] == "yes")
        article = "an" if thing in ("apple", "oven") else "a"
        assert row["text"] == f"Is there {article} {thing} in the image?"


def test_splits_share_images_and_positives(tmp_path):
    file = instances(tmp_path / "i.json", WORLD)
    positives = [[r for r in pope.build(file, s, 4, 4, 3) if r["label"] == "yes"] for s in pope.SPLITS]
    assert positives[0] == positives[1] == positives[2]
    assert len({r["image"] for r in positives[0]}) == 4
    images = [tuple(r["image"] for r in pope.build(file, "popular", 4, 4, seed)) for seed in range(20)]
    assert len(set(images)) > 1


def test_negatives_follow_the_rule(tmp_path):
    world = [
        ["cat", "sofa", "tv"],
        ["cat", "sofa", "lamp"],
        ["cat", "sofa", "lamp"],
        ["car", "bus", "dog"],
        ["car", "bus", "dog"],
        ["car", "bus", "dog"],
        ["car", "bus", "oven"],
    ]
    file = instances(tmp_path / "i.json", world)

    def negatives(split: str, image: str) -> list[str]:
        rows = [r for r in pope.build(file, split) if r["image"] == image]
        return [str(pope.asked_object(r["text"])) for r in rows if r["label"] == "no"]

    # Frequencies: car 4, bus 4, then dog, cat and sofa 3; an absent kind is asked once only.
    popular = negatives("popular", "0.jpg")
    assert set(popular[:2]) == {"car", "bus"}
    assert popular[2] == "dog"
    # Beside the first positive, cat, only lamp is absent; then cat, sofa and tv have no absent company
    # left, and an even draw takes over.
    adversarial = negatives("adversarial", "0.jpg")
    assert adversarial[0] == "lamp"
    assert set(adversarial[1:]) <= {"car", "bus", "dog", "oven"}
    # Beside car: dog, three times.
    assert negatives("adversarial", "6.jpg")[0] == "dog"
    drawn = Counter(
        pope.asked_object(r["text"])
        for seed in range(200)
        for r in pope.build(file, "random", seed=seed)
        if r["image"] == "0.jpg" and r["label"] == "no"
    )
    assert set(drawn) == {"lamp", "car", "bus", "dog", "oven"}
    assert min(drawn.values()) > 0.7 * 120  # 600 draws over five absent kinds


def test_build_reports_what_it_left_out(tmp_path):
    file = instances(tmp_path / "i.json", WORLD)
    summary = pope.write(file, tmp_path / "out", n_images=500, seed=1)
    assert (summary["images_requested"], summary["images_used"], summary["images_qualified"]) == (500, 6, 6)
    assert (summary["images_with_too_few_objects"], summary["images_with_too_few_absent_objects"]) == (1, 0)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "pope_adversarial.jsonl",
        "pope_popular.jsonl",
        "pope_random.jsonl",
        "pope_summary.json",
    ]
    assert json.loads((tmp_path / "out" / "pope_summary.json").read_text()) == summary
    for split in pope.SPLITS:
        path = tmp_path / "out" / f"pope_{split}.jsonl"
        assert [json.loads(line) for line in path.read_text().splitlines()] == pope.build(file, split, seed=1)
        assert summary["files"][split]["sha256"] == pope.identify(path)[0]
        assert len(pope.load(path)) == summary["files"][split]["rows"] == 36


def test_an_image_with_nearly_everything_is_left_out(tmp_path):
    file = instances(tmp_path / "i.json", [["a", "b", "c", "d"], ["a", "b", "c"], ["d", "e", "f"]])
    chosen = select_images(file, 500, 6, random.Random(0))
    assert chosen.too_few_absent == 1  # the first lacks e and f only
    assert {name for name, _ in chosen.images} == {"1.jpg", "2.jpg"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("categories"), "categories"),
        (lambda d: d["annotations"][0].update(category_id=99), r"annotations\[0\].category_id 99"),
        (lambda d: d["annotations"][1].update(image_id=99), r"annotations\[1\].image_id 99"),
        (lambda d: d["images"][2].pop("file_name"), r"images\[2\].file_name"),
        (lambda d: d["images"][2].update(id=1), "twice"),
        (lambda d: d["annotations"].clear(), "no image has 3 kinds"),
    ],
)
def test_bad_annotations_are_named(tmp_path, change, message):
    content = json.loads(instances(tmp_path / "i.json", WORLD).read_text())
    change(content)
    (tmp_path / "i.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        pope.write(tmp_path / "i.json", tmp_path / "out")
    assert "i.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_build_refuses_odd_numbers_and_unknown_splits(tmp_path):
    file = instances(tmp_path / "i.json", WORLD)
    for arguments in (
        {"split": "hard"},
        {"split": "random", "n_per_image": 5},
        {"split": "random", "n_images": 0},
    ):
        with pytest.raises(ConfigError):
            pope.build(file, **arguments)


# ---------------------------------------------------------------------------------------------- load


def question_rows(n: int = 6) -> list[dict]:
    things = ["dog", "cat", "apple", "car", "bus", "sofa"]
    return [
        {
            "question_id": i + 1,
            "image": f"{i // 2}.jpg",
            "text": f"Is there a {things[i % 6]} in the image?",
            "label": "yes" if i % 2 == 0 else "no",
        }
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":3: not JSON"),
        ("[1]", r":3: a row must be a JSON object"),
        ('{"question_id": 3, "image": "a.jpg", "text": "?"}', ":3: field 'label'"),
        ('{"question_id": 3, "image": "a.jpg", "text": "?", "label": "Yes"}', ":3: field 'label'"),
        ('{"question_id": 3, "image": "", "text": "?", "label": "no"}', ":3: field 'image'"),
        ('{"question_id": 3, "image": "a.jpg", "text": 4, "label": "no"}', ":3: field 'text'"),
        ('{"image": "a.jpg", "text": "?", "label": "no"}', ":3: field 'question_id'"),
        (
            '{"question_id": 1, "image": "a.jpg", "text": "?", "label": "no"}',
            ":3: question_id 1 stands at",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "q.jsonl", question_rows(2))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        pope.load(path)
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"no.jsonl: cannot be read"):
        pope.load(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no rows"):
        pope.load(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(DataError, match="UTF-8"):
        pope.load(tmp_path / "latin.jsonl")


def test_texts_are_untouched_in_lines_and_lists(tmp_path):
    rows = question_rows(2)
    rows[0]["text"] = "Is there an umbrella in the imange?\u2028"
    lines = write_lines(tmp_path / "q.jsonl", rows)
    listed = tmp_path / "q.json"
    listed.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, indent=4).encode())
    for path in (lines, listed):
        assert [q.text for q in pope.load(path)] == [r["text"] for r in rows]
        assert pope.identify(path)[1] is None
    assert pope.asked_object(rows[0]["text"]) == "umbrella"


@official_files
@pytest.mark.parametrize("split", pope.SPLITS)
def test_the_official_files(split):
    path = DATA / "pope" / f"coco_pope_{split}.json"
    questions = pope.load(path)
    assert len(questions) == 3000
    assert Counter(q.label for q in questions) == {"yes": 1500, "no": 1500}
    assert all(pope.asked_object(q.text) for q in questions)
    name = pope.identify(path)[1]
    assert name is not None
    assert name.startswith(f"POPE COCO {split}")


@official_files
def test_our_grammar_is_the_official_one():
    texts = {q.text for q in pope.load(DATA / "pope" / "coco_pope_random.json")}
    differ = {text for text in texts if question_about(str(pope.asked_object(text))) != text}
    assert differ == {"Is there an traffic light in the image?"}  # a slip of the published file


@coco_tiny
@pytest.mark.parametrize("split", pope.SPLITS)
def test_build_on_real_annotations(split):
    file = DATA / "coco_tiny" / "annotations" / "instances_val2017.json"
    rows = pope.build(file, split)
    content = json.loads(file.read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    files = {m["id"]: m["file_name"] for m in content["images"]}
    truth = {(files[a["image_id"]], names[a["category_id"]]) for a in content["annotations"]}
    assert len(rows) >= 6 * 10
    assert len(rows) % 6 == 0
    for row in rows:
        present = (row["image"], pope.asked_object(row["text"])) in truth
        assert present == (row["label"] == "yes")


# --------------------------------------------------------------------------------------- whole files

ANSWERS = ["Yes", "No", "No", "yes", "Yes, it is", "maybe"]  # TP TN FN FP TP FP


def as_ours(q: dict, a: str) -> dict:
    return {"question_id": q["question_id"], "image": q["image"], "prompt": f"USER: <image>{q['text']}",
            "question": q["text"], "answer": a, "label": q["label"]}  # fmt: skip


def as_llava(q: dict, a: str) -> dict:
    return {"question_id": q["question_id"], "prompt": pope.prompt(q["text"], "llava"), "text": a,
            "answer_id": "x", "model_id": "m", "metadata": {}}  # fmt: skip


def as_vcd(q: dict, a: str) -> dict:
    return {"question_id": q["question_id"], "prompt": q["text"], "text": a, "model_id": "m",
            "image": q["image"], "metadata": {}}  # fmt: skip


def as_official(q: dict, a: str) -> dict:
    return {"question": q["text"].lower(), "answer": a}


def as_annotated_question(q: dict, a: str) -> dict:
    return {**q, "response": a}


@pytest.mark.parametrize("style", [as_ours, as_llava, as_vcd, as_official, as_annotated_question])
@pytest.mark.parametrize("listed", [False, True])
def test_every_format_of_predictions(tmp_path, style, listed):
    rows = question_rows()
    questions = write_lines(tmp_path / "coco_pope_popular.json", rows)
    answered = [style(q, a) for q, a in zip(rows, ANSWERS, strict=True)]
    predictions = write_lines(tmp_path / "p.jsonl", answered)
    if listed:
        predictions.write_text(json.dumps(answered, indent=1))
    result = score(predictions, questions)
    assert (result["tp"], result["tn"], result["fn"], result["fp"]) == (2, 1, 1, 2)
    assert result["unparsed"] == 1
    assert result["accuracy"] == 0.5
    assert set(result["splits"]) == {"popular"}
    vcd = result["splits"]["popular"]["vcd"]
    assert (vcd["tp"], vcd["tn"], vcd["fn"], vcd["fp"]) == (2, 1, 1, 2)
    assert result["questions"]["sha256"] == pope.identify(questions)[0]
    assert result["predictions"]["rows"] == 6
    assert result["run"] is None
    assert bool(result["notes"]) == (style is as_official)  # no ids: said so
    json.dumps(result)


def test_rule_is_chosen_and_both_are_given(tmp_path):
    rows = question_rows(2)
    questions = write_lines(tmp_path / "q.jsonl", rows)
    predictions = write_lines(tmp_path / "p.jsonl", [as_vcd(q, "I know") for q in rows])
    official, vcd = score(predictions, questions), score(predictions, questions, "vcd")
    assert (official["tp"], official["fp"]) == (1, 1)
    assert (vcd["fn"], vcd["tn"]) == (1, 1)
    assert official["splits"] == vcd["splits"]
    with pytest.raises(ConfigError):
        score(predictions, questions, "mine")


def test_ids_win_over_order_and_it_is_said(tmp_path):
    rows = question_rows()
    questions = write_lines(tmp_path / "q.jsonl", rows)
    answered = [as_llava(q, a) for q, a in zip(rows, ANSWERS, strict=True)]
    straight = score(write_lines(tmp_path / "a.jsonl", answered), questions)
    turned = score(write_lines(tmp_path / "b.jsonl", answered[::-1]), questions)
    assert turned["splits"] == straight["splits"]
    assert straight["notes"] == []
    assert any("order" in note for note in turned["notes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop(), "q.jsonl:6: question_id 6 has no prediction"),
        (lambda p: p.append(p[0]), "p.jsonl:7: question_id 1 is answered at .*p.jsonl:1 too"),
        (lambda p: p[2].update(question_id=77), "p.jsonl:3: question_id 77 is not in the question file"),
        (lambda p: p[2].pop("question_id"), "p.jsonl:3: field 'question_id' is missing"),
        (lambda p: p[2].update(question_id=None), "p.jsonl:3: field 'question_id' must be"),
        (lambda p: p[3].pop("text"), "p.jsonl:4: no field holds the answer"),
        (lambda p: p[3].update(text=None), "p.jsonl:4: field 'text' must be"),
        (lambda p: p[3].update(answer="a", response="b"), "p.jsonl:4: fields answer and response"),
        (
            lambda p: p[4].update(prompt="Is there a cow in the image?"),
            "p.jsonl:5: is about 'cow'",
        ),
        (lambda p: p[4].update(image="9.jpg"), "p.jsonl:5: is about image '9.jpg'"),
    ],
)
def test_predictions_of_something_else_are_refused(tmp_path, change, message):
    rows = question_rows()
    questions = write_lines(tmp_path / "q.jsonl", rows)
    answered = [as_vcd(q, a) for q, a in zip(rows, ANSWERS, strict=True)]
    change(answered)
    with pytest.raises(DataError, match=message) as caught:
        score(write_lines(tmp_path / "p.jsonl", answered), questions)
    assert "\n" not in str(caught.value)


def test_without_ids_only_the_same_number_in_the_same_order(tmp_path):
    rows = question_rows()
    questions = write_lines(tmp_path / "q.jsonl", rows)
    answered = [as_official(q, a) for q, a in zip(rows, ANSWERS, strict=True)]
    with pytest.raises(DataError, match="5 predictions for 6 questions"):
        score(write_lines(tmp_path / "p.jsonl", answered[:5]), questions)
    with pytest.raises(DataError, match=r"p.jsonl:1: is about 'sofa'"):
        score(write_lines(tmp_path / "p.jsonl", answered[::-1]), questions)
    with pytest.raises(ConfigError, match="use order"):
        score(write_lines(tmp_path / "p.jsonl", answered), questions, match="id")
    with pytest.raises(DataError, match="the answers are the questions"):
        score(write_lines(tmp_path / "p.jsonl", rows), questions)


def test_order_can_be_asked_for_where_ids_are_numbered_otherwise(tmp_path):
    rows = question_rows()
    questions = write_lines(tmp_path / "q.jsonl", rows)
    answered = [as_vcd(q, a) | {"question_id": i} for i, (q, a) in enumerate(zip(rows, ANSWERS, strict=True))]
    predictions = write_lines(tmp_path / "p.jsonl", answered)
    with pytest.raises(DataError, match="question_id 0"):
        score(predictions, questions)
    result = score(predictions, questions, match="order")
    assert result["accuracy"] == 0.5
    assert any("as asked" in note for note in result["notes"])


def llava_case(folder: Path) -> tuple[Path, Path, list[dict]]:
    """LLaVA's layout: one question file over three categories, labels in three other files."""
    questions, n = [], 0
    (folder / "coco").mkdir()
    for category, size in (("adversarial", 6), ("popular", 6), ("random", 4)):
        rows = question_rows(size)
        write_lines(folder / "coco" / f"coco_pope_{category}.json", rows)
        for row in rows:
            n += 1
            text = pope.prompt(row["text"].replace("image", "imange") if n % 3 == 0 else row["text"], "llava")
            questions.append({"question_id": n, "image": row["image"], "text": text, "category": category})
    return write_lines(folder / "llava_pope_test.jsonl", questions), folder / "coco", questions


def test_llava_categories(tmp_path):
    questions, labels, rows = llava_case(tmp_path)
    good = dict(enumerate(["Yes", "No", "Yes", "No", "Yes", "No"]))
    answers = (
        [{**as_llava({**q, "label": ""}, good[i % 6]), "prompt": q["text"]} for i, q in enumerate(rows[:6])]
        + [{**as_llava(q, "Yes"), "prompt": q["text"]} for q in rows[6:12]]
        + [{**as_llava(q, "No"), "prompt": q["text"]} for q in rows[12:]]
    )
    result = score(write_lines(tmp_path / "answers.jsonl", answers), questions, annotations=labels)
    official = {name: rules["official"] for name, rules in result["splits"].items()}
    assert {name: (m["n"], m["accuracy"]) for name, m in official.items()} == {
        "adversarial": (6, 1.0),
        "popular": (6, 0.5),
        "random": (4, 0.5),
    }
    assert [official[c]["f1"] for c in ("adversarial", "popular", "random")] == [
        1.0,
        pytest.approx(2 / 3),
        0.0,
    ]
    assert result["mean_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert result["mean_accuracy"] == pytest.approx(2 / 3)
    assert result["questions"]["label_files"]["random"]["file"] == "coco_pope_random.json"
    # Answers in any order: the labels belong to the questions.
    turned = score(write_lines(tmp_path / "answers.jsonl", answers[::-1]), questions, annotations=labels)
    assert turned["splits"] == result["splits"]


def test_llava_labels_must_fit(tmp_path):
    questions, labels, rows = llava_case(tmp_path)
    answers = write_lines(tmp_path / "a.jsonl", [as_llava(q, "Yes") for q in rows])
    with pytest.raises(DataError, match=r"annotations"):
        score(answers, questions)
    before = score(answers, questions, annotations=labels)
    # The 3000-row file for the 2910-row one: more labels, in another order, the same questions.
    write_lines(labels / "coco_pope_random.json", question_rows(6)[::-1])
    longer = score(answers, questions, annotations=labels)
    assert longer["splits"] == before["splits"]
    assert any("by image and object" in note for note in longer["notes"])
    write_lines(labels / "coco_pope_random.json", question_rows(3))
    with pytest.raises(DataError, match=r"coco_pope_random.json: 3 labels for 4 questions, and none for"):
        score(answers, questions, annotations=labels)
    write_lines(labels / "coco_pope_random.json", question_rows(6)[2:])
    with pytest.raises(DataError, match=r"coco_pope_random.json:1: is about 'apple'"):
        score(answers, questions, annotations=labels)
    (labels / "coco_pope_random.json").unlink()
    with pytest.raises(DataError, match=r"coco_pope_random.json: cannot be read"):
        score(answers, questions, annotations=labels)


@official_files
def test_answers_to_one_split_are_not_scored_on_another(tmp_path):
    """All three official files number their questions 1 to 3000, so the ids alone agree."""
    given = pope.load(DATA / "pope" / "coco_pope_random.json")
    rows = [{"question_id": q.question_id, "prompt": q.text, "text": str(q.label)} for q in given]
    predictions = write_lines(tmp_path / "p.jsonl", rows)
    assert score(predictions, DATA / "pope" / "coco_pope_random.json")["accuracy"] == 1.0
    with pytest.raises(DataError, match="these files do not belong together"):
        score(predictions, DATA / "pope" / "coco_pope_popular.json")


def test_the_sidecar_is_copied(tmp_path):
    rows = question_rows()
    questions = write_lines(tmp_path / "q.jsonl", rows)
    predictions = write_lines(
        tmp_path / "p.jsonl", [as_ours(q, a) for q, a in zip(rows, ANSWERS, strict=True)]
    )
    meta = {"seed": 3, "decode": {"name": "vcd"}, "question_file": {"sha256": pope.identify(questions)[0]}}
    (tmp_path / "p.jsonl.meta.json").write_text(json.dumps(meta))
    result = score(predictions, questions)
    assert result["run"] == meta
    assert result["notes"] == []
    meta["question_file"]["sha256"] = "0"
    (tmp_path / "p.jsonl.meta.json").write_text(json.dumps(meta))
    assert any("SHA-256 differs" in note for note in score(predictions, questions)["notes"])
    (tmp_path / "p.jsonl.meta.json").write_text("{")
    with pytest.raises(DataError, match=r"meta.json:1: not JSON"):
        score(predictions, questions)


def test_the_answer_field_can_be_named(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"question_id": 1, "answer": "yes", "response": "no"}])
    assert [p.answer for p in read_predictions(path, "response")] == ["no"]


def test_scoring_needs_no_torch():
    code = "import sys; sys.argv = ['mllm']; import eval.score, eval.compare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------------------------------- many runs


def result(accuracy: float, seed: int = 0, sha: str = "a") -> dict:
    numbers = dict.fromkeys(("accuracy", "precision", "recall", "f1", "yes_ratio"), accuracy)
    return {"n": 10, "rule": "official", "questions": {"sha256": sha}, "run": {"seed": seed}, **numbers}


def test_summary_of_seeds():
    got = summarise([result(a, seed) for seed, a in enumerate([0.5, 0.6, 0.7, 0.8, 0.9])])
    assert got["runs"] == 5
    assert got["accuracy"]["mean"] == pytest.approx(0.7)
    assert got["f1"]["std"] == pytest.approx(0.15811388)  # n - 1
    assert summarise([result(0.5)], min_runs=1)["accuracy"] == {"mean": 0.5, "std": None}
    with pytest.raises(ConfigError, match="run 5 seeds"):
        summarise([result(0.5, seed) for seed in range(4)])
    with pytest.raises(DataError, match="seeds"):
        summarise([result(0.5, 1)] * 5)
    with pytest.raises(DataError, match="question files"):
        summarise([result(0.5, seed, sha=str(seed)) for seed in range(5)])
    with pytest.raises(DataError, match="'accuracy'"):
        summarise([{"n": 1, "mean_f1": 1.0}], min_runs=1)


def columns(*names: str) -> dict:
    base = {"greedy": 0.8, "sample": 0.6, "vcd_greedy": 0.9, "vcd_sample": 0.7}
    return {
        name: {
            split: [
                result(base[name] + 0.03 * k + 0.01 * seed, seed, split)
                for seed in range(5 if "sample" in name else 1)
            ]
            for k, split in enumerate(pope.SPLITS)
        }
        for name in names
    }


def test_four_columns():
    table = four_columns(columns("greedy", "sample", "vcd_greedy", "vcd_sample"))
    assert list(table) == ["greedy", "sample", "vcd_greedy", "vcd_sample"]
    assert table["greedy"]["accuracy"] == pytest.approx(0.83)
    assert table["greedy"]["accuracy_std"] is None
    assert table["sample"]["accuracy"] == pytest.approx(0.65)
    assert table["sample"]["accuracy_std"] == pytest.approx(0.0158113883)
    assert table["vcd_sample"]["splits"]["popular"]["accuracy"] == pytest.approx(0.75)
    assert table["vcd_sample"]["runs"] == 5
    json.dumps(table)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["vcd_greedy"], "greedy"),
        (["greedy", "vcd_sample"], "sample"),
        (["sample", "vcd_sample"], "greedy"),
    ],
)
def test_no_vcd_column_without_its_baselines(names, missing):
    with pytest.raises(ConfigError, match=f"needs {missing}"):
        four_columns(columns(*names))


def test_columns_must_be_comparable():
    runs = columns("greedy", "sample")
    del runs["sample"]["random"]
    with pytest.raises(DataError, match="different splits"):
        four_columns(runs)
    runs = columns("greedy", "sample")
    runs["sample"]["random"] = runs["sample"]["random"][:4]
    with pytest.raises(DataError, match="same seeds"):
        four_columns(runs)
    runs["sample"] = {split: results[:4] for split, results in runs["sample"].items()}
    with pytest.raises(ConfigError, match="4 runs are too few"):
        four_columns(runs)
    with pytest.raises(ConfigError, match="unknown"):
        four_columns({"beam": {}})


def test_means_of_files_scored_one_by_one():
    a, b = pope.score(["yes", "no"], ["yes", "no"]), pope.score(["yes", "no"], ["no", "no"])
    got = means({"random": {"official": a}, "popular": {"official": b}})
    assert (got["mean_accuracy"], got["mean_f1"]) == (0.75, 0.5)
    assert got["notes"][0].startswith("popular: precision")
