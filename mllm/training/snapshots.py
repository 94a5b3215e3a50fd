"""The checkpoints of a run on disk: each of them whole or not there, whenever the process is killed.

    output_dir/.saving/checkpoint-40     being written by all ranks, or being removed
    output_dir/checkpoint-20             whole: it got its name by one rename, after everything was on disk
    output_dir/checkpoint-20/complete.json   written last, removed first: its files and their sizes

The name alone would do on a local disk. The list of files also finds what was cut short later, and what a
storage that renames file by file left behind.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from mllm.errors import CheckpointError
from mllm.model.checkpoint import MANIFEST

STAGING = ".saving"
MARKER = "complete.json"
PREFIX = "checkpoint-"

logger = logging.getLogger(__name__)


def clean(output_dir: Path) -> None:
    """Remove what a save, a removal or a rehearsal that did not end has left."""
    if (output_dir / STAGING).exists():
        logger.warning("%s: removed, a save had not ended", output_dir / STAGING)
        shutil.rmtree(output_dir / STAGING)


def publish(folder: Path, output_dir: Path, about: Mapping[str, Any]) -> Path:
    """Give a checkpoint that all ranks have written its marker and its name.

    Args:
        folder: where it was written, in `STAGING`.
        output_dir: of the run.
        about: what the marker tells beside the files; `ranks` and `launch` are needed.

    Returns:
        Its place.

    Raises:
        CheckpointError: the files of some rank are not there.
    """
    files = files_of_all(folder, about["ranks"])
    for path in files.values():
        sync(path)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    (folder / MARKER).write_text(json.dumps({**about, "files": sizes}, indent=1) + "\n", encoding="utf-8")
    for path in (folder / MARKER, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)
    place = output_dir / folder.name
    if place.exists():  # of an earlier run, or from before a run went back
        discard(place)
    folder.rename(place)
    sync(output_dir)
    return place


def files_of_all(folder: Path, ranks: int, patience: float = 30) -> dict[str, Path]:
    """By name, the files of a checkpoint that all ranks have written.

    NFS shows what another node has written up to `patience` seconds later.

    Raises:
        CheckpointError: the files of some rank are not there.
    """
    until = time.monotonic() + patience
    while True:
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        states = [name for name in files if name.startswith("rng_state")]
        if len(states) == ranks and {TRAINER_STATE_NAME, MANIFEST} <= set(files):
            return files
        if time.monotonic() > until:
            raise CheckpointError(
                f"{folder}: {len(states)} of {ranks} ranks have written their part; train.output_dir must be "
                "on storage that all nodes share"
            )
        time.sleep(0.5)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rotate(output_dir: Path, limit: int | None, best: Path | None = None) -> None:
    """Remove the oldest checkpoints until `limit` complete ones are left, and the best; None keeps all."""
    if limit is not None:
        for old in complete_snapshots(output_dir)[:-limit]:
            if old != best:
                discard(old)


def discard(path: Path) -> None:
    """Remove a checkpoint, so that it is never half there under its name."""
    (path / MARKER).unlink(missing_ok=True)
    grave = path.parent / STAGING / f"removed-{path.name}"
    shutil.rmtree(grave, ignore_errors=True)
    grave.parent.mkdir(exist_ok=True)
    path.rename(grave)
    shutil.rmtree(grave)


def complete_snapshots(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, in the order in which they were written; others are reported.

    A run that went back to an earlier step, or began anew in the same folder, has written its checkpoints
    after those of higher steps that are still there: the launch decides, then the step.
    """
    found = []
    for path in output_dir.glob(f"{PREFIX}*"):
        if not path.name.removeprefix(PREFIX).isdigit():
            continue
        if (reason := fault(path)) is None:
            found.append((read_marker(path)["launch"], step_of(path), path))
        else:
            logger.warning("%s is ignored: %s", path, reason)
    return [path for *_, path in sorted(found)]


def next_launch(output_dir: Path) -> int:
    """The number of this launch among those that have left checkpoints."""
    return 1 + max((read_marker(path)["launch"] for path in complete_snapshots(output_dir)), default=0)


def step_of(path: Path) -> int:
    """The optimiser step of a checkpoint, by its name."""
    return int(path.name.removeprefix(PREFIX))


def read_marker(path: Path) -> dict[str, Any]:
    """What the marker of a complete checkpoint says."""
    marker: dict[str, Any] = json.loads((path / MARKER).read_text(encoding="utf-8"))
    return marker


def fault(path: Path) -> str | None:
    """Why a folder is no complete checkpoint; None if it is one."""
    try:
        listed = read_marker(path)["files"]
        json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        return f"it has no {Path(error.filename).name}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MARKER} or {TRAINER_STATE_NAME} cannot be read ({error})"
    for name, size in listed.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (found := (path / name).stat().st_size) != size:
            return f"{name} has {found} bytes of {size}"
    return None
