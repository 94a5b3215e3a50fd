"""What a run may do to compute the same faster or in less memory: none of it changes a result.

Each is a key of the section `train` and off by default: `gradient_checkpointing: selective`, `compile`,
`kernels` and `vision_batch_size`.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from mllm.config import TrainSection
from mllm.errors import ConfigError
from mllm.model.language_model import decoder_layers
from mllm.model.parted import PartedModel
from mllm.training.recompute import checkpoint_selectively

# Relative to the largest logit; kernels compute in the same precision, in another order.
LIGER_TOLERANCE = 0.03


def speed_up(model: PartedModel, options: TrainSection) -> None:
    """Apply the run's choices, in place.

    Raises:
        ConfigError: one that is not possible here, or a kernel that does not compute what the model does.
    """
    if options.kernels == "liger":
        use_liger(model)
    if options.gradient_checkpointing == "selective":
        checkpoint_selectively(model)
    if options.vision_batch_size is not None:
        _refuse_trained_encoder(model)
        model.vision_batch_size = options.vision_batch_size
    if options.compile:
        compile_layers(model)


def packed_implementation(options: TrainSection) -> str:
    """The attention for packs where a recipe names none: flash-attn's if it is installed and can be used.

    It needs a GPU and half precision; there `packed` takes PyTorch's own variable-length attention.
    """
    half = options.bf16 or options.fp16
    flash = half and torch.cuda.is_available() and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "packed"


def compile_layers(model: PartedModel) -> None:
    """Compile each layer of the language model by itself: layers are alike, so one is compiled for all.

    Names of modules and parameters stay as they are, and so do checkpoints.
    """
    language_model: Any = getattr(model, "language_model", None)
    if language_model is None:
        raise ConfigError("train.compile is for stages with a language model; remove it")
    if language_model.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise ConfigError("train.compile needs a C++ compiler on this machine; install g++, or remove it")
    for layer in decoder_layers(language_model):
        layer.compile(dynamic=True)  # packs and batches differ in length


def use_liger(model: Any) -> None:
    """Put Liger's kernels into the language model, and see that it computes the same.

    The loss stays ours: theirs multiplies the head at positions without a label.
    """
    language_model = getattr(model, "language_model", None)
    if language_model is None:
        raise ConfigError("train.kernels is for stages with a language model; remove it")
    if not is_liger_kernel_available():
        raise ConfigError("train.kernels: liger is not installed; run: pip install liger-kernel")
    if not torch.cuda.is_available():
        raise ConfigError("train.kernels: liger's kernels need a GPU; remove it")
    device = language_model.device
    before = _probe_on_gpu(model)
    apply_liger_kernel(language_model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    after = _probe_on_gpu(model)
    model.to(device)
    if (after - before).abs().max() > LIGER_TOLERANCE * before.abs().max():
        raise ConfigError(
            f"train.kernels: with liger's kernels {type(language_model).__name__} computes something else; "
            "remove it"
        )


@torch.no_grad()
def _probe_on_gpu(model: Any) -> torch.Tensor:
    training, gpu = model.training, own_gpu()
    model.to(gpu).eval()
    inputs = {name: tensor.to(gpu) for name, tensor in model.probe_inputs().items()}
    with torch.cuda.device(gpu), torch.autocast("cuda", torch.bfloat16):
        logits = model.probe_logits(**inputs).float()
    model.train(training)
    return logits


def own_gpu() -> torch.device:
    """The GPU that this rank will train on, before anything has chosen it: or all ranks would meet on one."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _refuse_trained_encoder(model: PartedModel) -> None:
    if any(parameter.requires_grad for parameter in model.vision_encoder.parameters()):
        raise ConfigError(
            "train.vision_batch_size: the vision encoder is trained, so what its sub-batches compute must be "
            "kept all the same; remove it, or use train.gradient_checkpointing"
        )
