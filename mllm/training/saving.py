"""How a run writes its checkpoints and reads them back: the part of the trainer that touches the disk."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, save_fsdp_optimizer, set_seed
from safetensors import SafetensorError
from torch import nn
from transformers import ProcessorMixin, Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import ExportableState

from mllm.errors import MllmError, TrainingStoppedError
from mllm.model.checkpoint import restore, save
from mllm.model.parted import PartedModel
from mllm.model.probe import probe
from mllm.training.sharded import full_state, load_trained, own_storage, save_trained
from mllm.training.snapshots import (
    PREFIX,
    STAGING,
    complete_snapshots,
    next_launch,
    publish,
    read_marker,
    rotate,
)
from mllm.training.validation import KeepBest

logger = logging.getLogger(__name__)

FSDP_SHARES = "pytorch_model_fsdp_0"  # accelerate's name


class SavingTrainer(Trainer):
    """Trainer whose checkpoints are whole or not there, and hold our models.

    Args:
        processor: saved with every checkpoint.
        record: what every manifest should tell of this run.
        **kwargs: of `transformers.Trainer`.

    Attributes:
        checkpoint_bytes: what a checkpoint is expected to take on the disk.
        limit: complete checkpoints that are kept, beside the best; None keeps all.
    """

    def __init__(self, *, processor: ProcessorMixin, record: Mapping[str, Any], **kwargs: Any):
        super().__init__(**kwargs)
        self.processor = processor
        self.record = record
        self.probe: dict[str, Any] = {}
        if self.is_deepspeed_enabled:
            self._plain_model().register_load_state_dict_post_hook(frozen_may_be_missing)
        # Weights and two moments of Adam, until the rehearsal has measured it.
        trained = [p for p in self._plain_model().parameters() if p.requires_grad]
        self.checkpoint_bytes = sum(p.numel() * (p.element_size() + 8) for p in trained)
        # Of 1 Trainer would make, at the end, that only the best is left, and the last is gone.
        self.limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._launch: int | None = None
        self._staging: Path | None = None
        self._failure: Exception | None = None

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer lays checkpoints and removes old ones; while one is written, a place of its own."""
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def write_aside(self) -> Path:
        """Write a checkpoint, by all ranks, where nobody takes it for one; returns its place."""
        output_dir = Path(str(self.args.output_dir))
        with self._later():
            if self.args.should_save:
                shutil.rmtree(output_dir / STAGING, ignore_errors=True)
                output_dir.mkdir(parents=True, exist_ok=True)
                if shutil.disk_usage(output_dir).free < self.checkpoint_bytes:
                    # A limit that was lowered because the disk was full; the last complete one stays.
                    rotate(output_dir, self.limit, self._best())
        self._meet()  # or the first would remove what another has begun to write
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # one that the run did not have before it was resumed
                kept: Any = self.state.stateful_callbacks
                kept.setdefault(type(callback).__name__, callback.state())
        self._staging = output_dir / STAGING
        try:
            with self._removed_if_unfinished():
                with self._unless_together():
                    super()._save_checkpoint(self.model_wrapped, None)
                self._meet()
        finally:
            self._staging = None
        return output_dir / STAGING / f"{PREFIX}{self.state.global_step}"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A new checkpoint is complete before an old one goes."""
        folder = self.write_aside()
        with self._removed_if_unfinished():
            with self._later():
                if self.args.should_save:
                    self._publish(folder)
            # Else the others would wait for it within their next step, where a watchdog takes them for stuck.
            self._meet()
        self._best()

    def _publish(self, folder: Path) -> None:
        output_dir = Path(str(self.args.output_dir))
        if self._launch is None:
            self._launch = next_launch(output_dir)
        about = {
            "step": self.state.global_step,
            "launch": self._launch,
            "ranks": self.args.world_size,
            "expected_bytes": self.checkpoint_bytes,
        }
        publish(folder, output_dir, about)
        rotate(output_dir, self.limit, self._best())
        shutil.rmtree(output_dir / STAGING, ignore_errors=True)

    def _best(self) -> Path | None:
        """The best checkpoint by the validation; Trainer has noted it where it was written aside."""
        keeps = any(isinstance(callback, KeepBest) for callback in self.callback_handler.callbacks)
        if not keeps or not self.state.best_global_step:
            return None
        best = Path(str(self.args.output_dir)) / f"{PREFIX}{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return best

    @contextmanager
    def _removed_if_unfinished(self) -> Iterator[None]:
        """What was written of a checkpoint goes at any error, and that of a full disk becomes one line."""
        output_dir = Path(str(self.args.output_dir))
        with full_disk_stops(output_dir, self.checkpoint_bytes):
            try:
                yield
            except BaseException:
                shutil.rmtree(output_dir / STAGING, ignore_errors=True)
                raise

    @contextmanager
    def _later(self) -> Iterator[None]:
        """An error of what this rank does alone waits until all `_meet`: they would wait for it for ever."""
        try:
            with full_disk_stops(Path(str(self.args.output_dir)), self.checkpoint_bytes):
                yield
        except (OSError, RuntimeError, SafetensorError, MllmError) as error:
            self._failure = self._failure or error

    def _unless_together(self) -> AbstractContextManager[None]:
        """`_later`; but where all ranks write a share, in step with each other, an error ends this one."""
        return nullcontext() if self.is_deepspeed_enabled or self.is_fsdp_enabled else self._later()

    def _meet(self) -> None:
        """Wait for all ranks; what has failed on one of them is raised on all."""
        own, self._failure = self._failure, None
        texts = gather_object([own and " ".join(f"{own}".split())])
        if own is not None:
            raise own
        if failed := [(rank, text) for rank, text in enumerate(texts) if text is not None]:
            raise TrainingStoppedError("rank {} could not save: {}".format(*failed[0]))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a whole checkpoint of ours; the probe is computed by every rank, or ZeRO-3 would hang."""
        self.probe = probe(self._plain_model())
        if self.is_fsdp_enabled and self.args.bf16:
            self.probe["dtype"] = "bfloat16"  # of the arithmetic; the weights are in float32
        if self.is_fsdp_enabled:
            self._save(output_dir, full_state(self._plain_model(), keep=self.args.should_save))
        else:
            super().save_model(output_dir, _internal_call)
        self._meet()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # every rank calls, one writes
            return
        with self._later():
            save(
                self._plain_model(),
                self.processor,
                Path(output_dir or str(self.args.output_dir)),
                record={**self.record, "step": self.state.global_step},
                # With ZeRO-3 the model holds empty shells; the gathered tensors come from the caller.
                state_dict=own_storage(state_dict) if state_dict else None,
                probed=self.probe,
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._unless_together():
            # Not as Trainer does it: each save would hold the frozen weights again.
            engine: Any = self.model_wrapped
            if self.is_deepspeed_enabled:
                engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            elif self.is_fsdp_enabled:
                save_trained(engine, Path(output_dir) / FSDP_SHARES)
                plugin = self.accelerator.state.fsdp_plugin
                save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, engine, output_dir)
            else:
                super()._save_optimizer_and_scheduler(output_dir)
                return
            scheduler: Any = self.lr_scheduler
            if self.args.should_save and not self._engine_has_scheduler():
                torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _engine_has_scheduler(self) -> bool:
        """Whether DeepSpeed's file names a scheduler, which it then saves itself."""
        if not self.is_deepspeed_enabled:
            return False
        from accelerate.utils import DeepSpeedSchedulerWrapper  # only there where DeepSpeed is

        return isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last that every rank writes; what follows is rank 0's."""
        with self._later():
            super()._save_rng_state(output_dir)
        self._meet()

    def _plain_model(self) -> PartedModel:
        return self.accelerator.unwrap_model(self.model)

    def read_back(self, folder: Path) -> None:
        """Take over a checkpoint as a resumed run would, in the middle of this one."""
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model_wrapped, str(folder))
        else:
            self._load_from_checkpoint(str(folder))
        self._load_optimizer_and_scheduler(str(folder))
        self._load_scaler(str(folder))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing if the last step has been taken: Trainer would take one more of a resumed run's epoch."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Put a checkpoint's tensors into the model that is already built and tuned."""
        target: Any = self.model if model is None else model
        if self.is_fsdp_enabled:  # by shares, as they were written
            load_trained(target, Path(resume_from_checkpoint) / FSDP_SHARES)
            return
        restore(target, Path(resume_from_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """This rank's generators as they were; on another number of ranks, new ones that are told apart."""
        if checkpoint is None:
            return
        marker, now = read_marker(Path(checkpoint)), self.args.world_size
        saved = marker["ranks"]
        if saved == now:
            super()._load_rng_state(checkpoint)
            return
        # Neither the states of ranks that are gone nor one and the same for all: dropout differs by rank.
        seed = (self.args.seed + 1_000_003 * marker["step"] + self.args.process_index) % 2**32
        set_seed(seed)
        if self.is_world_process_zero():
            logger.warning(
                "resumed on %d ranks, trained on %d: each step has the rows it would have; dropout is anew",
                now,
                saved,
            )


