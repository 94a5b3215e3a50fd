"""Find the checkpoint that a run continues from."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from mllm.errors import ConfigError


def last_checkpoint(output_dir: str | Path, resume: bool | str) -> str | None:
    """The checkpoint to resume from, or None to start anew.

    Args:
        output_dir: the run's directory.
        resume: False starts anew, True takes the newest complete checkpoint (or starts anew when there
            is none yet), a string names one.
    """
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
