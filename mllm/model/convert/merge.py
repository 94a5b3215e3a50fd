"""Adapters into the weights that they stand on: a checkpoint that needs neither PEFT nor 4 bit any more.

Merging is proven twice. In float32 the merged model must compute what the unmerged one does: that is about
the arithmetic. Then what was written is read back: that is about rounding, since a small change of a large
weight is partly lost in 16 bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mllm.errors import CheckpointError, ConfigError
from mllm.model.adapters import canonical_name, dequantise, is_adapter, merge_adapters
from mllm.model.checkpoint import load, manifest_hash, new_directory, origin_of, part_of, read_manifest, save
from mllm.model.checkpoint.adapter_files import adapter_kind
from mllm.model.checkpoint.manifest import dtype_name
from mllm.model.convert.proof import Observed, Proof, compare, observe, prompts, prove
from mllm.model.modeling import MllmForConditionalGeneration
from mllm.model.parted import PartedModel

# Of logits, relative to the largest, between the unmerged model and what was written, by the coarsest dtype.
ROUNDING = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
# What `save` writes of itself; all else in a manifest tells of the run, which merging leaves as it was.
_OWN = {"format", "base", "parent", "weights", "adapter", "probe", "versions"}


@dataclass(frozen=True)
class Merge:
    """What was merged and how well.

    Attributes:
        merged: how each part that had adapters was adapted.
        kept: what cannot be merged and stays as it was, by part.
        bases: parts that still come from a base model, which was never changed.
        proof: merged against unmerged in float32.
        rounding: difference of the logits of what was written, relative to the largest.
        allowed: of that.
        dtype: the coarsest dtype of what was written.
    """

    merged: dict[str, str]
    kept: dict[str, str]
    bases: dict[str, str]
    proof: Proof
    rounding: float
    allowed: float
    dtype: str

    def __str__(self) -> str:
        """A line for each fact."""
        lines = [f"{part}: {kind} merged" for part, kind in self.merged.items()]
        lines += [f"{part}: {kind} kept, no weight can take it up" for part, kind in self.kept.items()]
        lines += [f"{part}: still the base model at {place}" for part, place in self.bases.items()]
        lines.append(f"in float32: {self.proof}")
        lines.append(
            f"as written in {self.dtype}: logits differ by {self.rounding:.1e} (allowed {self.allowed:.0e})"
        )
        return "\n".join(lines)


def merge_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    base: Mapping[str, str | Path] | None = None,
    whole: bool = False,
    say: Callable[[str], None] = lambda step: None,
) -> Merge:
    """Write a checkpoint without adapters that computes what one with adapters does.

    Args:
        checkpoint: a checkpoint directory, also an intermediate one.
        out: where to write; must not be there.
        dtype: of the parts that are written; default: each weight as it was under its adapter. A part that
            stays a base model keeps its own: cast up, it would not be what the base's files hold.
        base: other places of base models that have moved, by part.
        whole: write the untrained parts too, so that no base model is needed.
        say: told each step before it begins.

    Raises:
        ConfigError: there is nothing to merge.
        CheckpointError: the result does not compute the same; nothing is written.
    """
    path = Path(checkpoint)
    if dtype is not None and dtype not in ROUNDING:
        raise ConfigError(f"dtype is {dtype!r}; use one of {', '.join(ROUNDING)}")
    with new_directory(out) as folder:
        say("reading")
        model, processor = load(path, base=base)
        kept = {part: spec["type"] for part, spec in getattr(model.config, "inserted", {}).items()}
        _check_any(model, path, kept, whole)
        dtypes = _dtypes(model)
        model.requires_grad_(False)  # nothing trains, so that a save may leave out what is not merged
        say("asking the unmerged model")
        _compute_in_float32(model)
        before = _observe(model, processor)
        say("merging")
        merged = merge_model(model)
        after = _observe(model, processor)
        proof = prove(before, after, str(path))
        origin = origin_of(model)
        if whole:
            origin.base.clear()
        _cast(model, dtypes, dtype)
        origin.parent = {"path": str(path), "manifest": manifest_hash(path)}
        record = {key: value for key, value in read_manifest(path).items() if key not in _OWN}
        say("writing")
        bases = {part: one.source for part, one in origin.base.items()}
        save(model, processor, folder, record={**record, "merged": merged})
        del model
        say("reading back")
        written, _ = load(folder)
        stored = _coarsest(written)
        rounding, _, same = compare(before, _observe(written, processor))
        _check_rounding(path, rounding, same, stored)
    return Merge(merged, kept, bases, proof, rounding, ROUNDING[stored], stored)


def merge_model(model: PartedModel) -> dict[str, str]:
    """Merge every adapter of PEFT's in a model, in place; its parts are then saved whole.

    Weights in 4 bit are unpacked first. What `config.inserted` names stays.

    Returns:
        How each part that was changed had been adapted.
    """
    origin = origin_of(model)
    merged = {}
    for part, module in list(model.named_parts()):
        config = origin.adapters.pop(part, None)
        base = origin.base.get(part)
        in_4_bit = base is not None and base.quantization is not None
        if config is None and not in_4_bit:
            continue
        if in_4_bit:
            setattr(model, part, dequantise(module, torch.float32))
        else:
            try:
                merge_adapters(module)
            except ValueError as error:  # of PEFT, about a merged weight that is not finite
                raise CheckpointError(f"{part}: adapters cannot be merged: {error}") from error
        merged[part] = "qlora" if in_4_bit or config is None else adapter_kind(config)
        origin.base.pop(part, None)  # its weights are no longer those of the base
    if merged:
        model.connect()  # again: layers have been replaced
    return merged


def _check_any(model: PartedModel, path: Path, kept: Mapping[str, str], whole: bool) -> None:
    origin = origin_of(model)
    packed = any(base.quantization for base in origin.base.values())
    if origin.adapters or packed or (whole and origin.base):
        return
    if kept:
        part, kind = next(iter(kept.items()))
        raise ConfigError(
            f"{path}: {part} is tuned as {kind!r}, which no weight can take up, and there is nothing else to "
            "merge; the checkpoint stays as it is"
        )
    raise ConfigError(f"{path}: there is no adapter to merge; the checkpoint stays as it is")


def _dtypes(model: PartedModel) -> dict[str, torch.dtype]:
    """The dtype of every tensor that is no adapter's; of a weight in 4 bit, the one that it had."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        canonical_name(name): getattr(tensor, "quant_state", tensor).dtype
        for name, tensor in named
        if not is_adapter(name)
    }


