"""Tensors and gradients of a model whatever holds it: one process, DDP, DeepSpeed or FSDP2.

DeepSpeed keeps gradients to itself and, with ZeRO-3, leaves empty shells in the model; FSDP2 makes DTensors
of parameters. What only compares a tensor with itself looks at this rank's share, without communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
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


def full_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """The gradient over all ranks, before clipping; every rank must call.

    Under DeepSpeed it is there between the backward pass and the step, which accelerate does in one call.
    """
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):  # ZeRO-3, ZeRO-1 and -2
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    gradient = parameter.grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def on_any_rank(names: Iterable[str]) -> list[str]:
    """Those that at least one rank has found, sorted; every rank must call, and all get the same."""
    found = set(names)
    if dist.is_initialized():
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
        found = set().union(*everywhere)
    return sorted(found)


class GradientWatch:
    """Which parameters get gradients, seen in the backward pass itself: no engine can hide them there.

    Args:
        named: the trained parameters.
    """

    def __init__(self, named: Iterable[tuple[str, torch.Tensor]]):
        self.without: set[str] = set()
        self._felt: dict[str, torch.Tensor] = {}  # flags stay on the device, so that nothing waits for them
        self._hooks: dict[str, RemovableHandle] = {}
        for name, parameter in named:
            self.without.add(name)
            # With ZeRO-3 DeepSpeed's own hook must be there: of an empty shell, gradients would be empty too.
            self._hooks[name] = parameter.register_hook(partial(self._see, name))

    def _see(self, name: str, gradient: torch.Tensor) -> None:
        self.without.discard(name)
        felt = gradient.any()
        self._felt[name] = self._felt[name] | felt if name in self._felt else felt

    def take(self) -> set[str]:
        """Those with a gradient other than zero since the last call; they are watched no more."""
        felt = {name for name, flag in self._felt.items() if flag}
        self._felt.clear()
        for name in felt:
            self._hooks.pop(name).remove()
        return felt

    def close(self) -> None:
        """Take all hooks away."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
