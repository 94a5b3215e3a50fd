"""A directory whose files appear all at once or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mllm.model.checkpoint.adapter_files import ADAPTER_DIR
from mllm.model.checkpoint.manifest import MANIFEST


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A folder to write into, whose files appear at `path` together when the block ends well.

    A new directory appears by one rename. In one that is there already (a run's `output_dir` also holds
    its logs and intermediate checkpoints) the old manifest goes first and the new one comes last, so that
    a directory with a manifest is always whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    folder = path.parent / f".{path.name}.tmp-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    with suppress(OSError):  # raised where a directory stands that is not empty
        folder.rename(path)
        return
    (path / MANIFEST).unlink(missing_ok=True)
    for old in path.glob("model*.safetensors*"):
        old.unlink()
    shutil.rmtree(path / ADAPTER_DIR, ignore_errors=True)  # the new one may have none
    for new in sorted(folder.iterdir(), key=lambda file: file.name == MANIFEST):
        if new.is_dir():  # a directory that is not empty cannot be replaced
            shutil.rmtree(path / new.name, ignore_errors=True)
        new.replace(path / new.name)
    folder.rmdir()
