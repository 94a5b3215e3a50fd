"""Where raw rows come from: byte spans in a JSON Lines file or a JSON list, or a COCO file.

Part of `rows.py`: this file finds rows and parses them; it does not know what they mean.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mllm.data.files import sha256_of
from mllm.data.grounding import BoxTasks, box_records
from mllm.errors import DataError

Spans = NDArray[np.int64]  # [rows, 2]: first byte and the byte after the last

_CHUNK = 1 << 22
_BOM = b"\xef\xbb\xbf"
# What other files begin with, and what to do about them.
_FOREIGN = {
    b"\x1f\x8b": "compressed (gzip); unpack it, or read it as hf:PATH",
    b"\x28\xb5\x2f\xfd": "compressed (zstandard); unpack it",
    b"PK\x03\x04": "a .zip; unpack it",
    b"PAR1": "a parquet file; read it as hf:PATH",
}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

# Byte classes of the JSON list scan: what a byte outside of strings adds to the nesting depth.
_DEPTH = np.zeros(256, np.int8)
_DEPTH[[ord("["), ord("{")]] = 1
_DEPTH[[ord("]"), ord("}")]] = -1
_STRUCTURE = _DEPTH != 0
_STRUCTURE[ord(",")] = True


class Source(Protocol):
    """Raw rows by number: of a file, of shards, of a Hugging Face data set.

    Attributes:
        path: a place beside which what is worked out of the data may be kept.
        format: a key of `READERS` if only one can be meant.
        left_out: how much is in no row, and why.
        hashed: what `identity` is a hash of.
    """

    path: Path
    format: str | None
    hashed: str

    @property
    def left_out(self) -> Mapping[str, int]:
        """How much is in no row, and why."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """Where the row stands, for messages."""

    def raw(self, index: int) -> Any:
        """The parsed row."""

    def identity(self) -> str:
        """What tells these rows from others."""


class RecordSource:
    """Raw rows of a list in memory; `noun` is what one is, `left_out` what the file has beside them."""

    hashed = "content"

    def __init__(
        self, path: Path, records: Sequence[Any], format: str, noun: str, left_out: Mapping[str, int]
    ) -> None:
        self.path, self.records, self.noun, self.left_out = path, records, noun, left_out
        self.format: str | None = format

    def __len__(self) -> int:
        return len(self.records)

    def where(self, index: int) -> str:
        """Where the row stands, for messages."""
        return f"{self.path}: {self.noun} {index}"

    def raw(self, index: int) -> Any:
        """The parsed row."""
        return self.records[index]

    def identity(self) -> str:
        """A hash of the file."""
        return sha256_of(self.path)


class FileSource:
    """Raw rows that are read from their bytes in a file, which must not change meanwhile."""

    format: str | None = None
    hashed = "content"
    left_out: Mapping[str, int] = MappingProxyType({})

    def __init__(self, path: Path, spans: Spans, lines: NDArray[np.int64] | None) -> None:
        self.path, self.spans, self.lines = path, spans, lines
        self.stamp = stamp_of(path)

    def __len__(self) -> int:
        return len(self.spans)

    def where(self, index: int) -> str:
        """Where the row stands, for messages: `file:line`, or the element of a list."""
        if self.lines is None:
            return f"{self.path}: element {index}"
        return f"{self.path}:{self.lines[index]}"

    def raw(self, index: int) -> Any:
        """Read and parse the row."""
        if stamp_of(self.path) != self.stamp:
            raise DataError(f"{self.path} has changed since it was opened; start again")
        start, end = self.spans[index].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        return parse_json(data, self.where(index))

    def identity(self) -> str:
        """A hash of the file."""
        return sha256_of(self.path)


def open_source(path: Path, format: str, per: str, boxes: BoxTasks | None = None) -> Source:
    """Tell JSON Lines, a list and an object apart by the first bytes, and index the rows."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
            for magic, fault in _FOREIGN.items():
                if head.startswith(magic):
                    raise DataError(f"{path}: the file is {fault}")
            start = len(_BOM) if head.startswith(_BOM) else 0
            file.seek(start)
            first = _first_byte(file)
            if not first:
                raise DataError(f"{path}: the file is empty; a data set needs at least one row")
            if first == b"[":
                file.seek(start)
                return FileSource(path, _scan_list(file, path), None)
            if format in ("coco_captions", "coco_boxes") or _is_whole_object(file.readline()):
                return _open_object(path, per, boxes)
            file.seek(start)
            return FileSource(path, *_scan_lines(file, start))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; fix the path") from None
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None


def _first_byte(file: IO[bytes]) -> bytes:
    """The first byte that is no white space, left to be read next; empty at the end of the file."""
    while (byte := file.read(1)).isspace():
        pass
    file.seek(-len(byte), 1)
    return byte


def _is_whole_object(first_line: bytes) -> bool:
    """Whether the file is one JSON object (COCO) rather than one object a line."""
    try:
        value = json.loads(first_line)
    except json.JSONDecodeError as error:
        # An object that goes on below its first line ends too early. Any other fault is a bad row,
        # which is reported when it is read.
        return error.pos >= len(first_line.decode("utf-8", "replace").rstrip())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and {"annotations", "images"} <= value.keys()