def _compute_in_float32(model: PartedModel) -> None:
    """Weights, also those in 4 bit: what they are unpacked into and multiplied in are dtypes of their own."""
    model.float()
    layer: Any
    for layer in model.modules():
        if hasattr(getattr(layer, "weight", None), "quant_state"):
            layer.weight.quant_state.dtype = layer.compute_dtype = torch.float32


def _cast(model: PartedModel, dtypes: Mapping[str, torch.dtype], dtype: str | None) -> None:
    """Give every tensor the dtype that it had, or, in a part that is written, the one asked for."""
    persistent, bases = set(model.state_dict()), origin_of(model).base
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in persistent and tensor.is_floating_point():
            asked = None if part_of(name) in bases else dtype
            tensor.data = tensor.data.to(dtypes[name] if asked is None else getattr(torch, asked))


def _coarsest(model: PartedModel) -> str:
    """The dtype that rounds most, of the parts that were written."""
    bases = origin_of(model).base
    written = [p for name, p in model.named_parameters() if part_of(name) not in bases]
    found = {dtype_name(p) for p in written if p.is_floating_point()}
    return max(found & ROUNDING.keys(), key=lambda name: ROUNDING[name])


def _observe(model: PartedModel, processor: Any) -> list[Observed]:
    """What a model makes of two questions; one of a stage on pairs, of its probe's input."""
    if isinstance(model, MllmForConditionalGeneration):
        return observe(model, prompts(processor, model.config.text_config), processor.image_token_id)
    model.float().eval()
    with torch.no_grad():
        return [Observed(model.probe_logits(**model.probe_inputs()), [])]


def _check_rounding(path: Path, difference: float, same: bool, dtype: str) -> None:
    # In 16 bit two tokens may be nearly equally likely, so that answers are not compared.
    if not difference <= ROUNDING[dtype] or (dtype == "float32" and not same):
        raise CheckpointError(
            f"{path}: what was written in {dtype} does not compute the same: logits differ by "
            f"{difference:.2g} of their size (allowed {ROUNDING[dtype]:.0e}); nothing was written"
            + ("" if dtype == "float32" else ", use --dtype float32")
        )
