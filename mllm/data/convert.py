"""Any known format to our JSON Lines: `mllm data convert`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from mllm.data.files import atomic_writer, track
from mllm.data.grounding import BoxTasks
from mllm.data.rows import Rows, open_rows
from mllm.data.schema import Row, check_last, empty_answers, images_of, name_of
from mllm.errors import ConfigError, DataError


@dataclass
class Conversion:
    """What a conversion did; `empty_answers` are those without text, the first of them in `first_empty`."""

    output: Path
    rows: int = 0
    images: int = 0
    bad: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first_bad: str = ""
    empty_answers: int = 0
    first_empty: str = ""
    left_out: dict[str, int] = field(default_factory=dict)

    def count(self, row: Row, where: str) -> None:
        """A row was written."""
        self.rows += 1
        self.images += len(images_of(row["messages"]))
        if empty := empty_answers(row["messages"]):
            self.empty_answers += empty
            self.first_empty = self.first_empty or name_of({**row, "source": where})

    def count_bad(self, fault: str, where: str) -> None:
        """A row was left out."""
        self.bad += 1
        self.first_bad = self.first_bad or fault
        reason = _reason(fault, where)
        self.reasons[reason] = self.reasons.get(reason, 0) + 1


def convert(
    source: str | PathLike[str],
    output: str | PathLike[str],
    *,
    format: str = "auto",
    image_root: str | PathLike[str] | None = None,
    check_images: bool = False,
    per: str = "caption",
    boxes: BoxTasks | None = None,
    on_error: str = "error",
    max_bad: float = 0.01,
    progress: bool = True,
) -> Conversion:
    """Write every row of `source` to `output` in our schema, one JSON object a line.

    The output appears whole or not at all. Image paths stay as they are written, relative to the same
    `image_root`, which is only looked into when `check_images` is set.

    Args:
        source: a file that `open_rows` reads.
        output: the JSON Lines file to write; an older one is replaced.
        format: as for `open_rows`.
        image_root: the folder that image paths are relative to.
        check_images: a row whose image file is missing is a bad row.
        per: as for `open_rows`.
        boxes: as for `open_rows`.
        on_error: `error` stops at the first bad row; `skip` leaves bad rows out and counts them.
        max_bad: with `skip`, the largest share of bad rows that is still accepted.
        progress: show a progress bar on the error stream.

    Raises:
        DataError: a bad row, too many bad rows, or none that is good.
    """
    source, output = Path(source), Path(output)
    if on_error not in ("error", "skip"):
        raise ConfigError(f"on_error is {on_error!r}; use 'error' or 'skip'")
    if not 0 <= max_bad <= 1:
        raise ConfigError(f"max_bad is {max_bad}; it is a share, from 0 to 1")
    if output.exists() and source.exists() and output.samefile(source):
        raise DataError(f"{output} is the file that is read; write to another")
    rows = open_rows(source, format, image_root, check_images=check_images, per=per, boxes=boxes)
    done = Conversion(output, left_out=rows.left_out)
    with atomic_writer(output) as file:
        for i in track(range(len(rows)), f"convert {source.name}", len(rows), progress):
            try:
                row = _written(rows, i)
            except DataError as error:
                if on_error == "error":
                    raise
                done.count_bad(str(error), rows.where(i))
                continue
            file.write(json.dumps(row, ensure_ascii=False, default=_no_path) + "\n")
            done.count(row, rows.where(i))
        if done.rows == 0 or done.bad > max_bad * len(rows):
            raise DataError(
                f"{source}: {done.bad} of {len(rows)} rows are bad, more than the share "
                f"max_bad={max_bad} allows; the first: {done.first_bad}"
            )
    return done


def _written(rows: Rows, index: int) -> Row:
    """A row as the file has it, once nothing in it would stop a training."""
    row, where = rows.as_written(index), rows.where(index)
    rows.resolve(row, where)  # raises where an image is missing
    try:
        check_last(row["messages"], "assistant")
    except DataError as error:
        raise DataError(f"{name_of({**row, 'source': where})}: {error}") from None
    return row


def _no_path(image: Any) -> Any:
    raise DataError(f"{image} is inside the data set and has no path; train on the data set as it is")


def _reason(message: str, where: str) -> str:
    """The message without what differs from row to row, so that equal faults are counted together."""
    text = re.sub(r"^ \(id .*?\)(?=: )", "", message.removeprefix(where)).lstrip(": ")
    return re.sub(r"\d+", "N", re.sub(r"(?<=file )'[^']*'", "'...'", text))