def _scan_lines(file: IO[bytes], start: int) -> tuple[Spans, NDArray[np.int64]]:
    """Byte spans and line numbers of the lines that are not blank."""
    spans, numbers = array("q"), array("q")
    for number, line in enumerate(file, 1):
        if not line.isspace():
            spans.extend((start, start + len(line)))
            numbers.append(number)
        start += len(line)
    return np.frombuffer(spans, np.int64).reshape(-1, 2), np.frombuffer(numbers, np.int64)


def _scan_list(file: IO[bytes], path: Path) -> Spans:
    """Byte spans of the elements of a top-level JSON list, in one pass over the file.

    Only brackets, commas and strings are looked at; an element itself is parsed when it is read.
    """
    cuts: list[NDArray[np.int64]] = []  # the opening bracket, the commas between elements, the end
    depth, in_string, offset = 0, False, file.tell()
    while chunk := _read_chunk(file):
        # An escaped character ends no string. Same length, so offsets stay true.
        clean = chunk.replace(b"\\\\", b"..").replace(b'\\"', b"..")
        codes = np.frombuffer(clean, np.uint8)
        inside = np.cumsum(codes == ord('"'), dtype=np.uint8) % 2 != int(in_string)
        found = np.flatnonzero(_STRUCTURE[codes] & ~inside)
        steps = _DEPTH[codes[found]].astype(np.int64)
        after = depth + np.cumsum(steps)
        is_cut = ((steps == 1) & (after == 1)) | ((steps == 0) & (after == 1)) | (after == 0)
        cuts.append(found[is_cut] + offset)
        if len(after):
            depth = int(after[-1])
        in_string = in_string != bool(np.count_nonzero(codes == ord('"')) % 2)
        offset += len(chunk)
    edges = np.concatenate(cuts)
    if depth != 0 or in_string:
        raise DataError(
            f"{path}: the list ends inside element {max(len(edges) - 1, 0)}; "
            "the file is cut off: copy or download it again"
        )
    spans = np.stack([edges[:-1] + 1, edges[1:]], axis=1)
    if len(spans) == 1 and _is_blank(file, spans[0]):
        return spans[:0]
    return spans


def _read_chunk(file: IO[bytes]) -> bytes:
    """The next bytes, never ending on a backslash, so that no escape is cut in two."""
    chunk = file.read(_CHUNK)
    while chunk.endswith(b"\\") and (more := file.read(1)):
        chunk += more
    return chunk


def _is_blank(file: IO[bytes], span: NDArray[np.int64]) -> bool:
    file.seek(int(span[0]))
    return not file.read(int(span[1] - span[0])).strip()


def _open_object(path: Path, per: str, boxes: BoxTasks | None) -> Source:
    value = parse_json(path.read_bytes(), str(path))
    if not isinstance(value, dict) or not {"annotations", "images"} <= value.keys():
        raise DataError(
            f"{path}: neither rows nor COCO captions: write one JSON object a line, a JSON list of "
            "objects, or an object with 'images' and 'annotations'"
        )
    if boxes is not None:
        asks, left_out = box_records(value, str(path), boxes)
        return RecordSource(path, asks, "coco_boxes", "row", left_out)
    return RecordSource(path, list(caption_records(value, str(path), per)), "coco_captions", "caption", {})


def caption_records(coco: Mapping[str, Any], where: str, per: str) -> Iterator[dict[str, Any]]:
    """Join COCO `annotations` to `images`: `{"id", "image", "caption"}` each, in the file's order.

    Args:
        coco: a parsed COCO captions file.
        where: the file, put in front of every message.
        per: `caption` for a row each, `image` for the first caption of every image.
    """
    if per not in ("caption", "image"):
        raise DataError(f"per is {per!r}; use 'caption' or 'image'")
    for field in ("images", "annotations"):
        if not isinstance(coco[field], list):
            raise DataError(f"{where}: field {field!r} must be a list")
    names: dict[Any, str] = {}
    for i, image in enumerate(coco["images"]):
        image_id, name = (image.get("id"), image.get("file_name")) if isinstance(image, dict) else (0, 0)
        if not isinstance(image_id, (int, str)) or not isinstance(name, str):
            raise DataError(f"{where}: images[{i}] must have an 'id' and a 'file_name'")
        names[image_id] = name
    seen = set()
    for i, annotation in enumerate(coco["annotations"]):
        if not isinstance(annotation, dict) or "caption" not in annotation:
            raise DataError(
                f"{where}: annotations[{i}] has no 'caption'; give a captions file, or read instances as "
                "coco_boxes"
            )
        image_id = annotation.get("image_id")
        if not isinstance(image_id, (int, str)) or image_id not in names:
            raise DataError(
                f"{where}: annotations[{i}].image_id {image_id!r} is not in 'images'; add that image"
            )
        if per == "image" and image_id in seen:
            continue
        seen.add(image_id)
        row_id = image_id if per == "image" else annotation.get("id", f"{image_id}-{i}")
        yield {"id": row_id, "image": names[image_id], "caption": annotation["caption"]}


def parse_json(data: bytes, where: str) -> Any:
    """A JSON value; `where` it stands is put in front of every message."""
    try:
        value = json.loads(data.decode())
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()  # half a pair is no character
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise DataError(
            f"{where}: not valid JSON ({error.msg}, {line}column {error.colno}); fix it there"
        ) from None
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not readable JSON ({error}); simplify the row") from None
    return value


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and time of a file, by which it is known again."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path} is gone; it was there when it was opened") from None
    return status.st_size, status.st_mtime_ns
