"""Lazy rows: data of any known format as a sequence of rows, each parsed when it is asked for.

Only byte offsets are held in memory (16 bytes a row), so a 3 GB file costs a few megabytes, and a copy
that goes to a dataloader worker is as small. No file stays open: each access opens, reads one row and
closes, which is safe under any way of starting workers.

JSON Lines and JSON lists are lazy, shards (`shards.py`) and Hugging Face data sets (`hf.py`) too. A COCO file
is one JSON object that must be read whole; turn a large one into JSON Lines once, with `mllm data convert`.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, overload

from mllm.data.grounding import BoxTasks
from mllm.data.hf import HF, is_local, open_hf
from mllm.data.readers import READERS, Reader
from mllm.data.schema import Message, Part, Row, image_part
from mllm.data.shards import ShardSource, find_shards, is_shards
from mllm.data.sources import Source, open_source
from mllm.data.stored import REMOTE, STORED
from mllm.errors import ConfigError, DataError


class Rows(Sequence[Row]):
    """The rows of one file, or of one data set in another shape. Get them from `open_rows`.

    Attributes:
        path: the file; a place beside which what is worked out of the rows may be kept.
    """

    def __init__(self, reader: Reader, source: Source, image_root: Path | None, check_images: bool) -> None:
        self.path = source.path
        self.image_root = image_root
        self.check_images = check_images
        self._reader = reader
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative indices, and IndexError
        where = self.where(index)
        return {**self.resolve(self.as_written(index), where), "source": where}

    def as_written(self, index: int) -> Row:
        """Row `index` with its image paths as the file has them."""
        return self._reader(self._source.raw(index), self.where(index))

    def resolve(self, row: Row, where: str) -> Row:
        """The row with its image paths under the image root, and found there if that is asked for."""
        return resolve_images(row, self.image_root, self.check_images, where)

    @property
    def left_out(self) -> dict[str, int]:
        """How much of the file is in no row, and why."""
        return dict(self._source.left_out)

    def where(self, index: int) -> str:
        """Where a row stands in its file, as errors name it."""
        return self._source.where(index)

    def identity(self) -> str:
        """What tells these rows from others; `hashed` says what it is a hash of."""
        return self._source.identity()

    @property
    def hashed(self) -> str:
        """`content`, or what stands for a content that is too large: `index` or `fingerprint`."""
        return self._source.hashed


def resolve_images(row: Row, root: str | Path | None, check: bool, where: str) -> Row:
    """The row with its image paths under `root`, and found there if `check`."""
    where = where if row["id"] == where else f"{where} (id {row['id']})"
    messages: list[Message] = [
        {"role": m["role"], "content": [_resolve(part, root, check, where) for part in m["content"]]}
        for m in row["messages"]
    ]
    return {"id": row["id"], "messages": messages}


def _resolve(part: Part, root: str | Path | None, check: bool, where: str) -> Part:
    if part["type"] != "image" or isinstance(part["image"], STORED):
        return part
    image = part["image"]
    if not isinstance(image, str):
        raise DataError(f"{where}: field 'image' must be a path, found {str(image)[:60]!r}")
    path = image if root is None or image.startswith(REMOTE) else str(Path(root) / image)
    if check and not Path(path).is_file():
        raise DataError(
            f"{where}: field 'image': file {path!r} does not exist; fix the path or the image root"
        )
    return image_part(path)


def open_rows(
    path: str | PathLike[str],
    format: str = "auto",
    image_root: str | PathLike[str] | None = None,
    *,
    check_images: bool = False,
    per: str = "caption",
    boxes: BoxTasks | None = None,
) -> Rows:
    """Open a data file as a lazy sequence of rows.

    Args:
        path: JSON Lines, a JSON list, a COCO captions or instances file; shards (a folder of them, a pattern,
            or `{000..099}.tar`); or `hf:` and a data set of Hugging Face's library.
        format: a key of `READERS`, or `auto`: told from the first row's fields.
        image_root: the folder that image paths are relative to; absolute paths stay as they are.
        check_images: raise on access for a row whose image file is not there.
        per: of COCO captions, one row per `caption`, or per `image` (its first caption).
        boxes: of COCO instances, how boxes are written and what is asked about them.

    Raises:
        DataError: the file is missing, empty or of no known format; later, on access, a bad row.
    """
    if format != "auto" and format not in READERS:
        raise DataError(f"unknown data format {format!r}; use one of auto, {', '.join(READERS)}")
    if (format == "coco_boxes") != (boxes is not None):
        raise ConfigError(
            "a box style and the format 'coco_boxes' go together; give both to `mllm data convert`, and read "
            "the file that it writes"
        )
    source = _find(str(path), format, per, boxes)
    if len(source) == 0:
        raise DataError(f"{path}: there are no rows in the file; a data set needs at least one")
    if format == "auto":
        format = source.format or detect_format(source.raw(0), source.where(0))
    elif source.format not in (None, format):
        raise DataError(f"{path}: this is a {source.format} file, not {format}; name that format")
    if per != "caption" and format != "coco_captions":
        raise ConfigError(f"per is {per!r}, which is of COCO captions; {path} is {format}: leave it out")
    root = None if image_root is None else Path(image_root)
    return Rows(READERS[format], source, root, check_images)


def there_is(path: str) -> bool:
    """Whether there is something to open; of a Hugging Face data set only a folder can be looked for."""
    if path.startswith(HF):
        return is_local(path)
    try:
        return bool(find_shards(path)) if is_shards(path) else Path(path).is_file()
    except DataError:
        return False


def _find(path: str, format: str, per: str, boxes: BoxTasks | None) -> Source:
    if path.startswith(HF):
        return open_hf(path)
    if is_shards(path):
        return ShardSource(find_shards(path))
    return open_source(Path(path), format, per, boxes)


def detect_format(first: Any, where: str) -> str:
    """The key of `READERS` for data that begin with this raw row."""
    if isinstance(first, dict):
        if "conversations" in first:
            return "llava"
        if "messages" in first:
            return "messages"
        if {"image", "caption"} <= first.keys():
            return "coco_captions"
        found = f"fields {', '.join(sorted(first))}"
    else:
        found = type(first).__name__
    raise DataError(
        f"{where}: the format cannot be told from the first row ({found[:200]}); a row has "
        f"'messages' or 'conversations'; or name the format: {', '.join(READERS)}"
    )
