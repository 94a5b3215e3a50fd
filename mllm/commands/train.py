"""`mllm train`, `mllm recipes`, `mllm quickstart`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mllm.commands.options import AsJson, Overrides, RecipeName

if TYPE_CHECKING:
    from mllm.config import RunConfig


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(help="auto: from the newest complete checkpoint; or the path of one")
    ] = None,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="check rows, longest batch and saving; do not train")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train one stage, or with --preflight see in minutes whether it would.

    The preflight's exit code is 0 only if all has passed; bad rows are listed in output_dir/preflight.json.

    [bold]Examples[/]

      mllm train llava-1.5-7b/align data.path=captions.json data.image_root=images

      mllm train my_recipe.yaml train.learning_rate=1e-4 --resume auto

      mllm train my_recipe.yaml --preflight

      deepspeed --num_gpus 8 scripts/train.py llava-1.5-7b/instruct
    """
    from mllm.config import load_recipe

    # As JSON, which is YAML, so that any path is a value.
    asked = [] if resume is None else [f"train.resume={json.dumps(resume)}"]
    config = load_recipe(recipe, [*(overrides or []), *asked])  # faults are told before the libraries load
    if preflight:
        _preflight(config, as_json)
        return
    from eval.during_training import Asker
    from mllm.training.train import train as run

    try:
        path = run(config, asker=Asker())
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command with --resume auto goes on from the last save", err=True)
        raise typer.Exit(130) from None
    typer.echo(json.dumps({"output": str(path)}) if as_json else path)


def _preflight(config: RunConfig, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from eval.during_training import Asker
    from mllm.training.preflight import preflight, table

    report = preflight(config, Asker())
    if as_json:
        typer.echo(json.dumps({"passed": report.passed, **asdict(report)}))
    else:
        Console(highlight=False).print(table(report))
    if not report.passed:
        raise typer.Exit(1)


def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes: one folder a published system, one file a stage.

    [bold]Example[/]

      mllm recipes
    """
    from rich.console import Console
    from rich.table import Table

    from mllm.config import shipped_recipes, summary_of

    summaries = {name: summary_of(name) for name in shipped_recipes()}
    if as_json:
        typer.echo(json.dumps(summaries, indent=1))
        return
    table = Table("recipe", "what it is", box=None, pad_edge=False)
    for name, summary in summaries.items():
        table.add_row(name, summary)
    Console(highlight=False).print(table)


def quickstart(
    out: Annotated[Path, typer.Option(help="where everything is written")] = Path("runs/quickstart"),
    fast: Annotated[bool, typer.Option(help="a few steps and questions, to see that it works")] = False,
    seed: Annotated[int, typer.Option(help="of the world, the training and the sampling")] = 0,
) -> None:
    """The whole story on a CPU, offline: data, both stages, POPE with and without VCD, a report.

    [bold]Examples[/]

      mllm quickstart

      mllm quickstart --fast --out /tmp/look
    """
    from mllm.quickstart.run import run

    typer.echo(run(out, fast=fast, seed=seed))
