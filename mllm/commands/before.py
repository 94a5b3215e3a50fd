"""`mllm explain`, `mllm plan`: what a recipe means and what it takes, before it is started."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mllm.commands.options import AsJson, Overrides, RecipeName


def explain(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="how many it will run on")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe trains, how fast, on what batches and rows. No weights are read.

    Data that are not there are noted on stderr, with what is therefore unknown; the exit code is 0.

    [bold]Examples[/]

      mllm explain quickstart/instruct

      mllm explain llava-1.5-7b/align --gpus 8 model.language_model=/models/vicuna-7b-v1.5
    """
    from dataclasses import asdict

    from rich.console import Console

    from mllm.training.explain import explain as run
    from mllm.training.explain import report
    from mllm.training.outline import whole_recipe

    found = run(whole_recipe(recipe, overrides or []), gpus)
    unknown = "rows and shares" if found.steps else "rows, shares and steps"
    _note(found.absent, f"{unknown} are not known, and the row shown is made up")
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        Console(highlight=False).print(report(found))


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="how many cards, and the GB of each")] = "8x80",
    tokens: Annotated[int | None, typer.Option(help="of the longest row, image included")] = None,
    mean_tokens: Annotated[int | None, typer.Option(help="of a mean row")] = None,
    tflops: Annotated[float | None, typer.Option(help="peak of a card, dense")] = None,
    efficiency: Annotated[float, typer.Option(min=0.01, max=1, help="share of it that is reached")] = 0.4,
    as_json: AsJson = False,
) -> None:
    """Say how much memory and time a recipe takes, and what to change so that it fits.

    Neither weights nor rows are read; data that are not there are noted on stderr.

    Exit code 1 if the recipe does not fit as it is.

    [bold]Examples[/]

      mllm plan llava-1.5-7b/instruct --gpus 8x80

      mllm plan my_recipe.yaml --gpus 1x24 train.per_device_batch_size=4

      mllm plan my_recipe.yaml model.language_model="{model_type: llama}"
    """
    from dataclasses import asdict

    from rich.console import Console

    from mllm.training.explain import absent
    from mllm.training.outline import whole_recipe
    from mllm.training.plan import Gpus, report
    from mllm.training.plan import plan as run

    config = whole_recipe(recipe, overrides or [])
    found = run(
        config,
        Gpus.parse(gpus),
        tokens=tokens,
        mean_tokens=mean_tokens,
        tflops=tflops,
        efficiency=efficiency,
    )
    _note(absent(config), "the plan holds, as it reads no rows, but the run cannot start")
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        Console(highlight=False).print(report(found))
    if not any(option.fits for option in found.options if option.chosen):
        raise typer.Exit(1)


def _note(absent: list[str], so: str) -> None:
    """Say on standard error what is not there, and what follows where it is rows to train on."""
    for place in absent:
        typer.secho(f"note: {place} is not on this machine", err=True, fg="yellow", bold=True)
    if any(place.startswith("data.path") for place in absent):
        typer.secho(f"note: therefore {so}", err=True, fg="yellow", bold=True)
