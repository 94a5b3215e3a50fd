"""`mllm card`, `mllm push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mllm.commands.options import AsJson, ModelDir


def card(
    checkpoint: ModelDir,
    evaluations: Annotated[
        list[Path] | None, typer.Option("--eval", help="result of 'mllm eval score --json' about it")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a card that was changed by hand")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint's model card, README.md, from what the run has recorded.

    The section `card` of the recipe says what a run cannot know: licence, title, languages, Hub names; and
    data.license or data.path[].license the licences of the data.

    [bold]Examples[/]

      mllm card runs/instruct

      mllm card runs/instruct --eval pope_random.json --eval pope_popular.json
    """
    from mllm.publish.card import write_card

    path = write_card(checkpoint, evaluations or [], force)
    typer.echo(json.dumps({"card": str(path)}) if as_json else path)


def push(
    checkpoint: ModelDir,
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub")],
    private: Annotated[bool, typer.Option("--private", help="if the repository is made")] = False,
    revision: Annotated[str | None, typer.Option(help="branch; default: main")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only list the files")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint with its model card to the Hugging Face Hub.

    Optimiser states, random states, trackers' logs and intermediate checkpoints stay here. The token is that
    of HF_TOKEN or of 'hf auth login'.

    [bold]Examples[/]

      mllm push runs/instruct me/my-model --dry-run

      mllm push runs/merged me/my-model --private --revision v1
    """
    from mllm.publish import push as run
    from mllm.publish.push import as_json as to_json

    done = run(checkpoint, repo_id, private=private, revision=revision, dry_run=dry_run)
    if as_json:
        typer.echo(to_json(done))
        return
    for name, size in done.files:
        typer.echo(f"{size:>14,}  {name}")
    total = sum(size for _, size in done.files)
    typer.echo(
        f"{total:>14,}  {len(done.files)} files {'would go' if done.url is None else 'went'} to {repo_id}"
    )
    for note in done.notes:
        typer.echo(f"note: {note}", err=True)
    if done.url is not None:
        typer.echo(done.url)
