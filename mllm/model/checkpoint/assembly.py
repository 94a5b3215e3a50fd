"""Tensors -> a model: every part with its base's weights or without, then what the checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from mllm.errors import CheckpointError, ConfigError
from mllm.model.adapters import insert
from mllm.model.added_tokens import resize_embeddings
from mllm.model.checkpoint.origin import part_of
from mllm.model.parts import BASE_LOADERS, Base, fingerprint


def assemble(
    cls: type[Any], config: Any, bases: Mapping[str, Base], weights: Mapping[str, torch.Tensor]
) -> Any:
    """A model whose tensors are those given, and for parts in `bases` also those of their bases.

    Raises:
        CheckpointError: a tensor is missing, superfluous or of another shape, or a base has changed.
    """
    with torch.device("meta"):
        model = cls(config)
    for part, _ in list(model.named_parts()):
        own = {
            name.removeprefix(f"{part}."): tensor for name, tensor in weights.items() if part_of(name) == part
        }
        module = _from_base(part, bases[part], model.config) if part in bases else _empty(model, part)
        if part == "language_model":
            resize_embeddings(module, model.config.text_config.vocab_size)
        if spec := getattr(model.config, "inserted", {}).get(part):
            insert(module, part, spec)
        assign(module, own, part, complete=part not in bases)
        setattr(model, part, module)
    model.connect()
    return model


def _empty(model: Any, part: str) -> Any:
    """A part with its buffers in place and its weights not yet set."""
    with no_init_weights():
        module = model.build_part(model.config, part)
    if isinstance(module, PreTrainedModel):
        module.tie_weights()  # skipped together with the initialisation
    return module


def _from_base(part: str, base: Base, config: Any) -> PreTrainedModel:
    # The feature layer decides on the class: CLIP's projection is in one of its own.
    options: dict[str, Any] = {"layer": config.vision_feature_layer} if part == "vision_encoder" else {}
    if base.quantization:
        options["quantization"] = base.quantization
    try:
        module = BASE_LOADERS[part](base.source, getattr(torch, base.dtype), **options)
    except ConfigError as error:
        raise CheckpointError(f"the checkpoint needs its base model; {error}; {_moved(part)}") from error
    if fingerprint(base.source, module) != base.fingerprint:
        raise CheckpointError(
            f"base model of {part} at {base.source!r} is not the one this checkpoint was trained on; "
            + _moved(part)
        )
    return module


def _moved(part: str) -> str:
    return f"if it has moved, load with base={{{part!r}: <its place>}}"


def assign(module: Any, tensors: dict[str, torch.Tensor], part: str, complete: bool) -> None:
    """Copy tensors into a part; with `complete`, every tensor of the part must be among them."""
    own = module.state_dict()
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise CheckpointError(f"tensor '{part}.{unknown[0]}' has no place in the model")
    if complete:
        # A tied tensor is saved once, under the first of its names.
        filled = {own[name].data_ptr() for name in tensors}
        missing = sorted(name for name, tensor in own.items() if tensor.data_ptr() not in filled)
        if missing:
            raise CheckpointError(f"tensor '{part}.{missing[0]}' is not in the checkpoint")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"tensor '{part}.{name}' has shape {list(tensor.shape)}, the model {list(own[name].shape)}"
            )
    parameters = dict(module.named_parameters(remove_duplicate=False))
    written: set[int] = set()
    with torch.no_grad():
        for name in (name for name in own if name in tensors):
            if name not in parameters:
                own[name].copy_(tensors[name])
            elif id(parameters[name]) not in written:
                # Trained tensors may be float32 beside frozen ones of a lower precision.
                parameters[name].data = tensors[name]
                written.add(id(parameters[name]))
            else:  # tied by the configuration, but not in truth: the head of every Flan-T5
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, nn.Parameter(tensors[name]))
