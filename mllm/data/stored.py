"""Images that are no files of their own: bytes inside a shard, or in a cell of a table.

A row holds such a reference where another row holds a path. It is small and plain, so that it goes to a
worker as cheaply as a path does; the bytes are read where the image is decoded, and no file stays open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mllm.errors import DataError


@dataclass(frozen=True)
class FileSpan:
    """`size` bytes from `offset` on in the file `path`; `name` is what the image is called in there."""

    path: str
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        """The encoded image."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.path}#{self.name}"


@dataclass(frozen=True)
class ImageBytes:
    """An encoded image in memory, and what errors call it."""

    data: bytes = field(repr=False)
    name: str

    def read(self) -> bytes:
        """The encoded image."""
        return self.data

    def __str__(self) -> str:
        return self.name


Stored = FileSpan | ImageBytes
STORED = (FileSpan, ImageBytes)
REMOTE = ("http://", "https://", "data:")  # what is no file: these have to be downloaded first


def place_images(raw: dict[str, Any], images: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A raw row with each image that it shows replaced by what is stored for it.

    A row names its images (`image`, `images`, or in the parts of its messages), or shows them without a name:
    those come in their order. What is stored and not shown is an error, and the other way round.

    Args:
        raw: a row of the formats llava, sharegpt, coco_captions or messages.
        images: name -> image, in their order.
        where: the row, for messages.

    Raises:
        DataError: a name that nothing is stored for, or a count that does not agree.
    """
    shelf = _Shelf(images, where)
    if isinstance(raw.get("messages"), list):
        placed = {**raw, "messages": [_message(message, shelf) for message in raw["messages"]]}
    else:
        field_name = next((name for name in ("image", "images") if raw.get(name) is not None), None)
        named = raw.get(field_name) if field_name else list(images.values())
        listed = named if isinstance(named, list) else [named]
        placed = {key: value for key, value in raw.items() if key not in ("image", "images")}
        if listed:
            placed["image"] = [shelf.take(one) for one in listed]
    shelf.check_empty()
    return placed


class _Shelf:
    """The stored images of one row, each taken once."""

    def __init__(self, images: Mapping[str, Any], where: str):
        self.left, self.where = dict(images), where
        self.names = list(images)

    def take(self, wanted: Any) -> Any:
        """The image of that name, or the next one where the row gives no name."""
        if isinstance(wanted, STORED):
            name = next((name for name, image in self.left.items() if image is wanted), None)
        elif wanted is None:
            name = next(iter(self.left), None)
        else:
            base = str(wanted).rpartition("/")[2]
            name = next((name for name in self.left if name in (wanted, base)), None)
        if name is None:
            what = "one more image" if wanted is None else f"the image {str(wanted)[:60]!r}"
            raise DataError(
                f"{self.where}: the row shows {what}, and stored with it are: "
                f"{', '.join(self.names) or 'none'}; name each of these once"
            )
        return self.left.pop(name)

    def check_empty(self) -> None:
        """Raise where an image would be left out in silence."""
        if self.left:
            raise DataError(
                f"{self.where}: the row does not show its image {next(iter(self.left))!r}; name it there, "
                "or remove it"
            )


def _message(message: Any, shelf: _Shelf) -> Any:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    parts = [
        {**part, "image": shelf.take(part.get("image"))} if _is_image(part) else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"