def frozen_may_be_missing(model: nn.Module, keys: Any) -> None:
    """A hook of `load_state_dict`: frozen weights are those that the model was built with.

    That they are what the run had before is checked when it resumes (`check_grounds`).
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]


@contextmanager
def full_disk_stops(output_dir: Path, needed: int) -> Iterator[None]:
    """Turn the errors of a full disk into one line.

    Raises:
        TrainingStoppedError: the disk was full; names what it has and what it needs.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(error, output_dir, needed):
            raise
        free = shutil.disk_usage(output_dir).free
        whole = complete_snapshots(output_dir)
        last = (
            f"the last complete checkpoint is {whole[-1]}" if whole else "there is no complete checkpoint yet"
        )
        raise TrainingStoppedError(
            f"the disk of train.output_dir {str(output_dir)!r} is full: a checkpoint takes about "
            f"{amount(needed)}, {amount(free)} are free; {last}; make room, or lower train.save_total_limit, "
            "and go on with train.resume=auto"
        ) from error


def _is_full(error: BaseException, output_dir: Path, needed: int) -> bool:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    if "No space left" in text or "quota exceeded" in text:  # safetensors
        return True
    # torch.save does not say why it could not write.
    by_torch = "PytorchStreamWriter" in text or "inline_container" in text
    return by_torch and shutil.disk_usage(output_dir).free < needed


def amount(size: float) -> str:
    """Bytes for people."""
    units = ("bytes", "KB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, len(str(int(size))) - 1) // 3)
    return f"{size / 1000**power:.{min(1, power)}f} {units[power]}"
