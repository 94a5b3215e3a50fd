"""`mllm chat`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mllm.commands.options import AsJson, Decode, ModelDir, load_model


def chat(
    model: ModelDir,
    image: Annotated[
        list[Path] | None, typer.Option(help="show this image; may be given several times")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="ask this, print the answer, leave")] = None,
    decode: Decode = "greedy",
    max_new_tokens: Annotated[int, typer.Option(help="longest answer")] = 256,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one")] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a model.

    [bold]Examples[/]

      mllm chat runs/instruct --image photo.jpg

      mllm chat runs/instruct --image photo.jpg --prompt "What is this?" --decode vcd
    """
    from rich.console import Console

    from mllm.chat.session import ChatSession
    from mllm.chat.terminal import chat_loop
    from mllm.decoding import describe, parse_decode

    decoder = parse_decode(decode)
    loaded, processor = load_model(model, device)
    session = ChatSession(loaded, processor, decoder, max_new_tokens, seed)
    for path in image or []:
        session.add_image(str(path))
    if prompt is None:
        _warn_of_stage(model)
        chat_loop(session, Console(highlight=False))
        return
    answer = session.ask(prompt)
    images = [str(path) for path in image or []]
    record = {"prompt": prompt, "images": images, "answer": answer, "decode": describe(decoder), "seed": seed}
    typer.echo(json.dumps(record) if as_json else answer)


def _warn_of_stage(path: Path) -> None:
    from mllm.model.checkpoint import read_manifest

    if read_manifest(path).get("stage") == "align":
        typer.echo(
            "warning: this is a stage-1 checkpoint; it captions, it does not answer questions", err=True
        )
