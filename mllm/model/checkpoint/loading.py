"""Read a checkpoint, all of it checked: into a new model, or into one of the same make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, ProcessorMixin

from mllm.errors import CheckpointError, ConfigError
from mllm.model.adapters import canonical_name
from mllm.model.checkpoint.adapter_files import ADAPTER_DIR, load_adapters, restore_adapters
from mllm.model.checkpoint.assembly import assemble
from mllm.model.checkpoint.directory import ready_place
from mllm.model.checkpoint.manifest import MANIFEST, has_manifest, read_manifest, saved_tensors
from mllm.model.checkpoint.origin import Origin, origin_of, part_of
from mllm.model.checkpoint.saving import tensors_to_save
from mllm.model.modeling import MllmForConditionalGeneration
from mllm.model.parted import PartedModel
from mllm.model.parts import Base
from mllm.model.pretraining.dual_encoder import DualEncoder
from mllm.model.pretraining.pair_processing import PairProcessor
from mllm.model.pretraining.qformer_pretraining import QFormerForPretraining
from mllm.model.probe import check_probe
from mllm.model.processing import MllmProcessor

# Model and processor classes by the model type in `config.json`.
MODELS: dict[str, tuple[type[PartedModel], type[ProcessorMixin]]] = {
    "mllm": (MllmForConditionalGeneration, MllmProcessor),
    "mllm_dual_encoder": (DualEncoder, PairProcessor),
    "mllm_qformer_pretraining": (QFormerForPretraining, PairProcessor),
}


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    base: Mapping[str, str | Path] | None = None,
    quantization: str | None = None,
) -> tuple[Any, Any]:
    """Load a checkpoint directory: `model, processor = mllm.load("runs/instruct")`.

    Args:
        path: the directory.
        device: where to put the model.
        dtype: weights are cast to it; default: as they were saved.
        base: other places of base models that have moved, by part.
        quantization: `nf4` loads the untrained base of the language model in 4 bit, to train on it.

    Raises:
        ConfigError: a language model that is not as its base any more should be loaded in 4 bit.
        CheckpointError: a tensor is missing, superfluous or of another shape, a base model is not what it
            was, or the loaded model does not compute what the saved one did.
    """
    path = Path(path)
    if not has_manifest(path):
        if ready_place(path).is_dir():
            raise CheckpointError(
                f"{path}: a save was cut off; start its run again with --resume auto, or complete it with "
                "mllm.model.checkpoint.finish_save"
            )
        raise CheckpointError(f"{path}: no {MANIFEST} here; give the directory of a checkpoint saved by mllm")
    processor = MODELS[model_class(path).config_class.model_type][1].from_pretrained(path)
    return load_model(path, device=device, dtype=dtype, base=base, quantization=quantization), processor


def load_model(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    base: Mapping[str, str | Path] | None = None,
    quantization: str | None = None,
) -> Any:
    """The model of a checkpoint directory; see `load`."""
    path = Path(path)
    manifest = read_manifest(path)
    weights = saved_tensors(path)
    bases = {part: Base(**entry) for part, entry in manifest["base"].items()}
    for part, source in (base or {}).items():
        if part not in bases:
            raise CheckpointError(f"{path}: {part!r} is saved whole, it has no base model to replace")
        bases[part] = replace(bases[part], source=str(source))
    own = bases.get("language_model")
    requantised = quantization is not None and (own is None or own.quantization != quantization)
    if requantised:
        changed = sorted(n for n in {**weights, **manifest["adapter"]} if part_of(n) == "language_model")
        if own is None or changed:
            raise ConfigError(
                f"{path}: its language model was trained ({changed[0]!r} differs from the base), and only an "
                "untrained base is loaded in 4 bit; tune it as 'lora', or export it and start from the export"
            )
        compute = str(dtype or own.dtype).removeprefix("torch.")
        bases["language_model"] = replace(own, quantization=quantization, dtype=compute)
    cls = model_class(path)
    model = assemble(cls, cls.config_class.from_pretrained(path), bases, weights)
    if model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path)
    model.origin = Origin(base=bases, changed=set(weights), parent=manifest.get("parent"))
    if manifest["adapter"]:
        load_adapters(model, path / ADAPTER_DIR, manifest["adapter"])
    if dtype is not None:
        nn.Module.to(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    nn.Module.to(model, device or "cpu").eval()
    if not requantised:  # else it computes something else on purpose
        check_probe(model, manifest["probe"], path)
    return model


def model_class(path: Path) -> type[Any]:
    """The class of the model in a checkpoint directory, as its `config.json` says."""
    kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in MODELS:
        raise CheckpointError(f"{path / 'config.json'}: model type {kind!r} is none of {', '.join(MODELS)}")
    return MODELS[kind][0]


def check_grounds(model: PartedModel, path: Path) -> None:
    """See that a model, built to resume a run, has the untrained weights that the run had.

    Raises:
        CheckpointError: a base model or the earlier stage's checkpoint is not what it was.
    """
    manifest, origin = read_manifest(path), origin_of(model)
    advice = "put back what it was, or start a new run with train.resume=false"
    for part, saved in manifest["base"].items():
        here = origin.base.get(part)
        if here is None or here.fingerprint != saved["fingerprint"]:
            raise CheckpointError(
                f"{path}: cannot resume, the base of its {part.replace('_', ' ')}, {saved['source']}, has "
                f"changed since; {advice}"
            )
    before, now = manifest.get("parent"), origin.parent
    if (before and before["manifest"]) != (now and now["manifest"]):
        why = (
            f"{before['path']}, which it started from, has changed since" if before else "it had no init_from"
        )
        raise CheckpointError(f"{path}: cannot resume, {why}; {advice}")


def restore(model: PartedModel, path: Path) -> None:
    """Copy a checkpoint's tensors into a model of the same make (to resume a run)."""
    manifest = read_manifest(path)
    weights = saved_tensors(path)
    own = {canonical_name(name): tensor for name, tensor in model.state_dict().items()}
    wanted, adapter = tensors_to_save(model, model.state_dict())
    for saved, here in ((set(weights), set(wanted)), (set(manifest["adapter"]), set(adapter))):
        if odd := sorted(saved ^ here):
            side = "this run does not train it" if odd[0] in saved else "the checkpoint lacks it"
            raise CheckpointError(f"{path}: cannot resume, {odd[0]!r}: {side}; resume with the same 'tune'")
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    if manifest["adapter"]:
        restore_adapters(model, path / ADAPTER_DIR, manifest["adapter"])
