"""What is read and written on the way: question rows, prediction rows, hashes, atomic files.

    question file -> Question -> run.py -> predictions.jsonl (+ .meta.json) -> Prediction -> score.py

No torch here: scoring must run where the model never ran.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm.errors import DataError

# Where an answer may stand, by who wrote the file: ours and POPE's `answer`; other tools' `response`,
# `output`, `prediction`; LLaVA's and VCD's `text`. `text` comes last: elsewhere it holds the question.
ANSWER_FIELDS = ("answer", "response", "output", "prediction")
LAST_ANSWER_FIELD = "text"


@dataclass(frozen=True)
class Question:
    """One question of a benchmark; `where` is `file:line` for error messages."""

    question_id: int | str
    image: str
    text: str
    label: str | None = None
    category: str | None = None
    where: str = ""


@dataclass(frozen=True)
class Prediction:
    """One answer of a model. `question` is the text that it was asked, where the file tells."""

    answer: str
    question_id: int | str | None = None
    question: str | None = None
    image: str | None = None
    where: str = ""


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read JSON lines, or one JSON list of objects, as `(where, row)` pairs; blank lines are skipped.

    Raises:
        DataError: the file cannot be read, a line is not JSON or not an object, or there are no rows.
    """
    text = _read_text(path)
    rows: list[tuple[str, Any]] = []
    if text.lstrip().startswith("["):
        try:
            rows = [(f"{path}: item {i}", row) for i, row in enumerate(json.loads(text), 1)]
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not a JSON list: {error.msg}") from error
    else:
        # Not splitlines(): it would also break a row at U+2028 inside a string.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append((f"{path}:{number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not JSON ({error.msg}); write one object a line: {line[:60]!r}"
                ) from error
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: a row must be a JSON object, found {type(row).__name__}")
    if not rows:
        raise DataError(f"{path}: there are no rows in this file")
    return rows


def read_predictions(path: Path, answer_field: str | None = None) -> list[Prediction]:
    """Read a predictions file: ours, LLaVA's, VCD's or POPE's, JSON lines or a JSON list.

    Args:
        path: the file.
        answer_field: the field that holds the answer, where it cannot be told from the names.

    Raises:
        DataError: file, row and field of what is missing, of a wrong type, or ambiguous.
    """
    path = Path(path)
    predictions = []
    for where, row in read_rows(path):
        field = answer_field or _answer_field(row, where)
        if not isinstance(row.get(field), str):
            raise DataError(
                f"{where}: field {field!r} must be the answer as a string, found {row.get(field)!r}"
            )
        asked = row.get("question", row.get("prompt"))
        if asked is None and field != "text":
            asked = row.get("text")
        predictions.append(
            Prediction(
                answer=row[field],
                question_id=question_id(row, where) if "question_id" in row else None,
                question=asked if isinstance(asked, str) else None,
                image=row["image"] if isinstance(row.get("image"), str) else None,
                where=where,
            )
        )
    with_id = sum(p.question_id is not None for p in predictions)
    if 0 < with_id < len(predictions):
        bare = next(p for p in predictions if p.question_id is None)
        raise DataError(f"{bare.where}: field 'question_id' is missing, though other rows have it; add it")
    return predictions


def question_id(row: Mapping[str, Any], where: str) -> int | str:
    """The `question_id` of a row, an integer or a string.

    Raises:
        DataError: it is missing or of another type.
    """
    value = row.get("question_id")
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise DataError(f"{where}: field 'question_id' must be an integer or a string, found {value!r}")
    return value


def to_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def meta_path(predictions: Path) -> Path:
    """The sidecar that says how a predictions file was made: `predictions.jsonl.meta.json`."""
    return predictions.with_name(predictions.name + ".meta.json")


def read_meta(predictions: Path) -> dict[str, Any] | None:
    """The sidecar of a predictions file; None where there is none (a file of another tool).

    Raises:
        DataError: the sidecar is not a JSON object.
    """
    path = meta_path(predictions)
    if not path.exists():
        return None
    try:
        meta = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}); delete the file") from error
    if not isinstance(meta, dict):
        raise DataError(f"{path}: must be a JSON object, found {type(meta).__name__}; delete the file")
    return meta


def _answer_field(row: Mapping[str, Any], where: str) -> str:
    found = [name for name in ANSWER_FIELDS if name in row]
    if len(found) > 1:
        raise DataError(
            f"{where}: fields {' and '.join(found)} could each be the answer; say which (answer_field)"
        )
    if found:
        return found[0]
    if LAST_ANSWER_FIELD in row:
        return LAST_ANSWER_FIELD
    raise DataError(
        f"{where}: no field holds the answer; write 'answer' (ours, POPE's) or 'text' (LLaVA's, VCD's), "
        f"found {', '.join(sorted(row)) or 'nothing'}"
    )


def _read_text(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
