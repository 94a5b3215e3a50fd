"""Which parameters learn: frozen, full or LoRA for each part, and a table that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.table import Table

from mllm.config import TuneSection
from mllm.errors import ConfigError
from mllm.model.checkpoint import origin_of, part_of
from mllm.model.lora import inject_lora, is_adapter, linear_names, merge_lora
from mllm.model.modeling import PARTS, MllmForConditionalGeneration
from mllm.model.vision_encoder import patch_features


@dataclass(frozen=True)
class PartReport:
    """One line of the table: how a part is tuned and how much of it learns."""

    part: str
    tuning: str
    trainable: int
    total: int
    unused: int


def apply_tuning(model: MllmForConditionalGeneration, tune: TuneSection) -> list[PartReport]:
    """Set `requires_grad` and insert LoRA layers as declared.

    A checkpoint that carries adapters keeps training them if the same parts are declared `lora` with the
    same settings; otherwise they are merged into their weights first.

    Returns:
        One report a part.

    Raises:
        ConfigError: nothing would be trained, or nothing of a part that is not frozen.
    """
    origin = origin_of(model)
    wanted = {part for part in PARTS if getattr(tune, part) == "lora"}
    present = {part_of(name) for name, _ in model.named_parameters() if is_adapter(name)}
    if present and not (present == wanted and (origin.lora or {}).items() >= _settings(tune).items()):
        origin.changed |= merge_lora(model)
        origin.lora = None
        present = set()
    model.requires_grad_(False)
    if wanted and not present:
        origin.lora = _inject(model, wanted, tune)
    for name, parameter in model.named_parameters():
        tuning = getattr(tune, part_of(name))
        parameter.requires_grad_(tuning == "full" or (tuning == "lora" and is_adapter(name)))
    unused = _freeze_unreachable(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("nothing is trained: every part is 'frozen' in the section 'tune'")
    reports = [
        _report(model, part, getattr(tune, part), unused if part == "vision_encoder" else 0) for part in PARTS
    ]
    for report in reports:
        if report.tuning != "frozen" and not report.trainable:
            raise ConfigError(
                f"tune.{report.part} is {report.tuning!r}, but no such parameter of it takes part in "
                "the loss; freeze it, or move model.vision_feature_layer"
            )
    return reports


def _inject(model: MllmForConditionalGeneration, parts: set[str], tune: TuneSection) -> dict:
    head = model.get_output_embeddings()
    targets = [name for part in sorted(parts) for name in linear_names(getattr(model, part), part, head)]
    return inject_lora(
        model,
        {
            **_settings(tune),
            "bias": "none",
            "target_modules": targets,
        },
    )


def _settings(tune: TuneSection) -> dict[str, float]:
    """The recipe's LoRA settings under PEFT's names."""
    return {"r": tune.lora.r, "lora_alpha": tune.lora.alpha, "lora_dropout": tune.lora.dropout}


def _freeze_unreachable(model: MllmForConditionalGeneration) -> int:
    """Freeze what the loss cannot reach: vision layers behind the feature layer, pooling heads.

    Found by one backward pass, because models name these parts differently. Left trainable they would
    make distributed training wait for gradients that never come.

    Returns:
        How many parameters were declared trainable and cannot be.
    """
    vision = model.vision_encoder
    if not any(p.requires_grad for p in vision.parameters()):
        return 0
    device = next(vision.parameters()).device
    pixels = torch.zeros(1, *model.config.pixel_shape, device=device, dtype=vision.dtype)
    with torch.enable_grad():
        features = patch_features(
            vision, pixels, model.config.vision_feature_layer, model.config.num_prefix_tokens
        )
        if features.requires_grad:  # else no parameter lies in front of the feature layer
            features.float().sum().backward()
    unused = 0
    for parameter in vision.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.requires_grad_(False)
            unused += parameter.numel()
        parameter.grad = None
    return unused


def upcast_trained(model: MllmForConditionalGeneration, tune: TuneSection) -> None:
    """Train in float32 what is trained: a part tuned in full as a whole, else the adapters in it.

    Within a part tuned in full, layers that the loss does not reach are still computed, and most kernels
    refuse two dtypes in one layer norm.
    """
    for part in PARTS:
        module = getattr(model, part)
        if getattr(tune, part) == "full":
            module.float()
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def _report(model: MllmForConditionalGeneration, part: str, tuning: str, unused: int) -> PartReport:
    parameters = list(getattr(model, part).parameters())
    return PartReport(
        part,
        tuning,
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(p.numel() for p in parameters),
        unused,
    )


def tuning_table(reports: list[PartReport], rates: Mapping[str, float]) -> Table:
    """The table printed before the first step."""
    table = Table(title="What trains", title_justify="left")
    for column in ("part", "tuning"):
        table.add_column(column)
    for column in ("trainable", "of", "learning rate"):
        table.add_column(column, justify="right")
    for report in reports:
        rate = f"{rates[report.part]:g}" if report.trainable else "-"
        note = f" ({report.unused:,} lie behind the feature layer)" if report.unused else ""
        table.add_row(report.part, report.tuning + note, f"{report.trainable:,}", f"{report.total:,}", rate)
    return table
