"""The manifest, which lists every tensor of a checkpoint, and the check of the files against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mllm.errors import CheckpointError

MANIFEST = "mllm_manifest.json"
FORMAT = 1


def has_manifest(path: Any) -> bool:
    """Whether `path` is a checkpoint directory of ours."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises:
        CheckpointError: unreadable, or of a format that this version does not know.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read: {error}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / MANIFEST}: format {manifest.get('format')!r}, this version reads {FORMAT}; "
            "use the mllm version that wrote it"
        )
    return manifest


def manifest_hash(path: str | Path) -> str:
    """SHA-256 of a checkpoint's manifest, which names every tensor and the probe."""
    return hashlib.sha256((Path(path) / MANIFEST).read_bytes()).hexdigest()


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    """Shape, dtype and checksum of a tensor, for the manifest."""
    return {"shape": list(tensor.shape), "dtype": dtype_name(tensor), "sum": int(checksum(tensor))}


def dtype_name(tensor: Any) -> str:
    """`float32`, ... of a tensor."""
    return str(tensor.dtype).removeprefix("torch.")


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A sum over the bits, so that no change is too small to show."""
    flat = tensor.detach().contiguous().view(-1)
    # Whole words are hundreds of times faster to sum than the halves or bytes they hold.
    whole = all(n * flat.element_size() % 8 == 0 for n in (flat.numel(), flat.storage_offset()))
    size = 8 if whole else flat.element_size()
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return flat.view(integer).sum(dtype=torch.int64)


def saved_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint directory without those of its adapter, checked against its manifest."""
    return checked_tensors(path, sorted(path.glob("model*.safetensors")), read_manifest(path)["weights"])


def checked_tensors(
    path: Path, files: list[Path], expected: Mapping[str, Mapping[str, Any]], prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Tensors of safetensors files, which must be exactly those that the manifest lists."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors.update({name.removeprefix(prefix): t for name, t in load_file(file).items()})
        except Exception as error:  # safetensors raises its own error type for a broken file
            raise CheckpointError(f"{file}: cannot be read: {error}") from error
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing:
        raise CheckpointError(
            f"{path}: tensor {missing[0]!r} is missing ({len(missing)} in all); copy the checkpoint again"
        )
    if extra:
        raise CheckpointError(f"{path}: tensor {extra[0]!r} is not in the manifest ({len(extra)} in all)")
    for name, tensor in tensors.items():
        found, wanted = describe(tensor), dict(expected[name])
        sums = found.pop("sum"), wanted.pop("sum")
        if found != wanted:
            raise CheckpointError(f"{path}: tensor {name!r} is {found}, the manifest says {wanted}")
        if sums[0] != sums[1]:
            raise CheckpointError(
                f"{path}: tensor {name!r} has changed since it was saved; copy the checkpoint again"
            )
    return tensors
