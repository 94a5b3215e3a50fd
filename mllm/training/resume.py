"""Find the checkpoint that a run continues from, and refuse one that it could only continue wrongly.

The optimiser's state, the generators' and the order of the rows are taken over from it. What a checkpoint
holds beside our tensors are pickles that Trainer wrote: resume only from folders that you trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from mllm.errors import ConfigError
from mllm.model.checkpoint import read_manifest
from mllm.training.snapshots import complete_snapshots, fault

# Settings that the saved state of the optimiser brings along: other ones would silently not be used.
OF_THE_OPTIMIZER = ("optim", "learning_rate", "learning_rates", "weight_decay", "adam_beta1", "adam_beta2")
PLAIN = "one process or DDP"


def last_checkpoint(output_dir: str | Path, resume: bool | str, record: Mapping[str, Any]) -> str | None:
    """The checkpoint to resume from, or None to start anew.

    Args:
        output_dir: the run's directory.
        resume: False starts anew, `auto` and True take the newest complete checkpoint (or start anew when
            there is none yet), any other string names one.
        record: what this run's manifests will tell of it.

    Raises:
        ConfigError: there is no such checkpoint, or this run would not go on as it did: other rows, another
            order, another global batch, other settings of the optimiser, or an optimiser divided otherwise.
    """
    found = find_checkpoint(output_dir, resume)
    if found is None:
        return None
    saved = read_manifest(found)
    if _rows(saved["data"]) != _rows(record["data"]):
        raise ConfigError(
            f"train.resume: {found} was trained on other data, or with another data.mixing, data.grouping or "
            "train.seed; restore them, or start anew with train.resume=false"
        )
    _check_settings(found, saved, record)
    _check_engine(found, saved["batch"], record["batch"])
    _check_batch(found, saved["batch"], record["batch"])
    return str(found)


def agreed(found: str | None) -> str | None:
    """The checkpoint, if all ranks have found the same one.

    Raises:
        ConfigError: they have not; some would resume and others start anew.
    """
    everywhere = gather_object([found])
    if len(set(everywhere)) > 1:
        listed = ", ".join(f"rank {rank} {one}" for rank, one in enumerate(everywhere))
        raise ConfigError(
            f"train.resume: the ranks find different checkpoints ({listed}); train.output_dir must be on "
            "storage that all nodes share"
        )
    return found


class AsOftenAsSaid(TrainerCallback):
    """A resumed run logs, validates and saves as often as its recipe says, not as the checkpoint had it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The state is the checkpoint's by now."""
        state.compute_steps(args, state.max_steps)


def find_checkpoint(output_dir: str | Path, resume: bool | str) -> Path | None:
    """The checkpoint that `last_checkpoint` looks at, with its arguments and errors."""
    if not resume:
        return None
    if resume is True or resume == "auto":
        return next(reversed(complete_snapshots(Path(output_dir))), None)
    if (reason := fault(Path(resume))) is not None:
        raise ConfigError(f"train.resume: {resume!r} is no complete training checkpoint: {reason}")
    return Path(resume)


def _rows(data: Mapping[str, Any]) -> dict[str, Any]:
    """What decides on the order of the rows; where the files lie does not."""
    return {**data, "files": [{**file, "path": None} for file in data["files"]]}


def _check_settings(found: Path, saved: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    for section, keys in (("train", OF_THE_OPTIMIZER), ("tune", tuple(record["tune"]))):
        for key in keys:
            before, now = saved[section].get(key), record[section][key]
            if before != now:
                raise ConfigError(
                    f"train.resume: {found} was trained with {section}.{key}={before}, this run has {now}; "
                    f"set it back, or start a new run with model.init_from={found}"
                )


def _check_engine(found: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """An optimiser's state that is divided among ranks is of use to as many ranks and the same engine."""
    if saved["engine"] != now["engine"]:
        raise ConfigError(
            f"train.resume: {found} was saved under {saved['engine']}, this run is under {now['engine']}, "
            "which cannot take over the optimiser's state; go back to it, or start a new run with "
            f"model.init_from={found}"
        )
    if saved["ranks"] != now["ranks"] and now["engine"] != PLAIN:
        raise ConfigError(
            f"train.resume: {found} has the optimiser's state in {saved['ranks']} parts, {now['engine']} "
            f"on {now['ranks']} ranks cannot take it over; start {saved['ranks']} ranks, or a new run, whose "
            f"optimiser is new too, with model.init_from={found}"
        )


def _check_batch(found: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Rows are skipped by steps, so a step must have as many of them, however they are divided."""
    if saved["global"] != now["global"]:
        raise ConfigError(
            f"train.resume: {found} was trained with {saved['global']} rows a step, this run has "
            f"{now['global']} ({now['ranks']} ranks x {now['per_device']} x {now['accumulation']}): the rows "
            f"would come in another order; set train.global_batch_size={saved['global']}"
        )
    if saved["contrasted"] != now["contrasted"]:
        raise ConfigError(
            f"train.resume: {found} contrasted {saved['contrasted']} pairs with each other, this run would "
            f"{now['contrasted']}; set train.per_device_batch_size so that times {now['ranks']} ranks it is "
            f"{saved['contrasted']}"
        )
    if saved["steps_per_epoch"] != now["steps_per_epoch"]:
        raise ConfigError(
            f"train.resume: {found} had {saved['steps_per_epoch']} steps an epoch; {now['ranks']} ranks have "
            f"{now['steps_per_epoch']}, as each needs a row of the last; start {saved['ranks']} ranks"
        )
