"""Write a checkpoint: the tensors that differ from the base models, and all that describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import ProcessorMixin

from mllm.model.adapters import canonical_name, is_adapter
from mllm.model.checkpoint.adapter_files import ADAPTER_DIR, save_adapters
from mllm.model.checkpoint.directory import atomic_directory
from mllm.model.checkpoint.manifest import FORMAT, MANIFEST, describe, dtype_name
from mllm.model.checkpoint.origin import origin_of, part_of
from mllm.model.checkpoint.verify import verify
from mllm.model.parted import PartedModel
from mllm.model.parts import Base
from mllm.model.probe import probe


def save(
    model: PartedModel,
    processor: ProcessorMixin,
    path: str | Path,
    *,
    record: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    probed: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint directory; it appears under its name only when it is complete.

    Args:
        model: the model, with or without LoRA adapters.
        processor: its processor.
        path: the directory; replaced if it is there.
        record: what else the manifest should tell (stage, tune, data, ...).
        state_dict: the model's tensors, where a distributed run had to gather them; default: its own.
        probed: the probe, where all ranks had to compute it together; default: computed here.

    Returns:
        The directory.

    Raises:
        CheckpointError: a tensor is empty or not finite, or was not written as it is; nothing is saved.
    """
    path = Path(path)
    origin = origin_of(model)
    with atomic_directory(path) as folder:
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        tensors = state_dict or model.state_dict()
        model.save_products(folder, processor, tensors)
        weights, adapter = tensors_to_save(model, tensors)
        save_torch_state_dict(weights, folder, max_shard_size="5GB")
        if adapter:
            save_adapters(adapter, origin, folder / ADAPTER_DIR)
        for file in folder.rglob("*.safetensors"):  # written readable by their owner alone
            file.chmod((folder / "config.json").stat().st_mode)
        manifest = {
            "format": FORMAT,
            "base": {part: asdict(base) for part, base in needed_bases(model, weights).items()},
            "parent": origin.parent,
            "weights": {name: describe(tensor) for name, tensor in sorted(weights.items())},
            "adapter": {name: describe(tensor) for name, tensor in sorted(adapter.items())},
            "probe": probed or probe(model),
            "versions": {name: _version(name) for name in ("mllm", "torch", "transformers", "peft")},
            **(record or {}),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        verify(folder)
    return path


def tensors_to_save(
    model: PartedModel, state_dict: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights, adapter): what differs from the base models, under canonical names; tied tensors once."""
    trained = {canonical_name(name) for name, p in model.named_parameters() if p.requires_grad}
    weights: dict[str, torch.Tensor] = {}
    adapter: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    origin = origin_of(model)
    for name, tensor in state_dict.items():
        plain = canonical_name(name)
        if is_adapter(name):
            adapter[plain] = tensor.detach().contiguous()
        elif (
            plain in trained | origin.changed or part_of(name) not in origin.base
        ) and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            weights[plain] = tensor.detach().contiguous()
    return weights, adapter


def needed_bases(model: PartedModel, weights: Mapping[str, Any]) -> dict[str, Base]:
    """The bases of parts with parameters that are not among the saved weights, and in which dtype."""
    needed = {}
    for part, base in origin_of(model).base.items():
        for name, parameter in getattr(model, part).named_parameters():
            plain = canonical_name(f"{part}.{name}")
            if plain not in weights and not is_adapter(plain):
                # A weight in 4 bit is bytes; it remembers what it was.
                kind = getattr(parameter, "quant_state", parameter)
                needed[part] = replace(base, dtype=dtype_name(kind))
                break
    return needed


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
