"""Every row of a run's data as training would see it: parsed, tokenised, its pictures decoded and prepared.

Faults are collected, not raised, so that one pass over the data finds all of them.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from mllm.data.files import track
from mllm.data.mixture import Mixture
from mllm.data.schema import empty_answers, name_of
from mllm.errors import DataError

CHUNK = 32


@dataclass
class DataCheck:
    """What was found.

    Attributes:
        rows: that were looked at; each row of the files once, however often it is drawn.
        pictures: that were decoded; with tiling, their views.
        turns, dropped: messages, and those that `data.max_length` has no room for.
        over: rows that are shortened for it.
        empty: answers without text; they are trained on, by their end token alone.
        first_empty: the first row that has one.
        bad: row and fault of each row that cannot be trained on.
        longest: numbers of the longest good rows, the longest first.
        tokens: of the longest row.
    """

    rows: int = 0
    pictures: int = 0
    turns: int = 0
    dropped: int = 0
    over: int = 0
    empty: int = 0
    first_empty: str = ""
    bad: list[dict[str, str]] = field(default_factory=list)
    longest: list[int] = field(default_factory=list)
    tokens: int = 0

    @property
    def faults(self) -> dict[str, int]:
        """How often each kind of fault was found; names and numbers in a message do not make a kind."""
        kinds = Counter(re.sub(r"\d+", "N", re.sub(r"'[^']*'", "'...'", one["fault"])) for one in self.bad)
        return dict(kinds.most_common())

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "faults": self.faults}


def check_rows(
    data: Mixture,
    collator: Any,
    *,
    workers: int = 0,
    keep: int = 8,
    rank: int = 0,
    ranks: int = 1,
    show: bool = True,
) -> DataCheck:
    """Look at every row that is drawn, once.

    Args:
        data: the rows.
        collator: makes batches of them.
        workers: processes that do it.
        keep: how many of the longest rows to name.
        rank, ranks: which share of the rows is looked at here.
        show: a progress bar.
    """
    pairs = np.stack([data.source.astype(np.int64), data.row])
    numbers = np.sort(np.unique(pairs, axis=1, return_index=True)[1])[rank::ranks]
    chunks: Any = DataLoader(_Chunks(data, collator, numbers), batch_size=None, num_workers=workers)
    found = DataCheck(rows=len(numbers))
    longest: list[tuple[int, int]] = []  # a heap of (tokens, minus the number)
    for chunk in track(chunks, "data", len(chunks), show):
        for number, result in chunk:
            if isinstance(result, dict):
                found.bad.append(result)
                continue
            tokens, pictures, turns, dropped, empty = result
            heapq.heappush(longest, (tokens, -number))
            if len(longest) > keep:
                heapq.heappop(longest)
            found.pictures += pictures
            found.turns += turns
            found.dropped += dropped
            found.over += dropped > 0
            if empty:
                found.empty += empty
                found.first_empty = found.first_empty or name_of(data[number])
    found.longest = [-number for _, number in sorted(longest, reverse=True)]
    found.tokens = max(longest, default=(0, 0))[0]
    return found


class _Chunks(Dataset[Any]):
    """Sizes or faults of `CHUNK` rows at a time."""

    def __init__(self, data: Mixture, collator: Any, numbers: Sequence[int] | np.ndarray):
        self.data, self.collator, self.numbers = data, collator, numbers

    def __len__(self) -> int:
        return math.ceil(len(self.numbers) / CHUNK)

    def __getitem__(self, chunk: int) -> list[tuple[int, Any]]:
        numbers = self.numbers[chunk * CHUNK : (chunk + 1) * CHUNK]
        return [(int(number), self._look(int(number))) for number in numbers]

    def _look(self, number: int) -> tuple[int, ...] | dict[str, str]:
        try:
            row = self.data[number]
            batch = self.collator([row])
        except DataError as error:
            where, _, fault = str(error).partition(": ")
            return {"row": where, "fault": fault or str(error)}
        counts = batch["counts"]
        tokens, pictures = (sum(getattr(count, key) for count in counts) for key in ("tokens", "views"))
        turns, empty = len(row["messages"]), empty_answers(row["messages"])
        return tokens, pictures, turns, batch.get("dropped_turns", 0), empty
