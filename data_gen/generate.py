"""Contexts and a teacher in, a JSON Lines file of instruction data out: `mllm data generate`."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import IO

from data_gen.contexts import Context
from data_gen.teachers import KINDS, NotEnoughError, Teacher, Turn
from mllm.data.files import track
from mllm.data.schema import Message, assistant, image_part, text_part, user
from mllm.errors import ConfigError, DataError


@dataclass
class Summary:
    """What was generated: rows per kind, and why contexts were left out, as `kind: reason`."""

    output: Path
    rows: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    resumed: int = 0


def generate(
    contexts: Sequence[Context],
    teacher: Teacher,
    kinds: Sequence[str],
    output: str | os.PathLike[str],
    seed: int = 0,
    *,
    image_folder: str = "",
    progress: bool = True,
) -> Summary:
    """Ask the teacher for every context and kind, and write the answers as rows of our schema.

    Rows go to `<output>.partial`, one at a time; the file gets its name when all are there. A run that
    was killed goes on where it stopped, and ends with the same bytes as one that was not: what a row
    says depends on the seed, the image and the kind alone, and rows that were made from another
    teacher, seed or annotation are made again.

    Args:
        contexts: what is known about each image.
        teacher: one of `data_gen.teachers.TEACHERS`, built.
        kinds: which of `KINDS`, in the order in which they are written for each image.
        output: the JSON Lines file; an older one is replaced.
        seed: varies wording and choice.
        image_folder: put in front of the file names, which stay relative to the image root.
        progress: show a progress bar on the error stream.

    Raises:
        DataError: there are no contexts, or none that gives a row.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds or len(set(kinds)) < len(kinds):
        raise ConfigError(f"kinds are {list(kinds)}; use some of {', '.join(KINDS)}, each once")
    if not contexts:
        raise DataError("no contexts: the annotations name no images; give others")
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    summary = Summary(output)
    partial = output.with_name(f"{output.name}.partial")
    with partial.open("a+b") as file:
        jobs = product(contexts, kinds)
        _write_rows(
            file,
            track(jobs, "generate", len(contexts) * len(kinds), progress),
            teacher,
            seed,
            image_folder,
            summary,
        )
    if not summary.rows:
        partial.unlink()
        reasons = "; ".join(f"{reason} ({count})" for reason, count in summary.skipped.items())
        raise DataError(f"no context gives a row: {reasons}; give richer annotations")
    os.replace(partial, output)
    return summary


def _write_rows(
    file: IO[bytes],
    jobs: Iterable[tuple[Context, str]],
    teacher: Teacher,
    seed: int,
    image_folder: str,
    summary: Summary,
) -> None:
    """Append the rows that the file does not have yet; on return it holds all of them and no others."""
    folder = f"{image_folder.rstrip('/')}/" if image_folder else ""
    file.seek(0)
    kept = 0  # bytes of the file that are known to be right
    earlier = _earlier_rows(file)
    expected = next(earlier, None)
    for context, kind in jobs:
        key = _key(context, kind, teacher, seed, folder)
        if expected is not None and expected[0] == key:
            kept = expected[1]
            _add(summary.rows, kind)
            summary.resumed += 1
            expected = next(earlier, None)
            continue
        try:
            turns = teacher.answer(context, kind, random.Random(f"{seed}-{context.image_id}-{kind}"))
        except NotEnoughError as reason:
            _add(summary.skipped, f"{kind}: {reason}")
            continue
        # A row that the earlier run did not have at this place: what follows there is not ours.
        expected = None
        file.truncate(kept)
        row = {
            "id": f"{context.image_id}-{kind}",
            "messages": _messages(turns, f"{folder}{context.file_name}"),
            "provenance": {"teacher": teacher.name, "kind": kind, "seed": seed, "key": key},
        }
        kept += file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()  # a killed run loses at most this row
        _add(summary.rows, kind)
    file.truncate(kept)
    file.flush()
    os.fsync(file.fileno())


def _add(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def _messages(turns: Sequence[Turn], image: str) -> list[Message]:
    """The turns as messages; the image stands before the first question, on a line of its own."""
    (question, answer), *rest = turns
    first: Message = {"role": "user", "content": [image_part(image), text_part(f"\n{question}")]}
    messages = [first, assistant(answer)]
    for question, answer in rest:
        messages += [user(question), assistant(answer)]
    return messages


def _key(context: Context, kind: str, teacher: Teacher, seed: int, folder: str) -> str:
    """What a row is made from, as a short hash: the same request gives the same key."""
    request = [teacher.name, kind, seed, folder, asdict(context)]
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def _earlier_rows(file: IO[bytes]) -> Iterator[tuple[str, int]]:
    """Key and end of each row of an earlier run, up to the first that is torn or foreign."""
    rows, end = [], 0
    for line in file:
        end += len(line)
        try:
            rows.append((str(json.loads(line)["provenance"]["key"]), end))
        except (ValueError, KeyError, TypeError):
            break
        if not line.endswith(b"\n"):
            rows.pop()
    return iter(rows)
