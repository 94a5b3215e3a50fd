"""Before step 1, in the real set-up of ranks: write a checkpoint, read it back, compare, count the disk.

What would otherwise show after the first hours (a tensor that is not saved, a model that does not load, an
optimiser that does not come back, a disk that fills up on day two) shows now. It changes nothing: the run
behind it computes the same, bit for bit.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from mllm.errors import CheckpointError, ConfigError, MllmError, TrainingStoppedError
from mllm.model.checkpoint import load_model, read_manifest
from mllm.training.aside import generators_kept
from mllm.training.saving import SavingTrainer, amount
from mllm.training.snapshots import STAGING, complete_snapshots, files_of_all
from mllm.training.validation import KeepBest


class Rehearsal(TrainerCallback):
    """Rehearses saving and loading when the optimiser and the ranks are there."""

    def __init__(self, trainer: SavingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `rehearse`."""
        rehearse(self.trainer)


def rehearse(trainer: SavingTrainer) -> None:
    """Write a checkpoint aside, by all ranks; load it, compare it, resume from it, remove it.

    Raises:
        TrainingStoppedError: it is not what was saved, or the disk cannot hold what the run will write.
    """
    args = trainer.args
    optimizer: Any = trainer.optimizer
    fresh = not optimizer.state
    with generators_kept():
        folder = trainer.write_aside()
        if trainer.is_fsdp_enabled and fresh:
            # To have something to save, torch took a step of zeros; Adam would count it.
            optimizer.state.clear()
        try:
            problem = [None if not args.should_save else _problem(trainer, folder)]
            broadcast_object_list(problem)  # so that every rank stops, and none waits for another
            if problem[0] is not None:
                raise TrainingStoppedError(problem[0])
            if not trainer.is_fsdp_enabled:  # its optimiser has no state that could be loaded before step 1
                trainer.read_back(folder)
            trainer.accelerator.wait_for_everyone()
        finally:
            if args.should_save:
                shutil.rmtree(Path(str(args.output_dir)) / STAGING, ignore_errors=True)


def _problem(trainer: SavingTrainer, folder: Path) -> str | None:
    """What is wrong with a checkpoint that was just written, in one line; None if nothing."""
    try:
        if trainer.args.save_strategy != "no":
            files_of_all(folder, trainer.args.world_size)
        _compare(trainer, folder)
        _check_disk(trainer, folder)
    except (MllmError, OSError, SafetensorError) as error:
        return f"rehearsal of a save: {error}"
    return None


def _compare(trainer: SavingTrainer, folder: Path) -> None:
    """Load the model as a user would, which checks every tensor and the probe, and compare all bits."""
    with _built_whole(trainer):
        loaded = load_model(folder).state_dict()
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return  # no rank has whole tensors; the checksums in the manifest are of the gathered ones
    own, saved = trainer._plain_model().state_dict(), read_manifest(folder)["weights"]
    if odd := sorted(set(own) ^ set(loaded)):
        raise CheckpointError(f"{odd[0]!r} stands on one side only of a save")
    for name, tensor in own.items():
        here, there = tensor.detach().cpu(), loaded[name]
        if torch.equal(here, there):
            continue
        # A layer that the loss does not reach, in a part whose base was read in 16 bit and tuned in 32.
        rounded = [there.to(kind).to(here.dtype) for kind in (torch.bfloat16, torch.float16)]
        if name in saved or not any(torch.equal(here, one) for one in rounded):
            raise CheckpointError(f"{name!r} is not what was saved")


@contextmanager
def _built_whole(trainer: SavingTrainer) -> Iterator[None]:
    """Under ZeRO-3 transformers divides every model it builds among the ranks; this one is of one rank."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(trainer.accelerator.state.deepspeed_plugin.hf_ds_config)


def _check_disk(trainer: SavingTrainer, folder: Path) -> None:
    """Is there room for the checkpoints that the run will keep, and for its last one?"""
    args, state = trainer.args, trainer.state
    output_dir = Path(str(args.output_dir))
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    trainer.checkpoint_bytes = sum(sizes.values()) + _optimizer_growth(trainer)
    final = sum(size for path, size in sizes.items() if path.suffix == ".safetensors")
    limit, beside = trainer.limit, 0
    best = any(isinstance(callback, KeepBest) for callback in trainer.callback_handler.callbacks)
    saves = (limit or 1) + 1 if best else 0  # the best one stays until a better one is complete
    if args.save_strategy == "steps":
        beside = int(best)  # and beside the last ones
        saves = math.ceil((state.max_steps - state.global_step) / args.save_steps) + beside
    if limit is not None:  # one more than are kept, while the oldest is still there
        saves = min(saves, max(1, limit + beside + 1 - len(complete_snapshots(output_dir))))
    needed = saves * trainer.checkpoint_bytes + final
    free = shutil.disk_usage(output_dir).free + sum(sizes.values())  # these will be removed
    if needed > free:
        fit = int((free - final) // trainer.checkpoint_bytes) - 1 - beside
        cure = (
            f"set train.save_total_limit={fit}, or "
            if saves and fit > 0 and (limit or math.inf) > fit
            else ""
        )
        raise ConfigError(
            f"the disk of train.output_dir {str(output_dir)!r} has {amount(free)} free, the run will write "
            f"{saves} checkpoints of {amount(trainer.checkpoint_bytes)} beside its model of {amount(final)}; "
            f"{cure}make room"
        )


def _optimizer_growth(trainer: SavingTrainer) -> int:
    """Bytes that the optimiser's state will have and has not yet: Adam makes its two moments in step 1."""
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, DeepSpeed's
        optimizer = optimizer.optimizer
    if any(tensor.dim() for state in optimizer.state.values() for tensor in state.values()):
        return 0
    trained = [p for p in trainer._plain_model().parameters() if p.requires_grad]
    if trainer.is_deepspeed_enabled:  # in float32, whatever the weights are; with ZeRO-3 these are shells
        return sum(8 * getattr(p, "ds_numel", p.numel()) for p in trained)
    return sum(2 * p.numel() * p.element_size() for p in trained)
