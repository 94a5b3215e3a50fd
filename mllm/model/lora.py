"""LoRA adapters inside the model, by PEFT, without a wrapper around it.

PEFT replaces the chosen linear layers in place, so the model keeps its class, its `forward` and its
`generate`; adapters may stand in any part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from mllm.errors import ConfigError

ADAPTER = "default"


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter."""
    return ".lora_" in name


def canonical_name(name: str) -> str:
    """A tensor's name without the level that a LoRA layer puts around the weight it adapts."""
    return name.replace(".base_layer.", ".")


def linear_names(part: nn.Module, prefix: str, head: nn.Module | None) -> Iterator[str]:
    """Full names of the linear layers in a part, without the language model's head (as LLaVA does)."""
    for name, module in part.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            yield f"{prefix}.{name}"


def inject_lora(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put LoRA layers into the model, in place.

    Args:
        model: the model.
        settings: arguments of `peft.LoraConfig`, `target_modules` being full module names.

    Returns:
        The configuration as PEFT writes it to `adapter_config.json`.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("LoRA needs peft; run: pip install 'mllm[train]'") from error
    known = {key: value for key, value in settings.items() if key in LoraConfig.__dataclass_fields__}
    config = LoraConfig(**known)
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    saved = config.to_dict()
    saved["target_modules"] = sorted(saved["target_modules"])
    return {
        key: value
        for key, value in saved.items()
        if isinstance(value, (str, int, float, list, dict, type(None)))
    }


def merge_lora(model: nn.Module) -> set[str]:
    """Add every adapter to its weight and remove it; returns the names of the weights that changed."""
    from peft.tuners.lora import LoraLayer

    changed = set()
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, layer in layers:
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
        changed.add(f"{name}.weight")
    if hasattr(model, "peft_config"):  # or PEFT would take the next adapters for a second set
        del model.peft_config
    return changed
