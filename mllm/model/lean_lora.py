"""LoRA on a linear layer with one addition fewer: PEFT's layer, its forward pass as one fused product.

PEFT computes `W x + scale * B (A x)` in five passes over tensors as wide as the layer, forward and backward;
here the scale goes to the narrow `A x`, and `B` adds its product onto `W x` while it is computed. PEFT keeps
the rest: names, files, merging, dropout. Where its layer is asked for anything else (several adapters, DoRA,
another precision), it answers itself.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class LeanLora(Linear):
    """`peft.tuners.lora.Linear` for training with one plain adapter."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        name = self._only_plain_adapter()
        if args or kwargs or name is None or not self._one_precision(x, name):
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)  # [..., out]
        first: Any = self.lora_A[name]  # [r, in]
        second: Any = self.lora_B[name].weight  # [out, r]
        narrow = first(self.lora_dropout[name](x)) * self.scaling[name]  # [..., r]
        added = torch.addmm(result.flatten(0, -2), narrow.flatten(0, -2), second.T)  # [tokens, out]
        return added.view_as(result)

    def _one_precision(self, x: Tensor, name: str) -> bool:
        """Whether all factors have one dtype, or autocast gives them one."""
        # Shapes without values are traced as the CPU would compute them.
        if torch.is_autocast_enabled("cpu" if x.is_meta else x.device.type):
            return True
        weights: Any = (self.base_layer.weight, self.lora_A[name].weight, self.lora_B[name].weight)
        return all(weight.dtype == x.dtype for weight in weights)

    def _only_plain_adapter(self) -> str | None:
        """The adapter's name where there is one alone, of the plain kind, in use and not merged."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        (name,) = self.active_adapters
        plain = name in self.lora_A and name not in self.lora_variant and not self.lora_bias[name]
        return name if plain else None


def lean_lora(target: nn.Module, adapter_name: str, **kwargs: Any) -> LeanLora | None:
    """What PEFT calls for a linear layer; None where it should make one of its own, as for 4 bit."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if type(base) is not nn.Linear:
        return None
    return LeanLora(target, adapter_name, **kwargs)
