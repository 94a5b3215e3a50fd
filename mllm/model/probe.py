"""Does a loaded model compute what the saved one did? Logits on a fixed input tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mllm.errors import CheckpointError
from mllm.model.modeling import MllmForConditionalGeneration

# Largest allowed difference of probe logits, relative to their size.
PROBE_TOLERANCE = {"float32": 1e-4, "float64": 1e-6, "bfloat16": 5e-2, "float16": 2e-2}


def probe(model: MllmForConditionalGeneration) -> dict[str, Any]:
    """Logits on a fixed input (one image and eight tokens), sampled over the vocabulary."""
    config = model.config
    device: Any = model.get_input_embeddings().weight.device
    vocab = config.text_config.vocab_size
    text = (torch.arange(8) * 37 + 11) % vocab
    text[text == config.image_token_id] = 0
    ids = torch.cat([torch.full((config.num_image_tokens,), config.image_token_id), text])[None].to(device)
    channels, height, width = config.pixel_shape
    pixels = torch.cos(torch.arange(channels * height * width) * 0.01).reshape(1, channels, height, width)
    training = model.training
    model.eval()
    # In a mixed precision run, accelerate lays autocast over `forward`; a loaded model computes without.
    forward = model.__dict__.pop("forward", None)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            logits = (
                model(input_ids=ids, pixel_values=pixels.to(device), use_cache=False).logits[0, -2:].float()
            )
    finally:
        if forward is not None:
            model.forward = forward  # type: ignore[method-assign]
        model.train(training)
    step = max(1, vocab // 16)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "logits": logits[:, ::step][:, :16].cpu().tolist(),
    }


def check_probe(model: MllmForConditionalGeneration, saved: Mapping[str, Any], path: Path) -> None:
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
