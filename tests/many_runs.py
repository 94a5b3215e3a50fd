"""The script that `launched.launch_runs` starts on every rank."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import end_rank
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from mllm.config import RunConfig
from mllm.errors import MllmError
from mllm.model.adapters import adapter_layers
from mllm.training import saving
from mllm.training.sharded import local_share
from mllm.training.train import train


def full_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """The gradient over all ranks, before clipping; every rank must call.

    Under DeepSpeed it is there between the backward pass and the step, which accelerate does in one call.
    """
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):  # ZeRO-3, ZeRO-1 and -2
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    gradient = parameter.grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


class Spy(TrainerCallback):
    """Gradients of the first optimiser step, and how many images each batch has."""

    def __init__(self, look: bool) -> None:
        self.look = look
        self.gradients: dict[str, torch.Tensor] = {}
        self.images: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.look:
            for batch in kwargs["train_dataloader"]:
                self.images.append(len(batch.get("pixel_values", ())))
        if args.deepspeed:  # between the backward pass and the step no callback is called
            optimizer = kwargs["optimizer"].optimizer
            step = optimizer.step

            def collect_and_step(*arguments: Any, **more: Any) -> Any:
                self._collect(model)
                return step(*arguments, **more)

            optimizer.step = collect_and_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.deepspeed:
            self._collect(kwargs["model"])

    def _collect(self, model: Any) -> None:
        if not self.gradients:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    gradient = full_gradient(parameter)
                    assert gradient is not None, name
                    self.gradients[name] = gradient.detach().float().clone()


class Fault(TrainerCallback):
    """Something that goes wrong in the second step on the second rank alone; or from the first on, on all."""

    def __init__(self, kind: str):
        self.kind = kind

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.kind == "dead" and state.global_step == 0:  # one adapter of many sees nothing
            _, layer = adapter_layers(model.language_model)[3]
            layer.lora_A["default"].register_forward_hook(lambda module, args, output: output * 0)
        if args.process_index != 1 or state.global_step != 1:
            return
        if self.kind == "stall":
            time.sleep(1000)
        if self.kind == "nan":
            weight = next(p for p in model.connector.parameters() if p.requires_grad)
            weight.register_hook(lambda gradient: gradient * float("nan"))
        if self.kind == "thaw":
            frozen = local_share(next(p for p in model.vision_encoder.parameters() if not p.requires_grad))
            frozen.view(-1).view(torch.int32)[0] ^= 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.kind.startswith("full ") and args.process_index == 0 and state.global_step == 2:
            disk = Path(args.output_dir).parent
            size = shutil.disk_usage(disk).free - int(self.kind.removeprefix("full "))
            (disk / "ballast").write_bytes(b"x" * size)


def on_a_slow_disk(publish: Any) -> Any:
    """The same function, after some seconds."""

    def slow(*args: Any) -> Any:
        time.sleep(6)
        return publish(*args)

    return slow


def run(job: dict[str, Any], folder: Path) -> None:
    config, spy, error = RunConfig.model_validate(job["config"]), Spy(job["fault"] == "look"), None
    callbacks: list[TrainerCallback] = [spy]
    if job["fault"] == "own disk" and os.environ["RANK"] == "1":
        own = {"output_dir": f"{config.train.output_dir}-of-rank-1"}
        config = config.model_copy(update={"train": config.train.model_copy(update=own)})
    if job["fault"] == "slow disk":
        saving.publish = on_a_slow_disk(saving.publish)
    elif job["fault"] not in (None, "look"):
        callbacks.append(Fault(job["fault"]))
    try:
        train(config, callbacks=callbacks)
    except MllmError as problem:
        if job["fault"] is None:  # end, and let the launcher end the other rank
            raise
        error = str(problem)
    dist.barrier()  # the next run may start from what the first rank writes at the end of this one
    rank = dist.get_rank()
    found = {"gradients": spy.gradients if rank == 0 else {}, "images": spy.images, "error": error}
    torch.save(found, folder / f"{job['name']}-{rank}.pt")


def main() -> None:
    torch.set_num_threads(1)
    file = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--")))
    for job in json.loads(file.read_text()):
        run(job, file.parent)
    end_rank()


if __name__ == "__main__":
    main()
