"""The command line: every command, and how an error becomes one line."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mllm.commands import before, chat, data, evaluate, publish, train, weights
from mllm.errors import MllmError

app = typer.Typer(
    name="mllm",
    help="Train, probe and serve multimodal LLMs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train.train)
app.command()(train.recipes)
app.command()(before.explain)
app.command()(before.plan)
app.command()(chat.chat)
app.command()(train.quickstart)
app.command("import")(weights.import_)
app.command()(weights.export)
app.command()(weights.merge)
app.command()(publish.card)
app.command()(publish.push)
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="eval")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command; `main` reads --debug itself."""


def main() -> None:
    """Run the command line; an error that the user can mend is one line, without a traceback."""
    debug = "--debug" in sys.argv
    quiet_libraries()
    try:
        sys.exit(app(standalone_mode=False) or 0)  # the code of typer.Exit, 130 of an interruption
    except (MllmError, OSError) as error:  # also of a full disk, or of a file where a folder should be
        if debug:
            raise
        sys.exit(f"error: {one_line(error)}")
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        # Typer's own complaints (unknown option, missing argument) know how to show themselves.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        raise


def one_line(error: Exception) -> str:
    """The message; an error that comes out of a dataloader worker has a traceback in front of it."""
    text = str(error).strip()
    if text.startswith("Caught "):
        text = text.splitlines()[-1].rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split()) or type(error).__name__


def quiet_libraries() -> None:
    """Keep library chatter off the screen; best before anything heavy is imported."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:  # `import mllm` has brought it, and it has read its environment
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    # bitsandbytes says on import that an optional kernel package is absent.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed, which accelerate imports wherever it is installed, says aloud that there is no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to" not in str(record.msg))
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
