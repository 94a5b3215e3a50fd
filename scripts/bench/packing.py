"""Wasted work of a batch, over simulated ranks: padding, and ranks that wait for the slowest.

    python scripts/bench/packing.py --json packing.json

Nothing is trained: samplers divide an epoch of rows, and the FLOPs of what each rank would compute are
counted. The rows are drawn from `MIX`: the shares of LLaVA-1.5's instruction mix are published, the lengths
of its parts are our guess. A manifest of real lengths (`.npy` as `mllm.data.lengths` keeps it) can be given.

Rows of the table: ours; rows packed where they fall (no balance); transformers' `BatchRebalanceSampler`;
LLaVA's sampler, its algorithm as published, on LLaVA's lengths (words); random batches. These three pad.
Columns: useful tokens (of those computed), FLOP balance (mean over maximum of the ranks, mean and worst
step), and both together: useful FLOPs over what the slowest rank computes, ranks times.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers.trainer_pt_utils import BatchRebalanceSampler

from mllm.data.files import write_atomic
from mllm.data.lengths import Lengths
from mllm.data.sampler import Divided, MicroBatches
from mllm.training.flops import decoder_flops

IMAGE_TOKENS = 576
LONGEST = 2048
# Part: rows (thousands, as published), whether with an image, median and spread (sigma of the logarithm) of
# its text tokens (guessed). Questions about one image are one row of many turns.
MIX = {
    "llava_instruct": (158, True, 250, 0.45),
    "vqa_v2": (83, True, 110, 0.50),
    "gqa": (72, True, 200, 0.55),
    "ok_vqa": (9, True, 75, 0.25),
    "ocr_vqa": (80, True, 140, 0.25),
    "a_okvqa": (66, True, 110, 0.30),
    "text_caps": (22, True, 85, 0.20),
    "ref_coco": (48, True, 250, 0.60),
    "visual_genome": (86, True, 330, 0.60),
    "share_gpt": (40, False, 900, 0.85),
}
# LLaVA-1.5-7B in stage 2, all of the language model trained; a picture goes through 23 of the 24 layers of
# the frozen ViT-L/14-336.
WEIGHTS, HEAD = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 4096 * 32000
LANGUAGE_MODEL: dict[str, Any] = {
    "weights": WEIGHTS,
    "head": HEAD,
    "width": 4096,
    "layers": 32,
    "trained": WEIGHTS,
    "head_trained": HEAD,
}
PICTURE = 0.366e12
Steps = Iterator[Divided]


def flops_of(lengths: Lengths) -> np.ndarray:
    """[N], of each row."""
    sizes = zip(lengths.tokens.tolist(), lengths.labels.tolist(), lengths.views.tolist(), strict=True)
    return np.array(
        [decoder_flops([t], labels, **LANGUAGE_MODEL) + PICTURE * views for t, labels, views in sizes]
    )


def make_manifest(rows: int, seed: int) -> Lengths:
    """Lengths like those of LLaVA-1.5's mix."""
    rng = np.random.default_rng(seed)
    thousands, image, median, spread = (np.array(column) for column in zip(*MIX.values(), strict=True))
    part = rng.choice(len(MIX), rows, p=thousands / thousands.sum())
    text = np.exp(rng.normal(np.log(median[part]), spread[part]))
    views = image[part].astype(np.int32)
    tokens = np.clip(text + 40 + IMAGE_TOKENS * views, 48, LONGEST).astype(np.int32)  # 40: the system prompt
    labels = ((tokens - IMAGE_TOKENS * views) * rng.uniform(0.2, 0.6, rows)).astype(np.int32)
    return Lengths(tokens, labels, views)


def ours(lengths: Lengths, args: argparse.Namespace) -> Steps:
    """Packs balanced by FLOPs."""
    shape = args.batch, args.accumulation, args.ranks
    sampler = MicroBatches(lengths, *shape, seed=args.seed, flops=flops_of)
    for batch in sampler.global_batches():
        yield sampler.divide(batch)


def as_dealt(order: list[int], args: argparse.Namespace) -> Steps:
    """Micro-batches of equally many rows, dealt to ranks in turn as accelerate does."""
    size = args.batch * args.ranks * args.accumulation
    for start in range(0, len(order) - size + 1, size):
        batch = [order[at : at + args.batch] for at in range(start, start + size, args.batch)]
        yield [batch[at : at + args.ranks] for at in range(0, len(batch), args.ranks)]


def at_random(lengths: Lengths, args: argparse.Namespace) -> Steps:
    """The Trainer's own order."""
    generator = torch.Generator().manual_seed(args.seed)
    yield from as_dealt(torch.randperm(len(lengths), generator=generator).tolist(), args)


