"""`mllm import`, `mllm export`, `mllm merge`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mllm.commands.options import AsJson, ModelDir


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


def merge(
    checkpoint: ModelDir,
    out: Annotated[Path, typer.Argument(help="checkpoint directory to write")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: each weight's own")
    ] = None,
    base: Annotated[
        list[str] | None, typer.Option(help="where the base of a part has moved: language_model=DIR")
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="write untrained parts too")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge the adapters of a checkpoint into its weights: LoRA, rsLoRA, DoRA, IA3, and QLoRA's 4 bit.

    The result is a checkpoint that needs neither adapters nor the bases of the parts that had some. It is
    compared with the source; where they differ, nothing is written.

    [bold]Examples[/]

      mllm merge runs/instruct_lora runs/merged

      mllm merge runs/qlora/checkpoint-400 runs/merged --dtype bfloat16
    """
    from rich.console import Console

    from mllm.errors import ConfigError
    from mllm.model.convert import merge_checkpoint

    places = [entry.partition("=") for entry in base or []]
    if odd := [part for part, equals, place in places if not (equals and place)]:
        raise ConfigError(f"--base {odd[0]!r}: write the part and its folder: language_model=DIR")
    moved = {part: place for part, _, place in places}
    with Console(stderr=True).status("merging") as status:
        found = merge_checkpoint(checkpoint, out, dtype=dtype, base=moved, whole=whole, say=status.update)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "output": str(out)}))
    else:
        typer.echo(f"{found}\n{out}")
