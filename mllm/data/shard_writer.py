"""Rows and their images -> .tar shards: `mllm data shard`.

Millions of small image files are slow to list, to copy and to read over a network; a few hundred large ones
are not. Images are copied as they are, byte for byte. A shard appears whole or not at all, so that writing
goes on where it was broken off.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from tarfile import USTAR_FORMAT, TarFile, TarInfo
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mllm.data.files import atomic_path, track, write_atomic
from mllm.data.images import FORMATS, image_size
from mllm.data.rows import Rows, open_rows
from mllm.data.schema import images_of
from mllm.data.shards import PICTURES, make_index, save_index, scan, shard_index
from mllm.data.stored import STORED
from mllm.errors import ConfigError, DataError

PLAN = "shards.json"


@dataclass
class Sharding:
    """What `write_shards` did; `found` are shards of an earlier call."""

    output: Path
    rows: int
    images: int = 0
    written: int = 0
    found: int = 0


def write_shards(
    source: str | PathLike[str],
    output: Path,
    *,
    rows_per_shard: int = 10_000,
    format: str = "auto",
    image_root: str | PathLike[str] | None = None,
    workers: int = 0,
    progress: bool = True,
) -> Sharding:
    """Write the rows of `source` into `output/00000.tar` and so on.

    Args:
        source: anything that `open_rows` opens.
        output: a folder; what an earlier, broken-off call with the same arguments has written is kept.
        rows_per_shard: samples of each shard.
        format, image_root: as for `open_rows`.
        workers: processes that write, each a shard at a time.
        progress: show a progress bar on the error stream.

    Raises:
        DataError: a bad row, or an image that cannot be read.
        ConfigError: the folder has shards of other rows.
    """
    rows = open_rows(source, format, image_root)
    plan = {"rows": len(rows), "rows_per_shard": rows_per_shard, rows.hashed: rows.identity()}
    _keep_plan(output, plan)
    done = Sharding(output, len(rows))
    shards = _Shards(rows, output, rows_per_shard)
    found: Any = DataLoader(shards, batch_size=None, num_workers=workers)
    for images in track(found, "writing shards", len(shards), progress):
        if isinstance(images, DataError):
            raise images
        done.written += images >= 0
        done.found += images < 0
        done.images += max(0, images)
    return done


def _keep_plan(output: Path, plan: dict[str, Any]) -> None:
    """Write down what these shards are of, or compare with it."""
    path = output / PLAN
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != plan:
            raise ConfigError(
                f"{output} has shards of other rows, or of another size; write to another folder"
            )
        return
    if output.is_dir() and any(output.glob("*.tar")):
        raise ConfigError(f"{output} has shards that are not from here; write to another folder")
    write_atomic(path, json.dumps(plan) + "\n")


class _Shards(Dataset[Any]):
    """Writes shard `i` when it is asked for; gives its images, -1 if it was there, or the error."""

    def __init__(self, rows: Rows, output: Path, size: int):
        self.rows, self.output, self.size = rows, output, size

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    def __getitem__(self, shard: int) -> int | DataError:
        path = self.output / f"{shard:05d}.tar"
        numbers = range(shard * self.size, min((shard + 1) * self.size, len(self.rows)))
        try:
            if path.is_file() and len(shard_index(path)) == len(numbers):
                return -1
            with atomic_path(path) as partial:
                with TarFile.open(partial, "w", format=USTAR_FORMAT) as tar:
                    images = sum(_add(tar, self.rows, number) for number in numbers)
                index = make_index(list(scan(partial)), path)
            save_index(index, path)
            return images
        except DataError as error:
            return error  # raised in a worker it would arrive as a page of traceback


def _add(tar: TarFile, rows: Rows, number: int) -> int:
    """One sample: its row as .json, and its images; gives their number."""
    row, key = rows[number], f"{number:09d}"
    files = {
        f"{key}.{i}.{suffix}": data for i, (suffix, data) in enumerate(_encoded(row, rows.where(number)))
    }
    names = iter(files)
    messages = [
        {**m, "content": [{**p, "image": next(names)} if p["type"] == "image" else p for p in m["content"]]}
        for m in row["messages"]
    ]
    text = json.dumps({"id": row["id"], "messages": messages}, ensure_ascii=False).encode()
    for name, data in {f"{key}.json": text, **files}.items():
        member = TarInfo(name)
        member.size = len(data)
        tar.addfile(member, BytesIO(data))
    return len(files)


def _encoded(row: Any, where: str) -> list[tuple[str, bytes]]:
    """(suffix, bytes) of each image of a row."""
    found = []
    for image in images_of(row["messages"]):
        image_size(image, where)  # what is no image is found here, not in training
        data = image.read() if isinstance(image, STORED) else Path(image).read_bytes()
        suffix = Path(str(image)).suffix.lower().lstrip(".")
        if suffix not in PICTURES:
            with Image.open(BytesIO(data), formats=FORMATS) as opened:
                suffix = "jpg" if opened.format == "MPO" else str(opened.format).lower()
        found.append((suffix, data))
    return found
