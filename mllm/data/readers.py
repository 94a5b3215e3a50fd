"""Readers: one raw row of a published format in, one row of our message schema out.

A reader is a pure function of the parsed JSON value: it opens no file and no image. Texts are kept
exactly as they are written; `<image>` is replaced by an image part at its place, and a newline next to
it stays text. `rows.py` finds the raw rows in a file and calls these.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import dropwhile
from typing import Any

from mllm.data.grounding import read_boxes
from mllm.data.schema import Message, Part, Role, Row, assistant, check_row, image_part, text_part
from mllm.data.stored import STORED
from mllm.errors import DataError

IMAGE_MARKER = "<image>"

Reader = Callable[[Any, str], Row]

_SPEAKERS: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

# What a caption row asks. Stage 1 with the `plain` template drops the question and keeps the caption.
CAPTION_QUESTIONS = (
    "What does this image show? Answer in one sentence.",
    "Write a short caption for this image.",
    "Sum up this picture in a sentence.",
    "Say briefly what can be seen here.",
    "Give a one-line description of the photo.",
    "In a few words, what is in the image?",
)


def read_messages(raw: Any, where: str) -> Row:
    """A row that is already in our schema: `{"id", "messages": [{"role", "content"}]}`."""
    return check_row(raw, where)


def read_llava(raw: Any, where: str) -> Row:
    """A LLaVA row: `{"id", "image": path or list or absent, "conversations": [{"from", "value"}]}`.

    Raises:
        DataError: names `where`, the row id, the field and what to write instead.
    """
    where = _located(raw, where)
    if "image" not in raw and "images" in raw:
        raise DataError(
            f"{where}: field 'images' is not LLaVA's; name it 'image', or read the file as sharegpt"
        )
    return _read_conversations(raw, _paths(raw, "image", where), where)


def read_sharegpt(raw: Any, where: str) -> Row:
    """A ShareGPT row: LLaVA's `conversations`, with `image` or `images`.

    Many of these conversations open with an answer; such leading answers have no question and are
    dropped, as LLaVA's own code does.
    """
    where = _located(raw, where)
    paths = _paths(raw, "images" if "images" in raw else "image", where)
    turns = raw.get("conversations")
    if isinstance(turns, list):
        raw = {**raw, "conversations": _without_leading_answers(turns)}
    return _read_conversations(raw, paths, where)


def read_caption(raw: Any, where: str) -> Row:
    """A caption row `{"id", "image", "caption"}`: the image and a short question, then the caption.

    The question is one of a fixed few, chosen by the row's id, so that it does not depend on the order.
    """
    where = _located(raw, where)
    paths = _paths(raw, "image", where)
    caption = raw.get("caption")
    if len(paths) != 1:
        raise DataError(f"{where}: field 'image' must be one path")
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f"{where}: field 'caption' must be a non-empty string; write one or remove the row")
    row_id = _row_id(raw, where)
    question = CAPTION_QUESTIONS[zlib.crc32(row_id.encode()) % len(CAPTION_QUESTIONS)]
    ask: Message = {"role": "user", "content": [image_part(paths[0]), text_part(f"\n{question}")]}
    return {"id": row_id, "messages": [ask, assistant(caption.strip())]}


READERS: dict[str, Reader] = {
    "messages": read_messages,
    "llava": read_llava,
    "sharegpt": read_sharegpt,
    "coco_captions": read_caption,
    "coco_boxes": read_boxes,
}


def _located(raw: Any, where: str) -> str:
    """`where` with the row's id, once the row is known to be an object."""
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: a row must be a JSON object, found {type(raw).__name__}")
    return f"{where} (id {_row_id(raw, where)})" if "id" in raw else where


def _row_id(raw: Mapping[str, Any], where: str) -> str:
    row_id = raw.get("id", where)
    if isinstance(row_id, bool) or not isinstance(row_id, (str, int)):
        raise DataError(f"{where}: field 'id' must be a string or a whole number, found {_show(row_id)}")
    return str(row_id)


