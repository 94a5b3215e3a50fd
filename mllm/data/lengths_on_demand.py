"""Lengths of rows that are measured when a step first needs them, so that no set is too large to start on.

A step needs the lengths of its own rows and of no others. Every rank measures them for itself, in less than
a millisecond a row, and keeps them beside the data, where other ranks, later epochs and later runs find them.
"""

from __future__ import annotations

import os
from dataclasses import fields
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from mllm.data.collator import Collator
from mllm.data.lengths import Lengths, lengths_file, read_kept, sizes_of
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
    """Sizes of one file's rows, [N, KINDS] on the disk: zeros where none has been measured yet."""

    def __init__(self, rows: Rows, collator: Collator) -> None:
        self.rows, self.collator = rows, collator
        complete = lengths_file(rows, collator)
        if (kept := read_kept(complete)) is not None:
            self._sizes = kept.T
            return
        path = complete.with_suffix(".part")
        self._file: Any = TemporaryFile()  # noqa: SIM115  (lives as long as this object)
        if os.access(path.parent, os.W_OK):
            path.touch()
            self._file = path.open("r+b", buffering=0)
        os.truncate(self._file.fileno(), 4 * KINDS * len(rows))
        # Read through a map, so that what other ranks write is seen; written as a file, since on a full disk
        # a write into the map would kill the process without a word.
        self._sizes = np.memmap(self._file, np.int32, mode="r", shape=(len(rows), KINDS))

    def __getitem__(self, number: int) -> np.ndarray:
        if self._sizes[number, 0]:  # no row has no tokens
            return self._sizes[number]
        found = np.array(sizes_of(self.rows[number], self.collator), np.int32)
        os.pwrite(self._file.fileno(), found.tobytes(), number * found.nbytes)
        return found
