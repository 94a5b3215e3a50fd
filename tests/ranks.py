"""Run a function in several real processes that form a gloo group."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(function: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """What `function(rank, world, *arguments)`, defined at a module's top, returns on each rank."""
    mp.spawn(_run, (world, function, str(folder), arguments), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _run(rank: int, world: int, function: Callable[..., Any], folder: str, arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(function(rank, world, *arguments), f"{folder}/{rank}.pt")
    end_rank()


def end_rank() -> None:
    """End this rank as `scripts/train.py` does: a late thread of gloo aborts one interpreter in hundreds."""
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
