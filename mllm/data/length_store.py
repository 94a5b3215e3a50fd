"""The file beside the data that keeps the sizes of rows while they become known.

Each row has its place, so that several processes, and runs, write and read it at the same time. It only
spares work: where it cannot be written, rows are measured again the next time.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np

# Numbers kept of a row, some of them unused: 32 bytes divide a page of memory and a sector of a disk, so that
# no row is ever there in part.
WIDTH = 8

logger = logging.getLogger(__name__)


class LengthStore:
    """Rows of sizes [kinds], on the disk; of a row that nobody has measured, zeros.

    It reads as a file and not as a memory map: a map of a file that is deleted on another node, or that a
    full disk has no room for, kills the process without a word.

    Args:
        path: the file; where it cannot be opened, what is kept is for this process alone.
        kinds: sizes of a row, at most `WIDTH`; the first is not 0 once a row is measured.
    """

    def __init__(self, path: Path, kinds: int) -> None:
        self.path, self.kinds = path, kinds
        self._file: IO[bytes]
        try:
            path.touch()
            self._file = path.open("r+b", buffering=0)
        except OSError as error:  # a folder of somebody else, a full disk
            logger.warning("lengths of rows are not kept in %s (%s)", path, error.strerror)
            self._file = TemporaryFile(buffering=0)  # noqa: SIM115  (lives as long as this object)

    def read(self, start: int, count: int) -> np.ndarray:
        """[count, kinds] from row `start` on."""
        sizes = np.zeros((count, WIDTH), np.int32)
        found = os.pread(self._file.fileno(), sizes.nbytes, start * 4 * WIDTH)
        whole = len(found) // (4 * WIDTH)
        sizes[:whole] = np.frombuffer(found, np.int32, whole * WIDTH).reshape(whole, WIDTH)
        return sizes[:, : self.kinds]

    def write(self, start: int, sizes: np.ndarray) -> None:
        """Keep [rows, kinds] from row `start` on."""
        padded = np.zeros((len(sizes), WIDTH), np.int32)
        padded[:, : self.kinds] = sizes
        try:
            os.pwrite(self._file.fileno(), padded.tobytes(), start * 4 * WIDTH)
        except OSError as error:
            logger.warning("lengths of rows are no longer kept in %s (%s)", self.path, error.strerror)
            self._file = TemporaryFile(buffering=0)  # noqa: SIM115

    def close(self) -> None:
        """Give the file back."""
        self._file.close()
