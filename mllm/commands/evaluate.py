"""`mllm eval build | run | score`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mllm.commands.options import AsJson, Decode, ModelDir, load_model

app = typer.Typer(help="Ask a model benchmark questions; score its answers.", no_args_is_help=True)


@app.command()
def build(
    instances: Annotated[Path, typer.Argument(help="COCO instances file")],
    out: Annotated[Path, typer.Argument(help="folder for pope_{random,popular,adversarial}.jsonl")],
    images: Annotated[int, typer.Option(help="how many images")] = 500,
    per_image: Annotated[int, typer.Option(help="questions an image, half yes, half no")] = 6,
    seed: Annotated[int, typer.Option(help="the same seed gives the same questions")] = 0,
) -> None:
    """Build POPE questions from annotations.

    [bold]Example[/]

      mllm eval build instances_val2017.json pope/
    """
    from eval.tasks.pope_build import write

    typer.echo(json.dumps(write(instances, out, images, per_image, seed), indent=1))


@app.command()
def run(
    model: ModelDir,
    questions: Annotated[Path, typer.Argument(help="POPE question file")],
    out: Annotated[Path, typer.Argument(help="predictions file (JSONL) to write")],
    image_root: Annotated[Path, typer.Option(help="folder of the images")],
    decode: Decode = "greedy",
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    batch_size: Annotated[int, typer.Option(help="questions at a time")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer")] = 128,
    prompt_style: Annotated[str, typer.Option(help="llava, vcd or plain")] = "llava",
    blank_images: Annotated[bool, typer.Option(help="show blank images: does the model look?")] = False,
    overwrite: Annotated[bool, typer.Option(help="replace a run with other settings")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Answer the questions; an interrupted run continues.

    [bold]Example[/]

      mllm eval run runs/instruct pope_random.jsonl greedy.jsonl --image-root val2014
    """
    from eval.run import run as ask

    loaded, processor = load_model(model, device)
    path = ask(
        loaded,
        processor,
        questions,
        image_root,
        out,
        decode=decode,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        prompt_style=prompt_style,
        checkpoint=model,
        blank_images=blank_images,
        overwrite=overwrite,
    )
    typer.echo(path)


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help="predictions: ours, LLaVA's, VCD's or POPE's format")],
    questions: Annotated[Path, typer.Argument(help="question file with the labels")],
    rule: Annotated[
        str, typer.Option(help="official (POPE and LLaVA) or vcd; both are reported")
    ] = "official",
    annotations: Annotated[Path | None, typer.Option(help="folder of coco_pope_{split}.json")] = None,
    match: Annotated[str, typer.Option(help="pair by 'id', by 'order', or 'auto'")] = "auto",
    answer_field: Annotated[str | None, typer.Option(help="field that holds the answer")] = None,
    out: Annotated[Path | None, typer.Option(help="write the result here as JSON")] = None,
    as_json: AsJson = False,
) -> None:
    """Score predictions; no model is needed.

    [bold]Example[/]

      mllm eval score greedy.jsonl pope_random.jsonl --json
    """
    from eval.score import score as judge
    from eval.table import score_table
    from mllm.data.files import write_atomic

    result = judge(
        predictions,
        questions,
        rule,
        annotations=annotations,
        match=match,  # type: ignore[arg-type]
        answer_field=answer_field,
    )
    if out is not None:
        write_atomic(out, json.dumps(result, indent=1) + "\n")
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        from rich.console import Console

        Console(highlight=False).print(score_table(result))
