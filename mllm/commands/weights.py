"""`mllm import`, `mllm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.commands.options import ModelDir


def import_(
    source: Annotated[Path, typer.Argument(help="directory of published weights")],
    out: Annotated[Path, typer.Argument(help="checkpoint directory to write")],
    template: Annotated[str | None, typer.Option(help="chat template; default: the source's own")] = None,
    language_model: Annotated[str | None, typer.Option(help="LLaVA's layout: the base model")] = None,
    vision_encoder: Annotated[str | None, typer.Option(help="LLaVA's layout: the vision encoder")] = None,
) -> None:
    """Make a checkpoint of published weights: LLaVA, LLaVA-NeXT, BLIP-2, InstructBLIP.

    Reads directories of transformers, and LLaVA's own (`mm_projector.bin`, with LoRA adapters or without).
    The result is compared with the source; where they differ, nothing is written.

    [bold]Examples[/]

      mllm import llava-1.5-7b-hf runs/llava

      mllm import llava-v1.5-7b-lora runs/lora --language-model vicuna-7b-v1.5 --vision-encoder clip-l-336
    """
    from mllm.model.convert import import_weights

    typer.echo(import_weights(source, out, template, language_model, vision_encoder))
    typer.echo(out)


def export(
    checkpoint: ModelDir,
    out: Annotated[Path, typer.Argument(help="directory to write")],
) -> None:
    """Write a checkpoint as transformers' own LLaVA, LLaVA-NeXT, BLIP-2 or InstructBLIP.

    Adapters are merged. The result loads without mllm, so that vLLM and others serve it. It is compared with
    the checkpoint; where they differ, nothing is written.

    [bold]Example[/]

      mllm export runs/instruct llava-mine
    """
    from mllm.model.convert import export_stock

    typer.echo(export_stock(checkpoint, out))
    typer.echo(out)
