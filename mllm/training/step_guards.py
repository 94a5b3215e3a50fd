"""Guards over every step: the loss, the labels, the gradients, the adapters, and the optimiser's groups.

A run that would go on wrongly is stopped before the weights are stepped (with DeepSpeed, which steps in its
backward pass, before they are saved). The message names the first rows and the cause; all rows of the step
are in a file beside the metrics, since a global batch may have hundreds.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import TrainerCallback

from mllm.data.files import write_atomic
from mllm.errors import TrainingStoppedError
from mllm.model.adapters import adapted_layer, is_adapter
from mllm.model.checkpoint import part_of
from mllm.training.sharded import GradientWatch, local_share, on_any_rank
from mllm.training.steps import MicroBatch, StepLog

PATIENCE = 3  # steps that a fault may last which one step does not prove
SHOWN = 8  # rows in a message


def stop(
    steps: StepLog, args: Any, state: Any, cause: str, fix: str, rows: list[str] | None = None
) -> NoReturn:
    """Write down the rows of the step and raise.

    Args:
        steps: the step.
        args, state: the Trainer's.
        cause, fix: what the message says before and behind the rows.
        rows: those to blame; default: all of the step.

    Raises:
        TrainingStoppedError: always, one line.
    """
    rows = steps.rows if rows is None else rows
    number = state.global_step + 1
    file = stop_file(args)
    losses = [{"rows": batch.rows, "loss": batch.loss.item()} for batch in steps.micro_batches]
    write_atomic(file, json.dumps({"step": number, "cause": cause, "micro_batches": losses}, indent=1) + "\n")
    more = f" and {len(rows) - SHOWN} more (all in {file})" if len(rows) > SHOWN else ""
    raise TrainingStoppedError(f"step {number}: {cause} on rows {', '.join(rows[:SHOWN])}{more}; {fix}")


def stop_file(args: Any) -> Path:
    """Where all rows of the step are written that this rank was stopped in."""
    return Path(args.output_dir) / f"stopped.rank{args.process_index}.json"


class LossGuard(TrainerCallback):
    """Stops at a loss that is not a number, at a micro-batch without labels, and at a loss that stays 0."""

    def __init__(self, steps: StepLog) -> None:
        self.steps = steps
        self.zeros = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What stopped an earlier run no longer holds."""
        self.zeros = 0
        stop_file(args).unlink(missing_ok=True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at all micro-batches of the step; the only wait for the device."""
        batches = self.steps.micro_batches
        if not batches:
            return
        losses = torch.stack([batch.loss.float() for batch in batches]).tolist()
        labels = [batch for batch in batches if batch.labels is not None]
        found = torch.stack([batch.labels for batch in labels]).tolist() if labels else []  # type: ignore[misc]
        for batch, count in zip(labels, found, strict=True):
            if count == 0:
                self._stop(
                    args, state, batch, "no token is supervised", "remove the rows, or check their answers"
                )
        for batch, loss in zip(batches, losses, strict=True):
            if loss != loss or abs(loss) == float("inf"):
                fix = "lower the learning rate, or train in bf16 or float32"
                self._stop(args, state, batch, f"the loss is {loss}", fix)
        self.zeros = 0 if any(losses) else self.zeros + 1
        if self.zeros >= PATIENCE:
            fix = "check the labels with 'mllm data inspect', and train in bf16 or float32"
            stop(self.steps, args, state, f"the loss was exactly 0 for {self.zeros} steps", fix)

    def _stop(self, args: Any, state: Any, batch: MicroBatch, cause: str, fix: str) -> NoReturn:
        stop(self.steps, args, state, cause, fix, batch.rows)


class GradientGuard(TrainerCallback):
    """Stops at a gradient that is not a number, before the optimiser takes it in."""

    def __init__(self, steps: StepLog) -> None:
        self.steps = steps

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """One norm over all gradients; which of them it is, is asked only when it is no number."""
        if args.fp16:  # the scaler skips such steps
            return
        fix = "lower the learning rate, or train in bf16 or float32"
        if args.deepspeed:
            # It has stepped: in bf16 with what was no number; in float32 it left out the step, silently.
            if self.steps.norm is not None and not math.isfinite(self.steps.norm):
                stop(self.steps, args, state, "a gradient is not finite", fix)
            return
        gradients = {name: local_share(gradient) for name, gradient in trained_gradients(model)}
        # An infinite gradient leaves clipping as a NaN among zeros, so the first one does not tell.
        norm = nn.utils.get_total_norm(gradients.values())
        whole = bool(torch.isfinite(norm))
        found = [] if whole else [name for name, grad in gradients.items() if not torch.isfinite(grad).all()]
        if args.fsdp_plugin_args:  # a rank has a share of each, and all must stop together
            found = on_any_rank([] if whole else found or ["their sum"])
            whole = not found
        if whole:
            return
        bad = found[0] if found else "their sum"
        stop(self.steps, args, state, f"a gradient is not finite ({bad})", fix)


class AdapterGuard(TrainerCallback):
    """Stops where an adapter is dead: it gets a gradient, and that is exactly zero from the first step on.

    A scale of 0, an input that is detached or an output that nobody uses look like this. In front of the
    language model only steps with a picture count. One rank may hold no share of an adapter, or have no
    picture: what one of them has seen counts for all, so that they stop together.
    """

    def __init__(self, steps: StepLog) -> None:
        self.steps = steps
        self.silent: set[str] = set()
        self.looked: Counter[str] = Counter()
        self.watch: GradientWatch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Note the adapted layers that must get gradients."""
        self.silent = {adapted_layer(name) for name, _ in _adapters(model)}
        self.looked.clear()
        self.watch = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin to watch, and not before: the longest rows are tried behind the start."""
        if self.silent and self.watch is None:
            self.watch = GradientWatch(_adapters(model), bool(args.deepspeed))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the layers whose adapter has a gradient; stop when one has had none for long enough."""
        if not self.silent or self.watch is None:
            return
        self.silent -= {*on_any_rank(adapted_layer(name) for name in self.watch.take())}
        if not self.silent:
            self.watch.close()
            return
        pictures = on_any_rank({"a picture" for count in self.steps.counts if count.views}) != []
        for part in {part_of(layer) for layer in self.silent}:
            self.looked[part] += part == "language_model" or pictures
        dead = sorted(layer for layer in self.silent if self.looked[part_of(layer)] >= PATIENCE)
        if dead:
            beside = f" (and {len(dead) - 1} others)" if len(dead) > 1 else ""
            cause = f"the adapter of {dead[0]}{beside} is dead, its gradient was 0 in {PATIENCE} steps,"
            fix = "check its scale (tune.lora.alpha) and that its output is used, or freeze the part"
            stop(self.steps, args, state, cause, fix)


def _adapters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The tensors of PEFT's adapters that learn."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_adapter(name):
            yield name, parameter


class OptimizerGuard(TrainerCallback):
    """Stops where what was declared trainable is not what the optimiser steps, each at its part's rate."""

    def __init__(self, steps: StepLog, declared: Mapping[str, float]) -> None:
        """`declared`: the learning rate of each parameter that tuning made trainable."""
        self.steps = steps
        self.declared = dict(declared)
        self.left = PATIENCE

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to look."""
        self.left = PATIENCE

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Compare, in the first steps."""
        if self.left == 0:
            return
        self.left -= 1
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        # DeepSpeed replaces the parameters by flat ones; its groups were checked when they were made.
        fault = declared_fault(model, self.declared)
        if fault is None and not args.deepspeed:
            fault = group_fault(model, optimizer, self.declared)
        if fault is not None:
            stop(
                self.steps, args, state, fault, "leave requires_grad and the optimiser's groups to the recipe"
            )


def trained_gradients(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and gradient of what learns; nothing where DeepSpeed keeps the gradients to itself."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            yield name, parameter.grad


def declared_rates(model: nn.Module, rates: Mapping[str, float]) -> dict[str, float]:
    """The learning rate of each parameter that learns, from those of the parts."""
    return {name: rates[part_of(name)] for name, p in model.named_parameters() if p.requires_grad}


def declared_fault(model: nn.Module, declared: Mapping[str, float]) -> str | None:
    """What learns against what was declared to, in words; None where they agree."""
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    if missing := sorted(declared.keys() - learning):
        return f"{missing[0]} is declared trainable and was frozen after tuning ({len(missing)} in all)"
    if extra := sorted(learning - declared.keys()):
        return f"{extra[0]} is declared frozen and was made trainable after tuning ({len(extra)} in all)"
    return None


def group_fault(model: nn.Module, optimizer: Any, declared: Mapping[str, float]) -> str | None:
    """The first parameter that is not in exactly one group at its rate, in words; None where all are."""
    found: dict[int, list[float]] = {}
    for group in optimizer.param_groups:
        rate = group.get("initial_lr", group["lr"])  # what a schedule multiplies
        for parameter in group["params"]:
            found.setdefault(id(parameter), []).append(float(rate))
    own = dict(model.named_parameters())
    for name, rate in declared.items():
        at = found.pop(id(own[name]), []) if name in own else []
        if not at:
            return f"{name} is declared trainable and is missing from the optimiser"
        if len(at) > 1:
            return f"{name} is in {len(at)} groups of the optimiser"
        if at[0] != rate:
            return f"{name} is declared to learn at {rate:g} and is optimised at {at[0]:g}"
    return f"the optimiser steps {len(found)} tensors that tuning did not declare" if found else None
