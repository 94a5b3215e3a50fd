"""Files that are whole or not there, and the one progress bar of the data tools."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeVar

T = TypeVar("T")


@contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """A text file that gets its name only when the block ends without an error.

    It is written beside its place and renamed, so that a reader sees the old file or the new one,
    never a half. After an error nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
