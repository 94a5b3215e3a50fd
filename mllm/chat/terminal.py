"""Chat in the terminal: `mllm chat MODEL --image F`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from transformers import TextStreamer

from mllm.chat.session import ChatSession
from mllm.decoding import describe, parse_decode
from mllm.errors import MllmError

HELP = """\
/image F        show the model an image with the next question
/decode D       change the decoding: greedy, sample, vcd, or with settings: vcd,alpha=1,noise_step=500
/clear          forget the conversation and its images
/help           this text
/quit           leave (so does Ctrl-D); Ctrl-C stops an answer"""


class ConsoleStreamer(TextStreamer):
    """Writes an answer word by word, without the prompt and special tokens."""

    def __init__(self, tokenizer: Any, console: Console):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a finished piece; markup in it is text."""
        self.console.print(text, end="\n" if stream_end else "", markup=False, highlight=False)


def chat_loop(session: ChatSession, console: Console, lines: Iterable[str] | None = None) -> None:
    """Read questions and commands until `/quit` or the end of the input.

    Args:
        session: the conversation.
        console: where to print.
        lines: input lines; default: typed ones.
    """
    console.print(f"[dim]/help shows the commands. Decoding: {describe(session.decode)['name']}.[/]")
    for image in session.images:
        console.print(f"[dim]image: {image}[/]", highlight=False)
    for line in lines if lines is not None else _typed(console):
        text = line.strip()
        if not text:
            continue
        if text == "/quit":
            return
        try:
            if text.startswith("/"):
                _command(session, console, text)
            else:
                session.ask(text, ConsoleStreamer(session.processor.tokenizer, console))
        except MllmError as error:
            console.print(f"[red]error:[/] {error}", highlight=False)
        except KeyboardInterrupt:
            console.print("\n[dim](stopped; the question is not remembered)[/]")


def _typed(console: Console) -> Iterable[str]:
    while True:
        try:
            yield console.input("[bold green]you>[/] ")
        except KeyboardInterrupt:
            console.print()
        except EOFError:
            console.print()
            return


def _command(session: ChatSession, console: Console, text: str) -> None:
    name, _, argument = text.partition(" ")
    commands: dict[str, Callable[[], str]] = {
        "/image": lambda: _image(session, argument.strip()),
        "/decode": lambda: _decode(session, argument.strip()),
        "/clear": lambda: _clear(session),
        "/help": lambda: HELP,
    }
    if name not in commands:
        console.print(f"unknown command {name}; /help shows the commands", highlight=False)
        return
    console.print(f"[dim]{commands[name]()}[/]", highlight=False)


def _image(session: ChatSession, path: str) -> str:
    if not path:
        return "say which file: /image photo.jpg"
    session.add_image(path)
    return f"image: {path} (goes with the next question)"


def _decode(session: ChatSession, settings: str) -> str:
    session.decode = parse_decode(settings or "greedy")
    return f"decoding: {describe(session.decode)}"


def _clear(session: ChatSession) -> str:
    session.clear()
    return "cleared; show an image again with /image F"
