"""Does a loaded model compute what the saved one did? Logits on a fixed input tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mllm.errors import CheckpointError
from mllm.model.parted import PartedModel

# Largest allowed difference of probe logits, relative to their size.
PROBE_TOLERANCE = {"float32": 1e-4, "float64": 1e-6, "bfloat16": 5e-2, "float16": 2e-2}


def probe(model: PartedModel) -> dict[str, Any]:
    """Logits on the model's fixed input, sampled over the vocabulary."""
    inputs = model.probe_inputs()
    device = next(iter(inputs.values())).device
    training = model.training
    model.eval()
    # In a mixed precision run, accelerate lays autocast over `forward`; a loaded model computes without.
    forward = model.__dict__.pop("forward", None)
    # On a GPU, convolutions in float32 would round to TF32, and those of the CPU that loads it do not.
    exact = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), exact:
            logits = model.probe_logits(**inputs).float()
    finally:
        if forward is not None:
            model.forward = forward
        model.train(training)
    step = max(1, logits.shape[-1] // 16)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "logits": logits[:, ::step][:, :16].cpu().tolist(),
    }


def check_probe(model: PartedModel, saved: Mapping[str, Any], path: Path) -> None:
    """Raise unless the loaded model computes what the saved one did, up to the coarser dtype's rounding."""
    found = probe(model)
    before, now = torch.tensor(saved["logits"]), torch.tensor(found["logits"])
    tolerance = max(PROBE_TOLERANCE.get(d, 5e-2) for d in (saved["dtype"], found["dtype"]))
    difference = (before - now).abs().max() / before.abs().max().clamp(min=1e-6)
    if not difference <= tolerance:  # also catches NaN
        raise CheckpointError(
            f"{path}: the loaded model does not compute what the saved one did (logits differ by "
            f"{difference:.2g} of their size); the weights were changed or a library computes differently"
        )
