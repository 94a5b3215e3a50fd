"""Contexts: what is known about an image without looking at it, its captions and its boxes.

The first step of making instruction data: COCO annotations in, one `Context` an image out. A teacher
that only reads text (GPT-like ones, after LLaVA) gets `Context.text()`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.errors import DataError


@dataclass(frozen=True)
class Box:
    """One annotated object, in pixels from the top left corner. A crowd box stands for many objects."""

    category: str
    x: float
    y: float
    width: float
    height: float
    crowd: bool = False


@dataclass
class Context:
    """What is known about one image.

    `categories` are those that the annotators looked for: what is among them and has no box is not in
    the image. It is empty where the image has captions only, and then nothing is known to be absent.
    """

    image_id: int | str
    file_name: str
    width: int
    height: int
    captions: list[str] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    categories: tuple[str, ...] = ()

    def text(self, captions: bool = True, boxes: bool = True) -> str:
        """The text form of LLaVA's prompts: a caption a line, a blank line, then a box a line.

        Boxes are `name: [left, top, right, bottom]` as shares of the image, to three decimals. LLaVA's
        conversation prompts see captions alone; the other two kinds see both.
        """
        parts = []
        if captions and self.captions:
            parts.append("\n".join(" ".join(caption.split()) for caption in self.captions))
        if boxes and self.boxes:
            parts.append("\n".join(f"{b.category}: {list(self.corners(b))}" for b in self.boxes))
        return "\n\n".join(parts)

    def corners(self, box: Box) -> tuple[float, float, float, float]:
        """Left, top, right and bottom as shares of the image, cut at its edges, to three decimals."""
        return (
            _share(box.x, self.width),
            _share(box.y, self.height),
            _share(box.x + box.width, self.width),
            _share(box.y + box.height, self.height),
        )


def read_coco(captions: Path | None = None, instances: Path | None = None) -> list[Context]:
    """Read COCO-style annotations, in the order of the images of the first file.

    Args:
        captions: a captions file; without it contexts have boxes only.
        instances: an instances file; without it contexts have captions only.

    Raises:
        DataError: names file, record, field and fix.
    """
    if captions is None and instances is None:
        raise DataError("no annotations: give a COCO captions file, an instances file, or both")
    contexts: dict[int | str, Context] = {}
    if captions is not None:
        data = _load(captions)
        _add_images(contexts, data, captions)
        for where, record in _records(data, "annotations", captions):
            _context_of(contexts, record, where).captions.append(_text(record, "caption", where))
    if instances is not None:
        data = _load(instances)
        annotated = _add_images(contexts, data, instances)
        names = _categories(data, instances)
        for context in annotated:
            context.categories = tuple(names.values())
        for where, record in _records(data, "annotations", instances):
            context = _context_of(contexts, record, where)
            context.boxes.append(_box(record, names, context, where))
    return list(contexts.values())


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; fix the path") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); fix the path") from None
    except ValueError as error:
        raise DataError(f"{path}: not a JSON file in UTF-8 ({error}); get it again") from None
    if not isinstance(data, dict):
        raise DataError(f"{path}: COCO annotations are a JSON object, found {type(data).__name__}")
    return data


def _records(data: dict[str, Any], field: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    records = data.get(field)
    if not isinstance(records, list):
        raise DataError(f"{path}: field {field!r} must be a list; give COCO-style annotations")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{path}: {field}[{i}] must be an object, found {str(record)[:60]}")
        name = f" (id {record['id']})" if "id" in record else ""
        yield f"{path}: {field}[{i}]{name}", record


def _add_images(contexts: dict[int | str, Context], data: dict[str, Any], path: Path) -> list[Context]:
    """Contexts of all images of a file; an image that another file has too must be the same there."""
    found = []
    for where, record in _records(data, "images", path):
        image_id = _key(record, "id", where)
        new = Context(
            image_id,
            _text(record, "file_name", where),
            int(_number(record.get("width"), f"{where}: field 'width'", low=1)),
            int(_number(record.get("height"), f"{where}: field 'height'", low=1)),
        )
        old = contexts.setdefault(image_id, new)
        for attribute in ("file_name", "width", "height"):
            mine, other = getattr(new, attribute), getattr(old, attribute)
            if mine != other:
                raise DataError(
                    f"{where}: {attribute!r} is {mine!r} here and {other!r} in another record of this "
                    "image; give annotations of the same images"
                )
        found.append(old)
    return found


def _categories(data: dict[str, Any], path: Path) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for where, record in _records(data, "categories", path):
        names[_key(record, "id", where)] = _text(record, "name", where)
    if not names:
        raise DataError(f"{path}: field 'categories' is empty; give an instances file, not captions")
    return names


def _context_of(contexts: dict[int | str, Context], record: dict[str, Any], where: str) -> Context:
    image_id = _key(record, "image_id", where)
    if image_id not in contexts:
        raise DataError(f"{where}: image_id {image_id!r} is not in 'images'; add that image")
    return contexts[image_id]


def _box(record: dict[str, Any], names: dict[Any, str], context: Context, where: str) -> Box:
    category = _key(record, "category_id", where)
    if category not in names:
        raise DataError(f"{where}: category_id {category!r} is not in 'categories'; add it")
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise DataError(f"{where}: field 'bbox' must be [x, y, width, height], found {str(box)[:60]}")
    x, y = (_number(v, f"{where}: field 'bbox'") for v in box[:2])
    width, height = (_number(v, f"{where}: field 'bbox'", low=0) for v in box[2:])
    if x >= context.width or y >= context.height or x + width < 0 or y + height < 0:
        raise DataError(
            f"{where}: field 'bbox' {box} lies outside of the image of {context.width} x "
            f"{context.height} pixels; write pixels, as [x, y, width, height]"
        )
    return Box(names[category], x, y, width, height, bool(record.get("iscrowd", 0)))


def _key(record: dict[str, Any], field: str, where: str) -> int | str:
    value = record.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise DataError(f"{where}: field {field!r} must be a number or a string, found {value!r}")
    return value


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: field {field!r} must be a non-empty string, found {value!r}")
    return value.strip()


def _number(value: Any, what: str, low: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{what} must be a number, found {str(value)[:60]}")
    if value < low:
        raise DataError(f"{what} must be at least {low}, found {value}")
    return float(value)


def _share(value: float, size: int) -> float:
    return round(min(max(value / size, 0.0), 1.0), 3)
