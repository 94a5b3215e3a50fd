"""Features of pictures on disk: written in blocks, found by the picture, read through a memory map.

    <folder>/features.json           what they were made by, for a reader
    <folder>/<name>.safetensors      a block: `features` [n, N, Dv] and `keys` [n, 2]

A block appears whole or not at all, under a name that follows from its keys. So any number of processes may
write into one folder, and a process that is killed loses the block it was filling.

A picture in a file is known by its path, size and time of change: reading half a million files again to hash
them would take as long as what the cache saves; one in a shard also by its place there. A picture in memory
is known by its pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mllm.errors import DataError

Key = tuple[int, int]  # two halves of a hash, each of them 64 bits


def image_key(image: Any) -> Key:
    """What a picture is known by.

    Raises:
        DataError: there is no such file.
    """
    if isinstance(image, Image.Image):
        facts = f"{image.mode} {image.size}".encode() + image.tobytes()
    elif isinstance(image, (str, os.PathLike)):
        facts = _file_facts(image)
    elif hasattr(image, "path"):  # within a shard
        facts = _file_facts(image.path) + f"\0{image.offset}".encode()
    else:  # encoded, in memory
        facts = image.read()
    digest = hashlib.blake2b(facts, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _file_facts(path: Any) -> bytes:
    try:
        state = os.stat(path)
    except (OSError, ValueError) as error:
        raise DataError(f"image {str(path)!r} cannot be read ({error}); fix the path") from error
    return f"{os.path.abspath(path)}\0{state.st_size}\0{state.st_mtime_ns}".encode()


class FeatureStore:
    """The features of pictures that one encoder made.

    Args:
        folder: of the blocks; made if it is not there.
        shape: (N, Dv) of a picture's features.
        dtype: of the features.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: torch.dtype):
        self.folder, self.shape, self.dtype = folder, shape, dtype
        folder.mkdir(parents=True, exist_ok=True)
        self._open: dict[int, Any] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # memory maps stay in their process

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, key: Key) -> bool:
        return self._find(key) is not None

    @property
    def image_bytes(self) -> int:
        """Bytes of a picture's features."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def refresh(self) -> None:
        """Look what is there; also what other processes have written.

        Raises:
            DataError: a block is damaged, or of other features.
        """
        self.files = sorted(self.folder.glob("*.safetensors"))
        self._open.clear()
        found = [self._keys(number) for number in range(len(self.files))]
        keys = np.concatenate([np.empty((0, 2), np.uint64), *found])
        block = np.repeat(np.arange(len(found), dtype=np.int32), [len(one) for one in found])
        row = np.concatenate([np.empty(0, np.int32), *(np.arange(len(one), dtype=np.int32) for one in found)])
        order = np.argsort(keys[:, 0], kind="stable")
        self._first, self._second = keys[order, 0], keys[order, 1]
        self._block, self._row = block[order], row[order]

    def add(self, keys: Sequence[Key], features: torch.Tensor) -> None:
        """Write a block: features [n, N, Dv] of n pictures."""
        tensors = {
            "features": features.to(self.dtype).contiguous().cpu(),
            "keys": torch.from_numpy(np.array(keys, dtype=np.uint64).view(np.int64)),
        }
        name = hashlib.sha256(tensors["keys"].numpy().tobytes()).hexdigest()[:24]
        partial = self.folder / f".{name}.{os.getpid()}.tmp"
        try:
            save_file(tensors, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, self.folder / f"{name}.safetensors")
        finally:
            partial.unlink(missing_ok=True)

    def take(self, images: Sequence[Any]) -> torch.Tensor:
        """Features [I, N, Dv] of pictures.

        Raises:
            DataError: a picture has none.
        """
        features = [torch.empty(0, *self.shape, dtype=self.dtype)]
        for image in images:
            place = self._find(image_key(image))
            if place is None:
                raise DataError(
                    f"image {str(image)!r} is not in the feature cache {str(self.folder)!r}: it was changed "
                    "since the run began, or the ranks do not share that folder; start the run again"
                )
            block, row = int(self._block[place]), int(self._row[place])
            features.append(self._reader(block).get_slice("features")[row : row + 1])
        return torch.cat(features)

    def _find(self, key: Key) -> int | None:
        place = int(np.searchsorted(self._first, np.uint64(key[0])))
        while place < len(self._first) and self._first[place] == key[0]:
            if self._second[place] == key[1]:
                return place
            place += 1
        return None

    def _reader(self, block: int) -> Any:
        if block not in self._open:
            self._open[block] = safe_open(self.files[block], framework="pt")
        return self._open[block]

    def _keys(self, block: int) -> np.ndarray:
        file = self.files[block]
        try:
            with safe_open(file, framework="pt") as reader:
                keys = reader.get_tensor("keys").numpy().view(np.uint64)  # [n, 2]
                shape = tuple(reader.get_slice("features").get_shape())
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file}: this block of the feature cache is damaged; delete it") from error
        if shape != (len(keys), *self.shape):
            raise DataError(f"{file}: holds features {list(shape)}, not those of this encoder; delete it")
        return keys
