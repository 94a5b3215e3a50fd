"""A computation aside from training: afterwards the run is as if it had never happened, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def generators_kept() -> Iterator[None]:
    """What is drawn inside is not missing outside."""
    python, numpy = random.getstate(), np.random.get_state()
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Put back random states, buffers, which modules are in training mode, and FSDP2's shards.

    Gradients are the caller's: whoever computes some drops them.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # a batch norm's means
    try:
        with generators_kept():
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])
        for module, training in modes.items():
            module.training = training
            # FSDP2 leaves the root's weights whole after a forward, for a backward that does not come here.
            if isinstance(module, FSDPModule):
                module.reshard()
