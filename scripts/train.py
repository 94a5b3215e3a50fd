"""What `deepspeed`, `torchrun` and `accelerate launch` take: RECIPE [section.key=value ...] [--preflight]."""

import atexit
import os
import sys

from mllm.cli import one_line, quiet_libraries
from mllm.errors import MllmError


def main() -> None:
    """Parse the arguments of a launcher and train."""
    # DeepSpeed adds --local_rank=N; the rank is read from the environment.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    check = "--preflight" in arguments
    arguments = [argument for argument in arguments if argument != "--preflight"]
    if not arguments:
        sys.exit("usage: deepspeed scripts/train.py RECIPE [section.key=value ...] [--preflight]")
    quiet_libraries()
    import torch.distributed as dist
    from rich.console import Console

    from eval.during_training import Asker
    from mllm.config import load_recipe
    from mllm.training.preflight import preflight, table
    from mllm.training.train import train

    code = 0
    try:
        if check:
            report = preflight(load_recipe(arguments[0], arguments[1:]), Asker())
            if os.environ.get("RANK", "0") == "0" or not report.of_all:  # rank 0 has the report of all
                Console(stderr=True, highlight=False).print(table(report))
            code = 0 if report.passed else 1
        else:
            train(arguments[0], arguments[1:], asker=Asker())
    except (MllmError, OSError) as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        code = 1
    if not dist.is_initialized():
        sys.exit(code)
    if code == 0:  # else other ranks may wait for this one within a collective, and it would wait for them
        dist.destroy_process_group()
    leave(code)


def leave(code: int) -> None:
    """End a rank without taking the interpreter apart.

    Now and then a thread of the collectives outlives its group there, which C++ answers with an abort; the
    launcher would then report a failure of a run that has written everything.
    """
    atexit._run_exitfuncs()  # what trackers and workers have still to do
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
