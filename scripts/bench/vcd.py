"""What contrastive decoding costs a token: one forward of both branches, or two forwards in turn.

    python scripts/bench/vcd.py --json vcd.json

A random language model (200 M parameters or more, bf16, CPU) behind a tiny vision encoder answers
about one image. Three ways take turns in one process: plain greedy, `vcd` (one batch of two rows)
and, for comparison, VCD as two forwards with two caches a step. A step's time is the gap between two
tokens, prefill left out. Each round gives the ratios of its medians, and the median round counts, so
that neither a burst of load nor a slow drift of a shared machine decides.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig

from mllm.decoding import Vcd, describe, generate
from mllm.decoding.contrastive import contrast
from mllm.decoding.noise import add_noise
from mllm.model import MllmConfig, MllmForConditionalGeneration

GOAL = 1.25
VOCAB, WIDTH, INNER, HEAD = 32_000, 1024, 2816, 64
SIDE, PATCH, TEXT_TOKENS = 112, 14, 48
PATCHES = (SIDE // PATCH) ** 2
VCD = Vcd()


class Stopwatch:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time: of the prompt, of the prefill's token, then of one token a step."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""

    def step(self) -> float:
        """Median seconds a token, prefill and the first step after it left out."""
        return median(later - earlier for earlier, later in pairwise(self.times[2:]))


def build(millions: float) -> MllmForConditionalGeneration:
    """A model of random weights whose language model has at least `millions` M parameters."""
    layer = 4 * WIDTH**2 + 3 * WIDTH * INNER
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=max(1, math.ceil((millions * 1e6 - 2 * VOCAB * WIDTH) / layer)),
        num_attention_heads=WIDTH // HEAD,
        bos_token_id=None,
        eos_token_id=None,  # no answer ends early
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = MllmConfig(
        vision_config=vision,
        text_config=text,
        num_prefix_tokens=1,
        num_patches=PATCHES,
        num_image_tokens=PATCHES,
        vision_dim=64,
        pixel_shape=[3, SIDE, SIDE],
        image_token_id=VOCAB,
    )
    torch.manual_seed(0)
    return MllmForConditionalGeneration(config).to(torch.bfloat16).eval()


def prompt() -> dict[str, Tensor]:
    """One image, then text."""
    torch.manual_seed(0)
    text = torch.randint(1, VOCAB, (1, TEXT_TOKENS))
    return {
        "input_ids": torch.cat([torch.full((1, PATCHES), VOCAB), text], dim=1),
        "attention_mask": torch.ones(1, PATCHES + TEXT_TOKENS, dtype=torch.long),
        "pixel_values": torch.randn(1, 3, SIDE, SIDE),
    }


def two_forwards(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    streamer: Stopwatch,
    **clean: Any,
) -> Tensor:
    """VCD as commonly done, a `custom_generate`: clean forward, noised forward, two caches."""
    pixels = add_noise(clean["pixel_values"], VCD.noise_step, VCD.noise_seed)
    branches = [clean, {**clean, "pixel_values": pixels, "past_key_values": DynamicCache()}]
    streamer.put(input_ids)
    prefill, done = True, False
    while not done:
        logits = []
        for i, kwargs in enumerate(branches):
            inputs = model.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=None if prefill else 1,
                is_first_iteration=prefill,
                **kwargs,
            )
            outputs = model(**inputs, return_dict=True)
            branches[i] = model._update_model_kwargs_for_generation(outputs, kwargs)
            logits.append(outputs.logits[:, -1].float())
        prefill = False
        scores = logits_processor(input_ids, contrast(*logits, VCD.alpha, VCD.beta))
        tokens = scores.argmax(-1)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        streamer.put(tokens)
        done = bool(stopping_criteria(input_ids, None).all())
    return input_ids


def measure(model: Any, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds a token of each way, once a round; the ways take turns, a warm-up round is dropped."""
    inputs = prompt()
    settings = {"max_new_tokens": tokens, "do_sample": False}
    ways: dict[str, Callable[[Stopwatch], Any]] = {
        "plain": lambda watch: generate(model, inputs, "greedy", max_new_tokens=tokens, streamer=watch),
        "vcd": lambda watch: generate(model, inputs, VCD, max_new_tokens=tokens, streamer=watch),
        "sequential": lambda watch: model.generate(
            **inputs, **settings, custom_generate=partial(two_forwards, streamer=watch)
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            watch = Stopwatch()
            run(watch)
            if len(watch.times) != tokens + 1:
                raise RuntimeError(f"{name}: {len(watch.times) - 1} tokens instead of {tokens}")
            if turn:
                seconds[name].append(watch.step())
    return seconds


def over_plain(seconds: dict[str, list[float]], way: str) -> float:
    """Median over the rounds of the time of `way` divided by the plain time of the same round."""
    return median(a / b for a, b in zip(seconds[way], seconds["plain"], strict=True))


def main() -> None:
    """Measure, print a table, write the record; exit with 1 beyond the goal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--params", type=float, default=210, help="language model, millions at least")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens a run")
    parser.add_argument("--repeats", type=int, default=9, help="rounds that count")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 is least noisy")
    options = parser.parse_args()
    if options.tokens < 4 or options.repeats < 1:
        parser.error("needs --tokens of at least 4 and --repeats of at least 1")
    torch.set_num_threads(options.threads)

    model = build(options.params)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    seconds = measure(model, options.tokens, options.repeats)
    weights = sum(weight.numel() for weight in model.language_model.parameters())
    record = {
        "vcd_over_plain": round(over_plain(seconds, "vcd"), 3),
        "sequential_over_plain": round(over_plain(seconds, "sequential"), 3),
        "goal_vcd_over_plain": GOAL,
        "milliseconds_a_token": {k: round(1e3 * median(v), 2) for k, v in seconds.items()},
        "rounds": {k: [round(1e3 * s, 2) for s in v] for k, v in seconds.items()},
        "settings": {
            "language_model_parameters": weights,
            "dtype": "bfloat16",
            "device": "cpu",
            "batch": 1,
            "prompt_tokens": PATCHES + TEXT_TOKENS,
            "new_tokens": options.tokens,
            "repeats": options.repeats,
            "threads": options.threads,
            "decode": describe(VCD),
        },
        "load_average_before": load,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")

    table = Table(title=f"VCD a token, {weights / 1e6:.0f} M parameters, bf16, CPU")
    for heading in ("way", "ms a token, best", "over plain"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for way in seconds:
        table.add_row(way, f"{1e3 * min(seconds[way]):.1f}", f"{over_plain(seconds, way):.2f}")
    Console().print(table)
    if record["vcd_over_plain"] > GOAL:
        raise SystemExit(f"vcd costs {record['vcd_over_plain']} of plain, the goal is {GOAL}")


if __name__ == "__main__":
    main()
