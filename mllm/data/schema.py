"""The one message schema, and the check that every row passes before anything else sees it.

A row is `{"id": str, "messages": [{"role": ..., "content": [part, ...]}, ...]}` where a part is
`{"type": "text", "text": str}` or `{"type": "image", "image": path | PIL.Image}`: the content-part form
of the OpenAI and Hugging Face chat formats. Readers turn every other format into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

from typing_extensions import NotRequired

from mllm.errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


class Part(TypedDict, total=False):
    """One piece of a message: text, or an image (a path, or a PIL image in memory)."""

    type: Literal["text", "image"]
    text: str
    image: Any


class Message(TypedDict):
    """One turn of a conversation."""

    role: Role
    content: list[Part]


class Row(TypedDict):
    """One conversation of a data set.

    `source` says which line of which file it is, for errors; `dataset` which data set of a mixture.
    """

    id: str
    messages: list[Message]
    source: NotRequired[str]
    dataset: NotRequired[str]


def name_of(row: Row) -> str:
    """How errors call a row: its place in the file if a reader noted it, and its id."""
    source = row.get("source")
    if row["id"] == source:  # it has none of its own
        return row["id"]
    return f"{source} (id {row['id']})" if source else f"row {row['id']}"


def text_part(text: str) -> Part:
    """A text part."""
    return {"type": "text", "text": text}


def image_part(image: Any) -> Part:
    """An image part; `image` is a path or a PIL image."""
    return {"type": "image", "image": image}


def user(text: str, *images: Any) -> Message:
    """A user message with its images in front, each on a line of its own as LLaVA's data have them."""
    parts: list[Part] = []
    for image in images:
        parts += [image_part(image), text_part("\n")]
    return {"role": "user", "content": [*parts, text_part(text)]}


def assistant(text: str) -> Message:
    """An assistant message."""
    return {"role": "assistant", "content": [text_part(text)]}


def message_text(message: Message) -> str:
    """The text parts of a message, joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def empty_answers(messages: Sequence[Message]) -> int:
    """Answers without text, which train a model to say nothing: their end token is all that is supervised."""
    return sum(m["role"] == "assistant" and not message_text(m).strip() for m in messages)


def check_last(messages: Sequence[Message], role: Literal["user", "assistant"]) -> None:
    """Raise `DataError` unless this one speaks last: an assistant to learn from, a user to be answered."""
    if messages[-1]["role"] != role:
        wanted = "a 'user'" if role == "user" else "an 'assistant'"
        raise DataError(f"the last message must be {wanted} message, found {messages[-1]['role']!r}")


def images_of(messages: Sequence[Message]) -> list[Any]:
    """Every image of a conversation, in order."""
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


def check_row(raw: Any, where: str) -> Row:
    """Validate one raw row and return it in canonical form (`content` always a list of parts).

    Args:
        raw: the parsed JSON value.
        where: `file:line` (or the like), put in front of every message.

    Raises:
        DataError: names `where`, the row id, the field and what to write instead.
    """
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: a row must be a JSON object, found {type(raw).__name__}")
    row_id = str(raw.get("id", where))
    where = f"{where} (id {row_id})" if "id" in raw else where
    unknown = set(raw) - {"id", "messages", "source", "provenance"}
    if unknown:
        raise DataError(f"{where}: unknown field {sorted(unknown)[0]!r}; a row has 'id' and 'messages'")
    messages = raw.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: field 'messages' must be a non-empty list of messages")
    row: Row = {
        "id": row_id,
        "messages": [_check_message(m, f"{where}: messages[{i}]") for i, m in enumerate(messages)],
    }
    check_roles(row["messages"], where)
    return row


def check_roles(messages: Sequence[Message], where: str) -> None:
    """Raise unless roles run `[system] user assistant user assistant ...`, ending anywhere after a user."""
    turns = [m["role"] for m in messages]
    start = 1 if turns and turns[0] == "system" else 0
    for i, role in enumerate(turns[start:]):
        expected = "user" if i % 2 == 0 else "assistant"
        if role != expected:
            raise DataError(
                f"{where}: messages[{start + i}].role is {role!r} where {expected!r} must stand; "
                "order messages as an optional 'system', then 'user' and 'assistant' in turn"
            )
    if len(turns) == start:
        raise DataError(f"{where}: there is no 'user' message; add one")


def _check_message(raw: Any, where: str) -> Message:
    if not isinstance(raw, Mapping):
        raise DataError(f"{where} must be an object with 'role' and 'content', found {type(raw).__name__}")
    role, content = raw.get("role"), raw.get("content")
    if role not in ROLES:
        raise DataError(f"{where}.role is {role!r}; use one of {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [text_part(content)]
    if not isinstance(content, list):
        raise DataError(f"{where}.content must be a string or a list of parts")
    parts = list(_check_parts(content, f"{where}.content"))
    if role != "user" and any(part["type"] == "image" for part in parts):
        raise DataError(f"{where}: an image stands in a {role!r} message; move it to a 'user' message")
    return {"role": role, "content": parts}


def _check_parts(parts: Sequence[Any], where: str) -> Iterator[Part]:
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield text_part(part["text"])
        elif kind == "image" and part.get("image") is not None:
            yield image_part(part["image"])
        else:
            raise DataError(
                f'{where}[{i}] must be {{"type": "text", "text": "..."}} or '
                f'{{"type": "image", "image": "path"}}, found {str(part)[:80]}'
            )
