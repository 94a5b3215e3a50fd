"""Lengths of rows that are measured when a step first needs them, so that no set is too large to start on.

A step needs the lengths of its own rows and of no others. Every rank measures them for itself, in less than
a millisecond a row, and keeps them beside the data, where other ranks, later epochs and later runs find them.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from mllm.data.collator import Collator
from mllm.data.length_store import LengthStore
from mllm.data.lengths import Lengths, lengths_file, part_file, read_kept, sizes_of
from mllm.data.mixture import Mixture
from mllm.data.rows import Rows

KINDS = len(fields(Lengths))


class LengthsOnDemand:
    """Stands for the `Lengths` of a mixture's rows where no one looks at all of them at once.

    Raises:
        DataError: from `take`, a row that could not be trained on; names it.
    """

    def __init__(self, mixture: Mixture, collator: Collator) -> None:
        self.mixture, self.collator = mixture, collator
        self._known = [_Known(rows, collator) for rows in mixture.datasets]  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.mixture)

    def take(self, rows: np.ndarray) -> Lengths:
        """The sizes of these rows, in this order."""
        sizes = np.empty((len(rows), KINDS), np.int32)
        source, place = self.mixture.source[rows], self.mixture.row[rows]
        for k in np.unique(source):
            mine = source == k
            sizes[mine] = [self._known[k][number] for number in place[mine].tolist()]
        return Lengths(*sizes.T)


class _Known:
    """Sizes of one file's rows."""

    def __init__(self, rows: Rows, collator: Collator) -> None:
        self.rows, self.collator = rows, collator
        place = lengths_file(rows, collator)
        self._complete: Any = read_kept(place)
        self._store = LengthStore(part_file(place), KINDS) if self._complete is None else None

    def __getitem__(self, number: int) -> np.ndarray:
        if self._store is None:
            of_row: np.ndarray = self._complete[:, number]
            return of_row
        known: np.ndarray = self._store.read(number, 1)[0]
        if known[0] == 0:  # no row has no tokens
            known = np.array(sizes_of(self.rows[number], self.collator), np.int32)
            self._store.write(number, known[None])
        return known
