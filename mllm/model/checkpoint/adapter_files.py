"""PEFT's adapters in PEFT's layout: a folder, or one for each way of adapting where there are several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mllm.errors import CheckpointError
from mllm.model.adapters import adapted_layer, canonical_name, inject, is_adapter
from mllm.model.checkpoint.manifest import checked_tensors
from mllm.model.checkpoint.origin import Origin, origin_of, part_of
from mllm.model.parted import PartedModel

ADAPTER_DIR = "adapter"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."


def save_adapters(adapter: Mapping[str, torch.Tensor], origin: Origin, folder: Path) -> None:
    """One folder as PEFT lays it out, or, where parts are adapted in different ways, one for each way."""
    kinds: dict[str, dict[str, Any]] = {}
    for config in origin.adapters.values():
        joined = kinds.setdefault(adapter_kind(config), {})
        for key, value in config.items():
            is_layers = key in ("target_modules", "feedforward_modules")
            joined[key] = sorted([*joined.get(key, []), *value]) if is_layers else value
    for kind, config in kinds.items():
        place = folder / kind if len(kinds) > 1 else folder
        place.mkdir(parents=True)
        layers = set(config["target_modules"])
        tensors = {
            PEFT_PREFIX + _name_on_disk(name): tensor
            for name, tensor in adapter.items()
            if adapted_layer(name) in layers
        }
        save_file(tensors, place / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (place / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def adapter_kind(config: Mapping[str, Any]) -> str:
    """`lora`, `dora`, `rslora` or `ia3`, by a configuration of PEFT's."""
    if config["peft_type"] == "IA3":
        return "ia3"
    return "dora" if config["use_dora"] else "rslora" if config["use_rslora"] else "lora"


def _name_on_disk(name: str) -> str:
    """An adapter tensor's name in PEFT's files, which leave out the name of the adapter itself."""
    return name.replace(".default.", ".").removesuffix(".default")


def load_adapters(model: PartedModel, folder: Path, expected: Mapping[str, Any]) -> None:
    """Insert the adapters that a checkpoint was saved with."""
    tensors = adapter_tensors(folder, expected)
    for place in _adapter_folders(folder):
        try:
            settings = json.loads((place / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{place / ADAPTER_CONFIG}: cannot be read: {error}") from error
        names = [name.removeprefix(PEFT_PREFIX) for name in load_file(place / ADAPTER_WEIGHTS)]
        layers = sorted({adapted_layer(name) for name in names})
        scaled_inside = settings.get("feedforward_modules") or []
        for part, module in model.named_parts():
            own = [name.removeprefix(f"{part}.") for name in layers if part_of(name) == part]
            inner = [name.removeprefix(f"{part}.") for name in scaled_inside if part_of(name) == part]
            if own:
                origin_of(model).adapters[part] = inject(module, part, settings, own, inner)
    model.connect()  # again: layers have been replaced
    _set_adapters(model, tensors, folder)


def restore_adapters(model: PartedModel, folder: Path, expected: Mapping[str, Any]) -> None:
    """Copy the tensors that a checkpoint was saved with into adapters that are there."""
    _set_adapters(model, adapter_tensors(folder, expected), folder)


def adapter_tensors(folder: Path, expected: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors in an adapter's files, checked against the manifest."""
    listed = {_name_on_disk(name): entry for name, entry in expected.items()}
    files = [place / ADAPTER_WEIGHTS for place in _adapter_folders(folder)]
    return checked_tensors(folder, files, listed, PEFT_PREFIX)


def _adapter_folders(folder: Path) -> list[Path]:
    return sorted({file.parent for file in folder.rglob("adapter_*")})


def _set_adapters(model: PartedModel, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    places = {
        _name_on_disk(canonical_name(name)): parameter
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }
    if set(places) != set(tensors):
        odd = sorted(set(places) ^ set(tensors))[0]
        raise CheckpointError(f"{folder}: adapter tensor {odd!r} stands on one side only")
    for name, tensor in tensors.items():  # in the dtype they were trained in, whatever the base has
        places[name].data = tensor.to(places[name].device)