def _paths(raw: Mapping[str, Any], field: str, where: str) -> list[Any]:
    """The images of a row (paths, or stored ones), whether the field holds one, a list or nothing."""
    value = raw.get(field)
    if value is None:
        return []
    paths = [value] if isinstance(value, (str, *STORED)) else value
    if not isinstance(paths, list) or not all(isinstance(p, (str, *STORED)) and p for p in paths):
        raise DataError(
            f"{where}: field {field!r} must be a path or a list of paths, found {_show(value)}; "
            "leave it out of a text-only row"
        )
    return paths


def _read_conversations(raw: Mapping[str, Any], paths: Sequence[Any], where: str) -> Row:
    turns = raw.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: field 'conversations' must be a non-empty list of turns")
    spoken = [_turn(turn, f"{where}: conversations[{i}]") for i, turn in enumerate(turns)]
    _check_order([role for role, _ in spoken], where)
    _check_markers(spoken, len(paths), where)
    left = iter(paths)
    messages: list[Message] = [{"role": role, "content": list(_parts(text, left))} for role, text in spoken]
    return {"id": _row_id(raw, where), "messages": messages}


def _turn(turn: Any, where: str) -> tuple[Role, str]:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} must be an object with 'from' and 'value', found {_show(turn)}")
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise DataError(f"{where}.from is {_show(speaker)}; use 'human', 'gpt' or 'system'")
    if not isinstance(value, str):
        raise DataError(f"{where}.value must be a string, found {_show(value)}")
    return _SPEAKERS[speaker], value


def _check_order(roles: Sequence[Role], where: str) -> None:
    start = 1 if roles[0] == "system" else 0
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    for i, role in enumerate(roles[start:], start):
        expected = "user" if (i - start) % 2 == 0 else "assistant"
        if role != expected:
            raise DataError(
                f"{where}: conversations[{i}].from is {names[role]!r} where {names[expected]!r} "
                "must stand; after an optional 'system', 'human' and 'gpt' speak in turn, 'human' first"
            )
    if len(roles) == start:
        raise DataError(f"{where}: there is no 'human' turn in 'conversations'; add one")


def _check_markers(spoken: Sequence[tuple[Role, str]], images: int, where: str) -> None:
    for i, (role, text) in enumerate(spoken):
        if role != "user" and IMAGE_MARKER in text:
            raise DataError(
                f"{where}: conversations[{i}].value holds {IMAGE_MARKER!r}, but images belong to "
                "'human' turns; move or remove it"
            )
    markers = sum(text.count(IMAGE_MARKER) for _, text in spoken)
    if markers == images:
        return
    if images and not markers:
        fix = "write '<image>\\n' where it belongs, e.g. at the start of the first 'human' turn"
    elif not images:
        fix = f"add the field 'image', or remove {IMAGE_MARKER!r} from the text"
    else:
        fix = f"write {IMAGE_MARKER!r} once for each image"
    raise DataError(
        f"{where}: {markers} {IMAGE_MARKER!r} in the 'human' turns of 'conversations' "
        f"for {images} images in 'image'; {fix}"
    )


def _parts(text: str, paths: Iterator[Any]) -> Iterator[Part]:
    """Text pieces and images in the order in which they are written; never an empty list."""
    pieces = text.split(IMAGE_MARKER)
    for i, piece in enumerate(pieces):
        if i:
            yield image_part(next(paths))
        if piece or len(pieces) == 1:
            yield text_part(piece)


def _without_leading_answers(turns: list[Any]) -> list[Any]:
    """The turns from the first question on, behind the system turn; all of them if there is none."""
    head = turns[:1] if turns and _role(turns[0]) == "system" else []
    rest = list(dropwhile(lambda turn: _role(turn) == "assistant", turns[len(head) :]))
    return [*head, *rest] if rest else turns


def _role(turn: Any) -> Role | None:
    return _SPEAKERS.get(str(turn.get("from"))) if isinstance(turn, Mapping) else None


def _show(value: Any) -> str:
    """A value as it stands in the file, short enough for one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
