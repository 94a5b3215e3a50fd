"""Are the files that were just written what the manifest lists, and of use?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from mllm.errors import CheckpointError
from mllm.model.checkpoint.adapter_files import ADAPTER_DIR, adapter_tensors
from mllm.model.checkpoint.manifest import describe, read_manifest


def verify(path: Path) -> None:
    """Read a checkpoint's tensors again, one at a time.

    Raises:
        CheckpointError: one is missing, empty, not as it was in memory, or holds what is no finite number.
    """
    manifest = read_manifest(path)
    left = dict(manifest["weights"])
    for name, tensor in _stored(path):
        if describe(tensor) != left.pop(name, None):
            raise CheckpointError(f"{path}: tensor {name!r} is not on the disk as it was in memory")
        _check_values(name, tensor)
    if left:
        raise CheckpointError(f"{path}: tensor {min(left)!r} was not written ({len(left)} in all)")
    if manifest["adapter"]:
        for name, tensor in adapter_tensors(path / ADAPTER_DIR, manifest["adapter"]).items():
            _check_values(name, tensor)


def _stored(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(path.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                yield name, tensors.get_tensor(name)


def _check_values(name: str, tensor: torch.Tensor) -> None:
    if not tensor.numel():
        raise CheckpointError(f"tensor {name!r} is empty; under ZeRO-3 it was not gathered; nothing is saved")
    if not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"tensor {name!r} has values that are no finite numbers; nothing is saved; go back to an earlier "
            "checkpoint, with a lower learning rate"
        )
