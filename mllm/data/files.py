"""Files that are whole or not there, their hashes, and the one progress bar of the data tools."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeVar

from mllm.errors import DataError

T = TypeVar("T")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A place to write to, which gets the name `path` only when the block ends without an error.

    It is beside that name, so that a reader sees the old file or the new one, never a half. After an
    error nothing is left.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by the process id: in containers on several machines that write to one disk, it is the same.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp{path.suffix}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """A text file that gets its name only when the block ends without an error; see `atomic_path`."""
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        yield file


def write_atomic(path: Path, text: str) -> None:
    """Write a whole text file at once."""
    with atomic_writer(path) as file:
        file.write(text)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def track(items: Iterable[T], what: str, total: int, show: bool) -> Iterator[T]:
    """The items, with a progress bar on the error stream if `show`; quiet where that is no terminal."""
    if not show:
        yield from items
        return
    # Rich costs start-up time, and is needed only here.
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    yield from rich_track(items, what, total=total, console=console, disable=not console.is_terminal)
