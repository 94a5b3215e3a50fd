"""Hugging Face's Trainer with what it lacks for a model of parts.

Ours: a learning rate for each part, losses that name the rows behind them; in `saving.py`, whole checkpoints.
The Trainer's own: the loop, accumulation, precision, DeepSpeed, and the division of the loss by the
supervised tokens of the *global* batch (`num_items_in_batch`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from mllm.data.sampler import MicroBatches
from mllm.errors import TrainingStoppedError
from mllm.model.checkpoint import part_of
from mllm.training.eyes import Eyes, peak_memory
from mllm.training.saving import SavingTrainer
from mllm.training.sharded import shard_on_cpu
from mllm.training.step_guards import declared_rates, group_fault
from mllm.training.steps import StepLog
from mllm.training.streams import StreamPosition
from mllm.training.validation import Validation
from mllm.training.watchdog import Progress

__all__ = ["MllmTrainer", "TrainingStoppedError"]


class MllmTrainer(SavingTrainer):
    """Trainer for both stages.

    Args:
        rates: learning rate of each part.
        steps: where it notes what each step was made of.
        eyes: what of that is logged.
        batches: which rows each micro-batch of this rank has; None leaves it to the Trainer.
        stream: keeps the position in a stream of rows, where the data set is one (`StreamBatches`).
        validation: what `evaluate` measures.
        progress: told what the trainer is about to do, for a watchdog.
        **kwargs: of `SavingTrainer`.
    """

    def __init__(
        self,
        *,
        rates: Mapping[str, float],
        steps: StepLog,
        eyes: Eyes,
        batches: MicroBatches | None = None,
        stream: StreamPosition | None = None,
        validation: Validation | None = None,
        progress: Progress | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.rates = rates
        self.steps, self.eyes = steps, eyes
        for callback in (steps, eyes):
            self.add_callback(callback)
        self.batches = batches
        self.stream = stream
        if stream is not None:
            self.add_callback(stream)  # for its state only
        self.validation = validation
        self.progress = progress or Progress()
        self.losses: dict[str, list[torch.Tensor]] = {}  # the terms of the loss since the last log

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's accelerator, which on CPUs too shards what it was told to shard."""
        super().create_accelerator_and_postprocess()
        if shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args):
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's own, or one over `batches` or over a stream's batches."""
        if self.batches is None and self.stream is None:
            return super().get_train_dataloader()
        rows: dict[str, Any] = {"batch_sampler": self.batches, "collate_fn": self.data_collator}
        # A stream's batches are whole. With a generator of its own, a loader that is made again when a run
        # is resumed draws nothing from the random state that the steps use.
        whole = {"batch_size": None, "collate_fn": _as_it_is, "generator": torch.Generator()}
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            **(rows if self.stream is None else whole),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        # As on one rank: `accelerator.prepare` would divide among ranks what is divided already.
        return prepare_data_loader(
            loader,
            self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,  # else rank 0 would read the stream for all
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The rows of a step, and how many supervised tokens they have on all ranks together."""
        self.steps.begin()
        self.progress.at("data", step=self.state.global_step + 1, micro_step=0, rows=(), images=0)
        batches = self.progress.fetched(self.steps.timed(epoch_iterator))
        return super().get_batch_samples(batches, num_batches, device)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward pass of a micro-step; under DeepSpeed also the optimiser's step."""
        self.progress.begin(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.progress.at("optimizer")
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            engine: Any = self.model_wrapped
            self.steps.norm = engine.get_global_grad_norm()
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """An optimiser with one group for each part and for decayed or undecayed parameters."""
        if self.optimizer is None:
            source: Any = self.model if model is None else model
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, source)
            self.optimizer = cls(list(self._groups(source)), **kwargs)
            if fault := group_fault(source, self.optimizer, declared_rates(source, self.rates)):
                raise TrainingStoppedError(f"before step 1: {fault}; give every part a rate, and one group")
        return self.optimizer

    def _groups(self, model: Any) -> Iterator[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(model))
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for part, rate in self.rates.items():
            for decay in (True, False):
                group = [p for name, p in named if part_of(name) == part and (name in decayed) == decay]
                if group:
                    weight_decay = self.args.weight_decay if decay else 0.0
                    yield {"params": group, "lr": rate, "weight_decay": weight_decay, "part": part}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; it and the rows that it is of are noted for the guards."""
        rows, counts = self.steps.take(inputs)
        if self.stream is not None:
            self.stream.note(inputs.pop("position"))
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.steps.note(rows, counts, inputs.get("labels"), loss)
        if self.progress.position.phase == "forward":  # and not in an evaluation
            self.progress.at("backward")
        for name, value in (outputs.get("losses") or {}).items():
            self.losses.setdefault(name, []).append(value.detach())
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """By our formulas, in place of 6 a token and parameter."""
        return round(self.eyes.flops_of(inputs.get("counts", [])))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure and log the validation; the Trainer keeps the best checkpoint and stops early by it."""
        assert self.validation is not None
        found = self.validation.measure(self._plain_model(), self.accelerator)
        self.log({f"val/{name}": value for name, value in found.items()})
        named = {f"eval_{name}": value for name, value in found.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the terms of the loss, and with the rate of each part beside the first group's."""
        if "loss" in logs:
            for name, values in self.losses.items():
                logs[f"loss/{name}"] = self.accelerator.reduce(torch.stack(values).mean(), "mean").item()
            self.losses.clear()
            logs |= self.eyes.report(self._add_up, self.args.world_size)
            logs["memory/peak_gib"] = self._most(peak_memory())
            if dropped := self._dropped():
                logs["dropped_turns"] = dropped
        if "learning_rate" in logs:
            logs |= {f"learning_rate/{part}": rate for part, rate in self.eyes.rates.items()}
        super().log(logs, *args, **kwargs)

    def _add_up(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values.to(self.args.device), "sum")

    def _dropped(self) -> int:
        return int(self._add_up(torch.tensor(self.steps.dropped_turns)))

    def _most(self, value: float) -> float:
        return self.accelerator.gather(torch.tensor([value], device=self.args.device)).max().item()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a checkpoint, with what every rank has counted, and read of a stream."""
        self.steps.dropped_everywhere = self._dropped()
        if self.stream is not None:
            self.stream.gather()
        super().save_model(output_dir, _internal_call)


def _as_it_is(batch: Any) -> Any:
    return batch
