"""COCO instances as rows: find a category (detection), find one thing (refer), name a box (identify).

`box_records` finds what can be asked about each image; `read_boxes` writes the row. A bad box is thereby
the fault of its rows alone.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mllm.data.boxes import BOX_STYLES, Box
from mllm.data.schema import Row, assistant, image_part, text_part
from mllm.errors import ConfigError, DataError


class Wording(NamedTuple):
    """The questions of a task, one of which is drawn, and its answer."""

    questions: tuple[str, ...]
    answer: str


# By style and task. `{classes}` makes a style answer in class tokens, and ask for all classes at once.
# A newline follows the image where the system's own data have one.
WORDINGS: dict[str, dict[str, Wording]] = {
    # The questions of the released data sets; `[...]` is the task's identifier.
    "minigpt_v2": {
        "detection": Wording(("[detection] {name}",), "<p>{name}</p> {boxes}"),
        "refer": Wording(
            (
                "[refer] {name}",
                "[refer] give me the location of {name}",
                "[refer] where is {name} ?",
                "[refer] from this image, tell me the location of {name}",
                "[refer] the location of {name} is",
                "[refer] could you tell me the location for {name} ?",
                "[refer] where can I locate the {name} ?",
            ),
            "{boxes}",
        ),
        "identify": Wording(
            (
                "[identify] {boxes}",
                "[identify] what object is in this location {boxes}",
                "[identify] what is it in {boxes}",
            ),
            "{name}",
        ),
    },
    # Refer and identify ask as mix665k does; it has no detection.
    "llava": {
        "detection": Wording(("\nPlease provide the bounding box coordinates of every {name}.",), "{boxes}"),
        "refer": Wording(
            ("\nPlease provide the bounding box coordinate of the region this sentence describes: {name}.",),
            "{boxes}",
        ),
        "identify": Wording(("\nPlease provide a short description for this region: {boxes}.",), "{name}"),
    },
    # Refer and identify are prompts that the released model was trained with.
    "cogvlm": {
        "detection": Wording(("Where is every {name}? answer in [[x0,y0,x1,y1]] format.",), "{boxes}"),
        "refer": Wording(("Where is {name}? answer in [[x0,y0,x1,y1]] format.",), "{boxes}"),
        "identify": Wording(
            ("Tell me what you see within the designated area {boxes} in the picture.",), "{name}"
        ),
    },
    # Its instructions were not released: the class list and the answer are its form, the sentences are ours.
    "visionllm": {
        "detection": Wording(("Classes: {classes}. Find every object of these classes.",), "{name} {boxes}"),
        "refer": Wording(("Classes: {classes}. Where is the {name}?",), "{name} {boxes}"),
        "identify": Wording(("Classes: {classes}. Which of them is at {boxes}?",), "{name}"),
    },
}
TASKS = ("detection", "refer", "identify")
_KEY = (int, str)


@dataclass(frozen=True)
class BoxTasks:
    """What to ask of boxes: a key of `BOX_STYLES`, the tasks, and the seed of the questions drawn."""

    style: str
    tasks: tuple[str, ...] = TASKS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.style not in BOX_STYLES:
            raise ConfigError(f"unknown box style {self.style!r}; use {', '.join(BOX_STYLES)}")
        for task in self.tasks or ("",):
            if task not in TASKS:
                raise ConfigError(f"unknown box task {task!r}; use {', '.join(TASKS)}")
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"box tasks {', '.join(self.tasks)}: one is there twice, as its rows would be")


class Thing(NamedTuple):
    """One annotated object; `bbox` is as in the file, still unchecked."""

    id: Any
    name: str
    bbox: Any


@dataclass(frozen=True)
class Ask:
    """A row before its boxes are written."""

    id: str
    image: str
    width: float
    height: float
    style: str
    question: str
    answer: str
    things: tuple[Thing, ...]
    classes: tuple[str, ...]


def box_records(coco: Mapping[str, Any], where: str, wanted: BoxTasks) -> tuple[list[Ask], dict[str, int]]:
    """What can be asked about the images of a COCO instances file, in the file's order.

    A crowd box stands for many things and is left out. Its category cannot be listed whole or be unique in
    that image, so detection and refer leave it out too.

    Returns:
        the records for `read_boxes`, and how much was left out and why.

    Raises:
        DataError: the file lacks what an instances file has.
    """
    categories = _records(coco, "categories", where, id=_KEY, name=str)
    names = {record["id"]: record["name"] for record in categories}
    images = list(
        _records(coco, "images", where, id=_KEY, file_name=str, width=(int, float), height=(int, float))
    )
    things: dict[Any, list[Thing]] = {image["id"]: [] for image in images}
    crowded: defaultdict[Any, set[str]] = defaultdict(set)
    left_out = {"crowd boxes": 0, "images without boxes": 0}
    annotations = _records(coco, "annotations", where, image_id=_KEY, category_id=_KEY, bbox=object)
    for i, record in enumerate(annotations):
        image_id, category = record["image_id"], record["category_id"]
        if image_id not in things or category not in names:
            raise DataError(
                f"{where}: annotations[{i}] is of image {image_id!r} and category {category!r}, not both "
                "of which are listed; add them to 'images' and 'categories'"
            )
        if record.get("iscrowd"):
            crowded[image_id].add(names[category])
            left_out["crowd boxes"] += 1
        else:
            things[image_id].append(Thing(record.get("id", i), names[category], record["bbox"]))
    asks: list[Ask] = []
    for image in images:
        seen, crowds = things[image["id"]], crowded[image["id"]]
        left_out["images without boxes"] += not seen
        whole = [thing for thing in seen if thing.name not in crowds]
        absent = sorted({*names.values()} - crowds - {thing.name for thing in seen})
        for task in wanted.tasks:
            asks += _asks(image, task, seen if task == "identify" else whole, absent, wanted)
    return asks, left_out


def read_boxes(raw: Any, where: str) -> Row:
    """The row of a record of `box_records`.

    Raises:
        DataError: a box cannot be written, or the file was no COCO instances file.
    """
    if not isinstance(raw, Ask):
        raise DataError(f"{where}: coco_boxes reads a COCO instances file, and this is none; name its format")
    where = f"{where} (id {raw.id})"
    tokens = {name: f"<c{i}>" for i, name in enumerate(raw.classes)}

    def text(template: str, things: tuple[Thing, ...]) -> str:
        boxes = [_corners(thing.bbox, where) for thing in things]
        return template.format(
            name=tokens.get(things[0].name, things[0].name),
            boxes=BOX_STYLES[raw.style].write(boxes, raw.width, raw.height, where),
            classes=", ".join(f"{token}: {name}" for name, token in tokens.items()),
        )

    # A class token stands before each box; a phrase stands before all of its boxes.
    groups = [(thing,) for thing in raw.things] if tokens else [raw.things]
    question, answer = text(raw.question, raw.things), " ".join(text(raw.answer, group) for group in groups)
    content = [image_part(raw.image), text_part(question)]
    return {"id": raw.id, "messages": [{"role": "user", "content": content}, assistant(answer)]}


def _asks(
    image: Mapping[str, Any], task: str, seen: list[Thing], absent: list[str], wanted: BoxTasks
) -> Iterator[Ask]:
    questions, answer = WORDINGS[wanted.style][task]
    classes = "{classes}" in questions[0]
    for key, things in _groups(task, seen, classes):
        row_id = f"{image['id']}-{task}-{key}"
        draw = random.Random(f"{wanted.seed} {row_id}")  # of the row alone: no row changes the next
        yield Ask(
            row_id,
            image["file_name"],
            image["width"],
            image["height"],
            wanted.style,
            draw.choice(questions),
            answer,
            things,
            _mapping(seen, absent, draw) if classes else (),
        )


def _groups(task: str, seen: list[Thing], together: bool) -> Iterator[tuple[Any, tuple[Thing, ...]]]:
    """What each row of a task is about, with a key that is unique in the image."""
    by_name: defaultdict[str, list[Thing]] = defaultdict(list)
    for thing in seen:
        by_name[thing.name].append(thing)
    if task == "identify":
        yield from ((thing.id, (thing,)) for thing in seen)
    elif task == "refer":
        yield from ((name, tuple(things)) for name, things in by_name.items() if len(things) == 1)
    elif together and seen:
        yield "all", tuple(seen)
    elif not together:
        yield from ((name, tuple(things)) for name, things in by_name.items())


def _mapping(things: Iterable[Thing], absent: list[str], draw: random.Random) -> tuple[str, ...]:
    """The categories asked about and as many absent ones, in any order: no token has a meaning of its own."""
    present = sorted({thing.name for thing in things})
    classes = present + draw.sample(absent, min(len(present), len(absent)))
    return tuple(draw.sample(classes, len(classes)))


def _corners(bbox: Any, where: str) -> Box:
    """COCO's left, top, width, height as corners."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(n, (int, float)) for n in bbox):
        raise DataError(f"{where}: bbox {str(bbox)[:60]} must be four numbers: left, top, width, height")
    x, y, width, height = bbox
    return x, y, x + width, y + height


def _records(coco: Mapping[str, Any], field: str, where: str, **types: Any) -> Iterator[dict[str, Any]]:
    """The records of a COCO list, each with the fields that it must have."""
    records = coco.get(field)
    if not isinstance(records, list):
        raise DataError(f"{where}: field {field!r} must be a list; give a COCO instances file")
    for i, record in enumerate(records):
        for name, kind in types.items():
            if not isinstance(record, dict) or name not in record or not isinstance(record[name], kind):
                raise DataError(f"{where}: {field}[{i}] has no usable {name!r}; give a COCO instances file")
        yield record
