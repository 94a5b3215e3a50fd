"""Any Hugging Face language model, kept whole: its own head, bias, scaling and soft-capping."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from mllm.errors import ConfigError


def language_model_class(config: PreTrainedConfig) -> Any:
    """The Auto class of a causal (Llama, OPT, ...) or an encoder-decoder (T5, ...) language model."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def build_language_model(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A language model with fresh weights; `options` as `attn_implementation`."""
    return language_model_class(config).from_config(config, **options)


def decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """The list of a causal language model's layers, whatever its family calls it.

    Raises:
        ConfigError: no list of as many modules as the configuration has layers.
    """
    depth = getattr(language_model.config, "num_hidden_layers", None)  # Fuyu and others hold a whole model
    for module in language_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ConfigError(f"{type(language_model).__name__} has no list of its layers ({depth}) to attach to")


def weights_in(parameter: Tensor) -> int:
    """How many weights a parameter is; one in 4 bit holds two in a byte."""
    return getattr(parameter, "quant_state", parameter).shape.numel()


def unpacked(weight: Tensor) -> Tensor:
    """A weight as it computes: one in 4 bit in the dtype that it had, any other as it is."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)