def llava(lengths: Lengths, args: argparse.Namespace) -> Steps:
    """LLaVA's sampler: random megabatches of one modality, sorted, cut into chunks of even sums of words."""
    rng = np.random.default_rng(args.seed)
    words = np.maximum(
        (lengths.tokens - IMAGE_TOKENS * lengths.views) / rng.normal(1.35, 0.1, len(lengths)), 1
    )
    chunks = args.ranks * args.accumulation
    size = chunks * args.batch

    def grouped(rows: np.ndarray) -> list[list[int]]:
        shuffled = rng.permutation(rows)
        order = []
        for start in range(0, len(rows), size):
            mega = sorted(shuffled[start : start + size].tolist(), key=lambda row: -words[row])
            if len(mega) % chunks:
                order += [row for i in range(chunks) for row in mega[i::chunks]]
                continue
            parts: list[list[int]] = [[] for _ in range(chunks)]
            sums = [0.0] * chunks
            for row in mega:
                shortest = sums.index(min(sums))
                parts[shortest].append(row)
                sums[shortest] += words[row]
                if len(parts[shortest]) == args.batch:
                    sums[shortest] = float("inf")
            order += [row for part in parts for row in part]
        return [order[start : start + size] for start in range(0, len(order), size)]

    image, text = (grouped(np.flatnonzero(lengths.views > 0)), grouped(np.flatnonzero(lengths.views == 0)))
    megas = image[:-1] + text[:-1]
    megas = [megas[i] for i in rng.permutation(len(megas))] + [sorted(image[-1] + text[-1])]
    yield from as_dealt([row for mega in megas for row in mega], args)


def rebalanced(lengths: Lengths, args: argparse.Namespace) -> Steps:
    """`BatchRebalanceSampler`: groups of neighbouring lengths and even padded cost."""
    size = args.batch * args.ranks * args.accumulation
    samplers = [
        iter(
            BatchRebalanceSampler(
                lengths.tokens.tolist(), size, args.ranks, args.accumulation, seed=args.seed, rank=rank
            )
        )
        for rank in range(args.ranks)
    ]
    while first := next(samplers[0], None):
        steps = [[first, *(next(sampler) for sampler in samplers[1:])]]
        steps += [[next(sampler) for sampler in samplers] for _ in range(args.accumulation - 1)]
        yield steps


def judge(lengths: Lengths, steps: Steps, padded: bool) -> dict[str, float]:
    """What a way of dividing wastes."""
    useful_tokens = computed_tokens = useful = critical = 0.0
    balance, longest = [], 0
    flops = flops_of(lengths)
    ranks = 1
    for step in steps:
        ranks = len(step[0])
        work = np.zeros(ranks)
        for micro in step:
            for rank, rows in enumerate(micro):
                tokens = lengths.tokens[rows].astype(float)
                computed = np.full_like(tokens, tokens.max()) if padded else tokens
                sizes = Lengths(computed, lengths.labels[rows], lengths.views[rows])
                work[rank] += flops_of(sizes).sum()
                useful_tokens += tokens.sum()
                computed_tokens += computed.sum()
                longest = max(longest, int(computed.sum()))
                useful += flops[rows].sum()
        balance.append(work.mean() / work.max())
        critical += work.max()
    return {
        "useful_tokens": useful_tokens / computed_tokens,
        "flop_balance": float(np.mean(balance)),
        "flop_balance_worst": float(np.min(balance)),
        "useful_over_critical": useful / (ranks * critical),
        "longest_micro_batch": longest,
    }


def main() -> None:
    """Divide, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="real lengths in place of the guessed mix")
    parser.add_argument("--rows", type=int, default=32_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16, help="rows a micro-batch")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lengths = Lengths(*np.load(args.lengths)) if args.lengths else make_manifest(args.rows, args.seed)
    ways: dict[str, tuple[Callable[..., Steps], bool]] = {
        "ours: packs by FLOPs": (ours, False),
        "packs as they fall": (at_random, False),
        "BatchRebalanceSampler": (rebalanced, True),
        "LLaVA's sampler": (llava, True),
        "random, padded": (at_random, True),
    }
    results = {name: judge(lengths, way(lengths, args), padded) for name, (way, padded) in ways.items()}
    console = Console()
    table = Table(
        title=f"{len(lengths):,} rows of {lengths.tokens.mean():.0f} ± {lengths.tokens.std():.0f} tokens, "
        f"{args.ranks} ranks x {args.accumulation} x {args.batch} rows"
    )
    table.add_column("", no_wrap=True)
    for column in ("useful tokens", "balance", "worst", "useful / slowest", "longest"):
        table.add_column(column, justify="right")
    for name, found in results.items():
        *shares, longest = found.values()
        table.add_row(name, *(f"{share:.4f}" for share in shares), f"{longest:,}")
    console.print(table)
    if args.json:
        record = {
            "rows": len(lengths),
            "mean": float(lengths.tokens.mean()),
            "std": float(lengths.tokens.std()),
            "guessed_lengths": args.lengths is None,
            **{name: getattr(args, name) for name in ("ranks", "batch", "accumulation", "seed")},
            "results": results,
        }
        write_atomic(args.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
