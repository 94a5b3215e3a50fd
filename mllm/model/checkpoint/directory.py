"""A directory whose files appear all at once or not at all."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mllm.errors import ConfigError
from mllm.model.checkpoint.adapter_files import ADAPTER_DIR
from mllm.model.checkpoint.manifest import MANIFEST

LIST = ".files.json"


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A folder to write into, whose files appear at `path` together when the block ends well.

    A new directory appears by one rename. In one that is there already (a run's `output_dir` also holds
    its logs and intermediate checkpoints) the old manifest goes first and the new one comes last, so that
    a directory with a manifest is always whole; what is cut off in between, `finish_save` completes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    finish_save(path)
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
    (folder / LIST).write_text(json.dumps([file.name for file in folder.iterdir()]), encoding="utf-8")
    folder.rename(ready_place(path))
    finish_save(path)


def ready_place(path: Path) -> Path:
    """Where a save stands that is whole and is being laid over an older one at `path`."""
    return path.parent / f".{path.name}.ready"


def finish_save(path: Path) -> None:
    """Lay a save that is ready over the older one at `path`, also after a process died in the midst of it."""
    ready = ready_place(path)
    if not (ready / LIST).is_file():
        shutil.rmtree(ready, ignore_errors=True)  # moved, and not yet removed
        return
    names = json.loads((ready / LIST).read_text(encoding="utf-8"))
    if (ready / MANIFEST).exists():
        (path / MANIFEST).unlink(missing_ok=True)
    for old in path.glob("model*.safetensors*"):
        if old.name not in names:
            old.unlink()
    if ADAPTER_DIR not in names:  # an old one would be read with the new weights
        shutil.rmtree(path / ADAPTER_DIR, ignore_errors=True)
    for name in sorted(names, key=lambda name: name == MANIFEST):
        if (ready / name).exists():
            if (ready / name).is_dir():  # a directory that is not empty cannot be replaced
                shutil.rmtree(path / name, ignore_errors=True)
            (ready / name).replace(path / name)
    shutil.rmtree(ready)


def check_new(path: str | Path) -> None:
    """Raise `ConfigError` where something is in the place to write to."""
    if Path(path).exists():
        raise ConfigError(f"{path} is there already; remove it, or choose another place")


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends well, and is gone when it does not."""
    path = Path(path)
    check_new(path)
    with atomic_directory(path) as folder:
        yield folder
