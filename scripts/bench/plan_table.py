"""What fits where: LLaVA-1.5 7B and 13B on cards of 24, 40, 80 and 141 GB, as a Markdown table.

    python scripts/bench/plan_table.py

For one card and for eight, the plainest way that takes the published rows a card, or else the largest
micro-batch that fits in any way: offloading is tried last. Gradient checkpointing is on. No weights are
read; the sizes are the published ones.
"""

import argparse
from typing import Any

from mllm.config import RunConfig
from mllm.training.memory import WAYS, Facts, Measure, Way, bytes_a_rank
from mllm.training.plan import GIB, USABLE

VISION = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336,
    "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip
LANGUAGE = {
    "7B": {"model_type": "llama"},
    "13B": {
        "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40,
    },
}  # fmt: skip
# Rows a card and tokens of the longest row: scripts/v1_5 of LLaVA; captions are short.
STAGES: dict[str, tuple[str, str, int, int]] = {
    "stage 1": ("align", "frozen", 32, 640),
    "full": ("instruct", "full", 16, 2048),
    "LoRA": ("instruct", "lora", 16, 2048),
    "QLoRA": ("instruct", "qlora", 16, 2048),
}
CARDS = (24, 40, 80, 141)


def run_of(size: str, stage: str, tuning: str) -> RunConfig:
    """A run of a published size; nothing of it is ever read or written."""
    model = {"vision_encoder": VISION, "language_model": LANGUAGE[size], "dtype": "bfloat16"}
    return RunConfig.model_validate(
        {
            "stage": stage,
            "model": {**model, "template": "plain" if stage == "align" else "vicuna_v1"},
            "tune": {"language_model": tuning},
            "data": {"path": "none"},
            "train": {"output_dir": "none", "bf16": True},
        }
    )


def best(facts: dict[bool, Facts], cards: int, memory: int, rows: int) -> str:
    """The way that takes most rows, the plainest of equals, as `rows (way, GiB)`."""
    found: tuple[int, Way, int] | None = None
    for way in WAYS:
        if way.zero in (1, 2) and cards == 1 and not way.optimizer_on_cpu:
            continue  # nothing to share
        for size in (n for n in (32, 16, 8, 4, 2, 1) if n <= rows):
            taken = bytes_a_rank(facts[way.zero == 0], way, cards, size, True).total
            if taken <= USABLE * memory * GIB:
                if found is None or size > found[0]:
                    found = (size, way, taken)
                break
    if found is None:
        return "-"
    size, way, taken = found
    return (
        f"{size} ({way.name.replace('_offload', '+cpu').replace('no DeepSpeed', 'plain')}, {taken / GIB:.0f})"
    )


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    head = [f"{cards} x {memory}" for cards in (1, 8) for memory in CARDS]
    print("| rows a card (way, GiB) | " + " | ".join(head) + " |")
    print("|---" * (len(head) + 1) + "|")
    for size in LANGUAGE:
        for name, (stage, tuning, rows, tokens) in STAGES.items():
            config: Any = run_of(size, stage, tuning)
            facts = {plain: Measure(config, deepspeed=not plain).facts(tokens) for plain in (True, False)}
            cells = [best(facts, cards, memory, rows) for cards in (1, 8) for memory in CARDS]
            print(f"| {size}, {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
