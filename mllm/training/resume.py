"""Find the checkpoint that a run continues from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from mllm.errors import ConfigError
from mllm.model.checkpoint import read_manifest


def last_checkpoint(output_dir: str | Path, resume: bool | str, data: Mapping[str, Any]) -> str | None:
    """The checkpoint to resume from, or None to start anew.

    Args:
        output_dir: the run's directory.
        resume: False starts anew, True takes the newest complete checkpoint (or starts anew when there
            is none yet), a string names one.
        data: what the run's record says of its rows.

    Raises:
        ConfigError: there is no such checkpoint, or it was trained on other rows, of which those that it has
            seen could not be skipped here.
    """
    found = _find(output_dir, resume)
    if found and _rows(read_manifest(Path(found))["data"]) != _rows(data):
        raise ConfigError(
            f"train.resume: {found} was trained on other data, or with another data.mixing, data.grouping or "
            "train.seed; restore them, or start anew with train.resume=false"
        )
    return found


def _rows(data: Mapping[str, Any]) -> dict[str, Any]:
    """What decides on the order of the rows; where the files lie does not."""
    return {**data, "files": [{**file, "path": None} for file in data["files"]]}


def _find(output_dir: str | Path, resume: bool | str) -> str | None:
    if not resume:
        return None
    if isinstance(resume, str):
        if not (Path(resume) / TRAINER_STATE_NAME).is_file():
            raise ConfigError(f"train.resume: {resume!r} is no complete training checkpoint")
        return resume
    # The trainer's state is written last, so a checkpoint that has it is complete.
    complete = [p for p in Path(output_dir).glob("checkpoint-*") if (p / TRAINER_STATE_NAME).is_file()]
    newest = max(complete, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
    return str(newest) if newest else None
