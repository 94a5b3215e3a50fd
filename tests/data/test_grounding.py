"""COCO instances as rows: what is asked, what is left out, and that every box can be read back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mllm.cli import app
from mllm.data.boxes import BOX_STYLES
from mllm.data.convert import convert
from mllm.data.grounding import TASKS, WORDINGS, BoxTasks
from mllm.data.rows import open_rows
from mllm.data.schema import Row, message_text
from mllm.errors import ConfigError, DataError


def thing(image: int, category: int, bbox: Any, crowd: int = 0, **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": bbox, "iscrowd": crowd, **more}


def write(path: Path, **changes: Any) -> Path:
    """Two cats and a dog on a picture, crowds of dogs and buses and a cat on the next, none on the last."""
    coco = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 50} for i in (1, 2, 3)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}, {"id": 9, "name": "bus"}],
        "annotations": [
            thing(1, 7, [0, 0, 50, 25], id=70),
            thing(1, 8, [50, 25, 50, 25.4], id=80),
            thing(1, 7, [20, 10, 10, 10], id=71),
            thing(2, 8, [0, 0, 100, 50], 1, id=81),
            thing(2, 9, [0, 0, 100, 50], 1, id=90),
            thing(2, 7, [0, 0, 100, 50], id=72),
            thing(2, 8, [10, 10, 20, 20], id=82),
        ],
    }
    path.write_text(json.dumps(coco | changes))
    return path


def texts(row: Row) -> tuple[str, str]:
    return message_text(row["messages"][0]), message_text(row["messages"][1])


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (
            "llava",
            {
                "1-detection-cat": (
                    "\nPlease provide the bounding box coordinates of every cat.",
                    "[0.0, 0.25, 0.5, 0.5], [0.2, 0.35, 0.3, 0.45]",
                ),
                "1-refer-dog": (
                    "\nPlease provide the bounding box coordinate of the region this sentence describes: "
                    "dog.",
                    "[0.5, 0.5, 1.0, 0.75]",
                ),
                "1-identify-70": (
                    "\nPlease provide a short description for this region: [0.0, 0.25, 0.5, 0.5].",
                    "cat",
                ),
            },
        ),
        (
            "minigpt_v2",
            {"1-detection-cat": ("[detection] cat", "<p>cat</p> {<0><0><50><50>}<delim>{<20><20><30><40>}")},
        ),
        (
            "cogvlm",
            {
                "1-detection-cat": (
                    "Where is every cat? answer in [[x0,y0,x1,y1]] format.",
                    "[[000,000,500,500;200,200,300,400]]",
                ),
                "1-identify-80": (
                    "Tell me what you see within the designated area [[500,500,999,999]] in the picture.",
                    "dog",
                ),
            },
        ),
    ],
)
def test_texts(tmp_path: Path, style: str, expected: dict[str, tuple[str, str]]) -> None:
    rows = open_rows(write(tmp_path / "a.json"), "coco_boxes", boxes=BoxTasks(style))
    found = {row["id"]: texts(row) for row in rows}
    assert {key: found[key] for key in expected} == expected
    # Dogs of image 2 stand beside a crowd of dogs: they can be named, not listed.
    assert list(found) == [
        "1-detection-cat",
        "1-detection-dog",
        "1-refer-dog",
        "1-identify-70",
        "1-identify-80",
        "1-identify-71",
        "2-detection-cat",
        "2-refer-cat",
        "2-identify-72",
        "2-identify-82",
    ]
    assert rows.left_out == {"crowd boxes": 2, "images without boxes": 1}


def test_visionllm_answers_in_the_class_tokens_of_its_question(tmp_path: Path) -> None:
    rows = open_rows(write(tmp_path / "a.json"), "coco_boxes", boxes=BoxTasks("visionllm"))
    found = {row["id"]: texts(row) for row in rows}
    question, answer = found["1-detection-all"]
    tokens = {name: token for token, name in re.findall(r"(<c\d>): (\w+)", question)}
    assert set(tokens) == {"cat", "dog", "bus"}  # the bus is not there
    cat, dog = tokens["cat"], tokens["dog"]
    assert answer == (
        f"{cat} <p-256> <p-256> <p0> <p0> {dog} <p0> <p0> <p256> <p256> {cat} <p-154> <p-154> <p-102> <p-51>"
    )
    # Dogs and buses are there, but not all of them have a box.
    assert found["2-detection-all"][0] == "Classes: <c0>: cat. Find every object of these classes."
    question, answer = found["2-identify-82"]
    assert f"{answer}: dog" in question


@pytest.mark.parametrize("style", list(BOX_STYLES))
def test_the_seed_decides(tmp_path: Path, style: str) -> None:
    source = write(tmp_path / "a.json")

    def rows(seed: int, tasks: tuple[str, ...] = TASKS) -> list[Row]:
        return list(open_rows(source, "coco_boxes", boxes=BoxTasks(style, tasks, seed)))

    strip = [{**row, "source": ""} for row in rows(0) if "refer" in row["id"]]
    assert strip == [{**row, "source": ""} for row in rows(0, ("refer",))]
    if style in ("minigpt_v2", "visionllm"):
        assert len({json.dumps(rows(seed)) for seed in range(5)}) > 1


def test_a_bad_box_is_the_fault_of_its_rows_alone(tmp_path: Path) -> None:
    bad = [thing(1, 7, [0, 0, 50, 25]), thing(1, 8, [10, 10, 0, 5], id=80), thing(1, 9, [1, 2], id=90)]
    source = write(tmp_path / "a.json", annotations=bad)
    boxes = BoxTasks("minigpt_v2", ("identify",))
    with pytest.raises(DataError, match=r"a\.json: row 1 \(id 1-identify-80\): box \[10, 10, 10, 15\] must"):
        convert(source, tmp_path / "b", format="coco_boxes", boxes=boxes)
    done = convert(source, tmp_path / "b", format="coco_boxes", boxes=boxes, on_error="skip", max_bad=0.7)
    assert (done.rows, done.bad, done.left_out["images without boxes"]) == (1, 2, 2)
    assert any("bbox [N, N] must be four numbers" in reason for reason in done.reasons)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": None}, "field 'categories' must be a list; give a COCO instances file"),
        ({"images": [{"id": []}]}, "images[0] has no usable 'id'; give a COCO instances file"),
        ({"annotations": [{"caption": "a"}]}, "annotations[0] has no usable 'image_id'; give a COCO"),
        (
            {"annotations": [thing(5, 7, [])]},
            "annotations[0] is of image 5 and category 7, not both of which are listed; add them",
        ),
    ],
)
def test_malformed_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = write(tmp_path / "a.json", **changes)
    with pytest.raises(DataError, match=re.escape(f"a.json: {message}")):
        open_rows(source, "coco_boxes", boxes=BoxTasks("llava"))


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown box style 'llama'; use llava, minigpt_v2"):
        BoxTasks("llama")
    with pytest.raises(ConfigError, match="unknown box task 'segment'; use detection, refer, identify"):
        BoxTasks("llava", ("refer", "segment"))
    source = write(tmp_path / "a.json")
    with pytest.raises(ConfigError, match="a box style and the format 'coco_boxes' go together"):
        open_rows(source, "coco_boxes")
    with pytest.raises(ConfigError, match="a box style and the format 'coco_boxes' go together"):
        open_rows(source, boxes=BoxTasks("llava"))
    source.write_text("[{}]")
    with pytest.raises(DataError, match="element 0: coco_boxes reads a COCO instances file"):
        open_rows(source, "coco_boxes", boxes=BoxTasks("llava"))[0]


def test_every_style_has_words_for_every_task() -> None:
    assert set(WORDINGS) == set(BOX_STYLES)
    assert all(set(tasks) == set(TASKS) for tasks in WORDINGS.values())


@pytest.mark.parametrize("style", list(BOX_STYLES))
def test_real_annotations(tmp_path: Path, data_dir: Path, style: str) -> None:
    coco = data_dir / "coco_tiny"
    source, output = coco / "annotations" / "instances_val2017.json", tmp_path / "rows.jsonl"
    arguments = ["data", "convert", str(source), str(output), "--format", "coco_boxes", "--box-style", style]
    result = CliRunner().invoke(
        app, [*arguments, "--image-root", str(coco / "val2017"), "--check-images", "--json"]
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    annotations = json.loads(source.read_text())
    single = [a for a in annotations["annotations"] if not a["iscrowd"]]
    assert summary["bad"] == 0
    assert summary["left_out"] == {
        "crowd boxes": len(annotations["annotations"]) - len(single),
        "images without boxes": len(annotations["images"]) - len({a["image_id"] for a in single}),
    }
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in annotations["images"]}
    bboxes = {str(a["id"]): a["bbox"] for a in single}
    identified = 0
    for row in open_rows(output, image_root=coco / "val2017"):
        image, task, key = row["id"].split("-", 2)
        size = sizes[f"{int(image):012}.jpg"]
        question, answer = texts(row)
        if task != "identify":
            assert BOX_STYLES[style].read(answer, *size)
            continue
        identified += 1
        x, y, width, height = bboxes[key]
        (box,) = BOX_STYLES[style].read(question, *size)
        assert box == pytest.approx((x, y, x + width, y + height), abs=max(size) / 200 + 1)
    assert identified == len(single)
