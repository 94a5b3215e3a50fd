"""Tensors and gradients of a model whatever holds it: one process, DDP, DeepSpeed or FSDP2.

DeepSpeed keeps gradients to itself and, with ZeRO-3, leaves empty shells in the model; FSDP2 makes DTensors
of parameters. What only compares a tensor with itself looks at this rank's share, without communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dist_cp
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer


def fsdp_settings(model: torch.nn.Module, compute: torch.dtype) -> dict[str, Any]:
    """What accelerate's plugin is told beside Hugging Face's arguments.

    Each layer is gathered by itself: its class is named, since those that transformers lists for a model of
    parts are not all in it. Sums over ranks and the loss stay in float32.
    """
    layers = {
        type(layer).__name__ for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)
    }
    # Were outputs cast too, as accelerate does by default, the loss would be rounded to three digits.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    return {"transformer_cls_names_to_wrap": sorted(layers), "mixed_precision_policy": policy}


def shard_on_cpu(accelerator: Accelerator, settings: Mapping[str, Any] | None) -> bool:
    """Switch FSDP2 on over CPUs, where accelerate leaves it out without a word; whether there was cause to.

    Args:
        accelerator: of a trainer.
        settings: of accelerate's plugin; None where nothing is to be sharded.
    """
    if settings is None or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)
    for state in (accelerator.state, PartialState()):  # the first is filled from the second now and then
        state.distributed_type = DistributedType.FSDP
    return True


def local_share(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter or gradient; the whole of it where it is not sharded."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)  # of ZeRO-3


def full_state(model: torch.nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """A model's tensors under FSDP2, whole, on the CPU; every rank must call, those that `keep` have them.

    One tensor at a time is gathered. Under two names it stays one tensor, or it would be saved twice.
    """
    whole: dict[int, torch.Tensor] = {}
    state = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict().items():
        key = id(parameters.get(name, tensor))
        if key not in whole:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            # Cut into uneven shares it would come back as a view of something larger, which cannot be saved.
            whole[key] = full.detach().cpu().clone() if keep else full.new_empty(0)
            del full
        state[name] = whole[key]
    return state if keep else {}


def save_trained(model: torch.nn.Module, folder: Path) -> None:
    """Write what is trained of a model under FSDP2, each rank its share."""
    dist_cp.save({"model": _trained_state(model)}, checkpoint_id=folder)


def load_trained(model: torch.nn.Module, folder: Path) -> None:
    """Take over what `save_trained` wrote, be it on other ranks; a tensor that is not there is an error."""
    state = {"model": _trained_state(model)}
    dist_cp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))  # the others stay


def _trained_state(model: torch.nn.Module) -> dict[str, Any]:
    return get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))


def own_storage(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, none a view of something larger, which cannot be saved; tied ones stay tied.

    ZeRO-3 pads a tensor that its ranks do not divide evenly, and hands out the front of what it gathered.
    """
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    owned = {}
    for name, tensor in state.items():
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = copies.setdefault((tensor.data_ptr(), tensor.shape), tensor.clone())
        owned[name] = tensor
    return owned


def on_any_rank(names: Iterable[str]) -> list[str]:
    """Those that at least one rank has found, sorted; every rank must call, and all get the same."""
    found = set(names)
    if dist.is_initialized():
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
        found = set().union(*everywhere)
    return sorted(found)


class GradientWatch:
    """Which parameters get gradients other than zero, as far as this rank sees it.

    DeepSpeed steps and clears gradients before anybody can look; there they are seen in the backward pass.

    Args:
        named: the trained parameters.
        in_backward: look there, instead of at what a backward pass has left.

    Attributes:
        without: names of those that have had no gradient, not even zero.
    """

    def __init__(self, named: Iterable[tuple[str, torch.Tensor]], in_backward: bool):
        self.silent = dict(named)  # those that are still watched
        self.without = set(self.silent)
        self._felt: dict[str, torch.Tensor] = {}  # flags stay on the device, so that nothing waits for them
        # With ZeRO-3 DeepSpeed's own hook must be there: of an empty shell, gradients would be empty too.
        watched = self.silent.items() if in_backward else ()
        self._hooks = {name: tensor.register_hook(partial(self._see, name)) for name, tensor in watched}

    def _see(self, name: str, gradient: torch.Tensor) -> None:
        self.without.discard(name)
        felt = local_share(gradient).any()
        self._felt[name] = self._felt[name] | felt if name in self._felt else felt

    def take(self) -> set[str]:
        """Those with a gradient other than zero since the last call; they are watched no more."""
        if not self._hooks:
            for name, parameter in self.silent.items():
                if parameter.grad is not None:
                    self._see(name, parameter.grad)
        flags = torch.stack([*self._felt.values()]).tolist() if self._felt else []
        felt = {name for name, flag in zip(self._felt, flags, strict=True) if flag}
        self._felt.clear()
        self.close(felt)
        return felt

    def close(self, names: Iterable[str] | None = None) -> None:
        """Watch these no more; where none are named, nothing more."""
        for name in list(self.silent if names is None else names):
            del self.silent[name]
            if name in self._hooks:
                self._hooks.pop(name).remove()
