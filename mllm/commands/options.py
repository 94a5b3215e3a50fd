"""What several commands share: options, loading a model, printing a summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.errors import ConfigError

Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, laid over the recipe", show_default=False)
]
RecipeName = Annotated[str, typer.Argument(help="a YAML file, or a shipped recipe: llava-1.5-7b/align")]
ModelDir = Annotated[Path, typer.Argument(help="checkpoint directory")]
Decode = Annotated[str, typer.Option(help="greedy, sample, vcd; with settings: vcd,alpha=1,noise_step=500")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
ImageRoot = Annotated[Path | None, typer.Option(help="folder that image paths start from")]


def load_model(path: Path, device: str | None, *, answers: bool = True) -> tuple[Any, Any]:
    """(model, processor) of a checkpoint, on a GPU if there is one and no device is named.

    Raises:
        ConfigError: there is no such device, or `answers` and the model is one of pairs, which says nothing.
    """
    import torch

    from mllm.model import MllmForConditionalGeneration, load
    from mllm.model.checkpoint import has_manifest, model_class

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without CUDA
        raise ConfigError(f"device {place!r}: {str(error).splitlines()[0][:200]}; use cpu") from error
    if answers and has_manifest(path) and model_class(path) is not MllmForConditionalGeneration:
        raise ConfigError(f"{path} is of a stage on pairs and cannot answer; give one of align or instruct")
    return load(path, device=place)


def print_summary(summary: Any, as_json: bool, output: Path) -> None:
    """Print a dataclass, a line a field or as JSON."""
    from dataclasses import asdict

    record = {**asdict(summary), "output": str(output)}
    if as_json:
        typer.echo(json.dumps(record, default=str))
        return
    for key, value in record.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{count} x {name}" for name, count in value.items())
        if value not in ("", None):  # what there is nothing of
            typer.echo(f"{key}: {value}")
