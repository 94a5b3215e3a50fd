"""Memory that is full, in one line with what can be done. A full disk is `saving.py`'s."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mllm.config import TrainSection
from mllm.errors import TrainingStoppedError


@contextmanager
def told_in_one_line(options: TrainSection) -> Iterator[None]:
    """What runs within it may run out of memory.

    Raises:
        TrainingStoppedError: out of memory; names the three levers with their present values.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingStoppedError(_out_of_memory(options, str(error))) from error


def _out_of_memory(options: TrainSection, message: str) -> str:
    size, steps = options.per_device_batch_size, options.gradient_accumulation_steps
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", message)
    levers = []
    if size > 1:
        levers.append(
            f"train.per_device_batch_size={size // 2} (now {size}) with "
            f"train.gradient_accumulation_steps={steps * size // (size // 2)} (now {steps})"
        )
    else:
        levers.append("a smaller data.max_length (train.per_device_batch_size is 1 already)")
    now = options.gradient_checkpointing
    already = ", which it is already" if now is True else f" (now {str(now).lower()})"
    levers.append(f"train.gradient_checkpointing=true{already}")
    zero = options.deepspeed or "none"
    levers.append(f"a higher ZeRO stage, train.deepspeed=ds_configs/zero3.json (now {zero})")
    tried = f", {wanted[1]} were wanted" if wanted else ""
    return f"the GPU's memory is full{tried}; try {'; '.join(levers)}; 'mllm plan' says what fits"
