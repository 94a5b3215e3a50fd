"""What tuning puts into a part: PEFT's adapters on its linear layers, or modules of ours.

PEFT replaces the chosen linear layers in place, so the model keeps its class, its `forward` and its
`generate`. Each part is adapted by itself, so parts may be adapted differently. These adapters can be merged
into the weights they stand on.

Modules of ours (`insert`) compute something that no weight can take up. They belong to what the model is:
`config.inserted` describes them by part, and their tensors are saved with the other weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from mllm.errors import ConfigError
from mllm.model.bottleneck import Bottleneck, insert_bottlenecks
from mllm.model.language_model import build_language_model, unpacked
from mllm.model.soft_prompt import SoftPrompt, insert_soft_prompt

ADAPTER = "default"
# How PEFT names an adapter's tensors within the layer they belong to.
_TENSOR = re.compile(r"\.(?:lora_|ia3_l(?:\.|$))")
_INSERT = {"adapter": insert_bottlenecks, "prefix": insert_soft_prompt, "prompt": insert_soft_prompt}


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name belongs to one of PEFT's adapters."""
    return _TENSOR.search(name) is not None


def adapted_layer(name: str) -> str:
    """The layer that an adapter's tensor belongs to."""
    return _TENSOR.split(name, maxsplit=1)[0]


def canonical_name(name: str) -> str:
    """A tensor's name without the level that an adapter puts around the weight it stands on."""
    return name.replace(".base_layer.", ".")


def linear_names(part: nn.Module, head: nn.Module | None) -> Iterator[str]:
    """Names of the linear layers in a part, without the language model's head (as LLaVA does).

    Where the part carries adapters already, the names that its layers have without them.
    """
    for name, module in part.named_modules():
        own = not is_adapter(f"{name}.")
        if own and isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            yield canonical_name(f"{name}.").removesuffix(".")


def ia3_layers(part: nn.Module, linears: Sequence[str]) -> tuple[list[str], list[str]]:
    """(layers that (IA)^3 scales, those of them scaled at their input), of a part's linear layers.

    Keys, values and the feed-forward's inner activations, as in the paper (arXiv 2205.05638), where PEFT's
    table knows the model type; else every linear layer, at its output.
    """
    from peft.utils import constants

    kind = getattr(getattr(part, "config", None), "model_type", "")
    scaled = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind, [""])
    inner = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])
    return (
        [name for name in linears if name.endswith(tuple(scaled))],
        [name for name in linears if name.endswith(tuple(inner))],
    )


def inject(
    part: nn.Module,
    prefix: str,
    settings: Mapping[str, Any],
    layers: Sequence[str],
    inner: Sequence[str] = (),
) -> dict[str, Any]:
    """Put adapters on linear layers of a part, in place.

    Args:
        part: the part.
        prefix: its name in the model.
        settings: arguments of `peft.LoraConfig` or `peft.IA3Config`, with their `peft_type`.
        layers: names within the part.
        inner: for (IA)^3, those of them that are scaled at their input.

    Returns:
        The configuration as PEFT writes it to `adapter_config.json`, with names as in the whole model.
    """
    try:
        from peft import IA3Config, LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("adapters need peft; run: pip install 'mllm[train]'") from error
    cls: Any = IA3Config if settings["peft_type"] == "IA3" else LoraConfig
    places: dict[str, Sequence[str]] = {"target_modules": layers}
    if cls is IA3Config:
        places["feedforward_modules"] = inner
    known = {key: value for key, value in settings.items() if key in cls.__dataclass_fields__}
    # Lists of names: PEFT would shorten a long one to suffixes and write them back into its configuration.
    config = cls(**{**known, **{key: list(names) for key, names in places.items()}})
    if cls is LoraConfig:
        from mllm.model.lean_lora import lean_lora

        config._register_custom_module({nn.Linear: lean_lora})
    inject_adapter_in_model(config, part, adapter_name=ADAPTER)
    del part.peft_config  # or PEFT would take the next adapters for a second set
    plain = (str, int, float, list, dict, type(None))
    saved = {key: value for key, value in config.to_dict().items() if isinstance(value, plain)}
    return {**saved, **{key: sorted(f"{prefix}.{name}" for name in names) for key, names in places.items()}}


def adapter_layers(module: nn.Module) -> list[tuple[str, Any]]:
    """Name and module of every layer that carries an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]


def merge_adapters(module: nn.Module) -> set[str]:
    """Merge every adapter into its weight and remove it; returns the names of the tensors that changed."""
    changed = set()
    for name, layer in adapter_layers(module):
        layer.merge(safe_merge=True)
        base = layer.get_base_layer()
        module.set_submodule(name, base)
        changed |= {f"{name}.{tensor}" for tensor, _ in base.named_parameters()}
    return changed


def dequantise(language_model: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The language model in full precision, with its adapters merged, out of one in 4 bit.

    Adding a LoRA to weights of 4 bit would round it away, so the weights are unpacked first. The result
    computes what the model in 4 bit did, with four times its memory.

    Args:
        language_model: the one in 4 bit; loses its adapters.
        dtype: of the unpacked weights; default: what they had before they were packed.
    """
    deltas = {}
    for name, layer in adapter_layers(language_model):
        deltas[f"{name}.weight"] = layer.get_delta_weight(ADAPTER)
        language_model.set_submodule(name, layer.get_base_layer())
    with no_init_weights():
        dense: Any = build_language_model(language_model.config)
    dense.tie_weights()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            packed = language_model.get_parameter(name)
            weight = unpacked(packed)
            if weight is packed:
                parameter.data = packed.data
                continue
            weight = weight if dtype is None else weight.to(dtype)
            weight = weight + deltas[name].to(weight.dtype) if name in deltas else weight
            # Packing has turned GPT-2's [in, out] layers into ordinary [out, in] ones.
            in_out = isinstance(dense.get_submodule(name.rpartition(".")[0]), Conv1D)
            parameter.data = weight.T.contiguous() if in_out else weight
    return dense.eval()


def insert(part: nn.Module, name: str, spec: Mapping[str, Any]) -> None:
    """Put modules of ours into a part, as an entry of `config.inserted` describes them.

    Raises:
        ConfigError: the part has no place for them.
    """
    settings = dict(spec)
    kind = settings.pop("type")
    try:
        put_in: Any = _INSERT[kind]
        put_in(part, kind=kind, **settings)
    except ConfigError as error:
        raise ConfigError(f"tune.{name} is {kind!r}: {error}") from error


def inserted_parameters(part: nn.Module) -> Iterator[str]:
    """Names of the parameters of modules that `insert` made."""
    for name, module in part.named_modules():
        if isinstance(module, (Bottleneck, SoftPrompt)):
            yield from (f"{name}.{tensor}" for tensor, _ in module.named_parameters())
