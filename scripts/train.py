"""The file that `deepspeed`, `torchrun` and `accelerate launch` take: RECIPE [section.key=value ...]."""

import sys

import torch.distributed as dist

from mllm.errors import MllmError
from mllm.training.train import train


def main() -> None:
    """Parse the arguments of a launcher and train."""
    # DeepSpeed adds --local_rank=N; the rank is read from the environment.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    if not arguments:
        sys.exit("usage: deepspeed scripts/train.py RECIPE [section.key=value ...]")
    try:
        train(arguments[0], arguments[1:])
    except MllmError as error:
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():  # or a ZeRO-3 run aborts while the interpreter ends
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
