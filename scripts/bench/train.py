"""What a training step costs beside Hugging Face with LLaVA's settings: same weights, same rows, one process.

    python scripts/bench/train.py --json scripts/bench/train.json

A Llama with the proportions of LLaVA-1.5-7B (head / body 2 %, adapters / body 4.9 %, vision 2 % of the
FLOPs; lengths of its instruction mix, a quarter of them) behind a CLIP encoder. Contenders take turns, an
epoch each a round, from the first batch to the last step; the first round warms up, and the median of the
rounds' ratios counts. One thread, float32; the seconds are the process's CPU seconds, so that other work on
the machine counts little.

Keys of the JSON: `stage2_vs_hf`, `stage1_vs_hf`: our steps a second over those of Hugging Face's Trainer
with `LlavaForConditionalGeneration`, LLaVA's sampler, padding and gradient checkpointing (`llava_peer.py`),
which is the reentrant kind, as LLaVA's transformers had it; `..._early_stop`: with today's default kind,
which computes a layer's last product only once; `..._without_checkpointing`: with none. `lora_over_full`:
seconds of our step. `activation_bytes_over_hf`: what a forward pass leaves for the backward pass, live bytes
of the C allocator, with selective checkpointing over Hugging Face's eager model without any, on equal
unpadded rows in full tuning, at `activation_time_over_hf` of its time. `head_speedup`: head and loss at
every position over head and loss at the labels, where one of eight has one. The file is written after each
part; with `--parts`, the others' keys stay in it. All of it takes about 20 minutes, with `--rounds 5` 30.

We compute the last layer's feed-forward at labels only, and this model of 4 layers gains eight times as much
by that as the 7B model's 32 do. Keys with `_of_32_layers` take an eighth of what it saves here, which is the
difference between our step and our step with the whole last layer, measured in the same rounds.
"""

import argparse
import ctypes
import json
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from llava_peer import PaddingCollator, train_peer
from packing import IMAGE_TOKENS, make_manifest
from PIL import Image
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm.config import RunConfig
from mllm.data.collator import Collator
from mllm.data.files import write_atomic
from mllm.data.lengths import measure
from mllm.data.rows import open_rows
from mllm.data.schema import assistant, user
from mllm.data.tokens import IGNORE
from mllm.model import MllmForConditionalGeneration, MllmProcessor, load
from mllm.model.checkpoint import save
from mllm.model.convert import export_stock
from mllm.model.label_head import head_only_at, labelled_places
from mllm.training.recompute import checkpoint_selectively
from mllm.training.train import train

GOALS = {
    "stage2_vs_hf": (">=", 1.8),
    "stage1_vs_hf": (">=", 1.45),
    "lora_over_full": ("<=", 0.85),
    "activation_bytes_over_hf": ("<=", 0.75),
    "activation_time_over_hf": ("<=", 1.1),
    "head_speedup": (">=", 8.0),
}
SHRINK = 4  # of the lengths: 144 tokens an image for 576
PUBLISHED_LAYERS = 32
WIDTH, LAYERS, INNER, VOCAB = 640, 4, 1720, 628  # head / body 0.020; in the 7B model 0.0202
RANK = 20  # adapters / body 0.049; in the 7B model, at rank 128, 0.0494
SIDE, PATCH = 96, 8
WORDS = [a + b + c for a in "bdfgk" for b in "aeiou" for c in ("", "n", "st")]


def make_model(folder: Path) -> None:
    """Our checkpoint and the same weights as transformers has them."""
    torch.manual_seed(0)
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            image_size=SIDE, patch_size=PATCH,
        )
    )  # fmt: skip
    tokenizer = make_tokenizer()
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=10, max_position_embeddings=2048,
        )
    )  # fmt: skip
    side = {"height": SIDE, "width": SIDE}
    model, processor = MllmForConditionalGeneration.from_components(
        vision_encoder=vision,
        language_model=language_model,
        connector={"type": "mlp"},
        tokenizer=tokenizer,
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side),
        template="bare",
    )
    save(model, processor, folder / "start", record={"stage": "align"})
    export_stock(folder / "start", folder / "stock")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which each of `WORDS` is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 10,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(["", *WORDS])] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def write_rows(folder: Path, rows: int) -> None:
    """`instruct.jsonl` with the mix's lengths, `align.jsonl` with captions, both with pictures."""
    rng = np.random.default_rng(0)
    manifest = make_manifest(rows, seed=0)
    lines: dict[str, list[str]] = {"instruct": [], "align": []}
    for row, (tokens, labels, views) in enumerate(
        zip(manifest.tokens, manifest.labels, manifest.views, strict=True)
    ):
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{row}.png")
        answer = max(1, int(labels) // SHRINK)
        asked = max(1, (int(tokens) - IMAGE_TOKENS * int(views)) // SHRINK - answer)
        pictures = [f"{row}.png"] * int(views)
        sizes = {"instruct": (asked, answer, pictures), "align": (0, rng.integers(2, 8), [f"{row}.png"])}
        for name, (question, said, shown) in sizes.items():
            messages = [
                user(" ".join(rng.choice(WORDS, question)), *shown),
                assistant(" ".join(rng.choice(WORDS, said))),
            ]
            lines[name].append(json.dumps({"id": str(row), "messages": messages}))
    for name, written in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(written) + "\n")


def run_of(folder: Path, stage: str, tuning: str, batch: int) -> RunConfig:
    """Our run over the rows: packed, nothing recomputed."""
    return RunConfig.model_validate(
        {
            "stage": stage,
            "model": {"init_from": str(folder / "start")},
            "tune": {
                "vision_encoder": "frozen", "connector": "full", "language_model": tuning,
                **({"lora": {"r": RANK, "alpha": 2 * RANK, "dropout": 0.0}} if tuning == "lora" else {}),
            },
            "data": {"path": str(folder / f"{stage}.jsonl"), "image_root": str(folder), "packing": True},
            "train": {
                "output_dir": str(folder / f"ours-{stage}-{tuning}"), "per_device_batch_size": batch,
                "learning_rate": 1e-4, "logging_steps": 1000,
            },
        }
    )  # fmt: skip


class Stopwatch(TrainerCallback):
    """Seconds of an epoch, the loading of batches included; start, save and the like left out."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self.start = time.process_time()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds = time.process_time() - self.start


class WholeLastLayer(TrainerCallback):
    """Has the last layer's feed-forward computed at every position."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take our hooks away."""
        model.label_feed_forward.remove()


def at_published_depth(whole: float, ours: float) -> float:
    """What `ours` would be if the last of 32 layers had been spared, and not the last of 4."""
    return whole - (whole - ours) * LAYERS / PUBLISHED_LAYERS


class Bench:
    """Contenders of one stage: each call trains an epoch and returns its seconds."""

    def __init__(self, folder: Path, stage: str, batch: int):
        self.folder, self.stage, self.batch = folder, stage, batch
        self.rows = open_rows(folder / f"{stage}.jsonl", "auto", folder)
        self.processor = MllmProcessor.from_pretrained(folder / "start")
        self.lengths = measure(self.rows, Collator(self.processor)) if stage == "instruct" else None

    def ours(self, tuning: str, *callbacks: TrainerCallback) -> Callable[[], float]:
        """An epoch of our run."""

        def epoch() -> float:
            watch = Stopwatch()
            train(run_of(self.folder, self.stage, tuning, self.batch), callbacks=[watch, *callbacks])
            return watch.seconds

        return epoch

    def peer(self, checkpointing: str | None) -> Callable[[], float]:
        """An epoch of Hugging Face's; `checkpointing` is `reentrant`, `early stop` or None."""

        def epoch() -> float:
            watch = Stopwatch()
            model: Any = LlavaForConditionalGeneration.from_pretrained(self.folder / "stock")
            model.requires_grad_(self.stage == "instruct")
            model.model.vision_tower.requires_grad_(False)
            model.model.multi_modal_projector.requires_grad_(True)
            train_peer(
                model, self.processor, self.rows, watch, self.folder / "peer",
                batch=self.batch, lengths=self.lengths, checkpointing=checkpointing, rate=1e-4,
            )  # fmt: skip
            return watch.seconds

        return epoch

    def all_of(self, *tunings: str) -> dict[str, Callable[[], float]]:
        """Ours, each also with the whole last layer, and the peers."""
        ours = {tuning: self.ours(tuning) for tuning in tunings}
        whole = {f"{tuning}, whole": self.ours(tuning, WholeLastLayer()) for tuning in tunings}
        return {**ours, **whole, **self.peers()}

    def peers(self) -> dict[str, Callable[[], float]]:
        """Hugging Face's with LLaVA's kind of checkpointing, with today's, and with none."""
        kinds = {
            "peer": "reentrant",
            "peer early stop": "early stop",
            "peer without checkpointing": None,
        }
        return {name: self.peer(kind) for name, kind in kinds.items()}


def in_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; the first round is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, epoch in contenders.items():
            taken = epoch()
            if turn:
                seconds[name].append(taken)
    return seconds


def ratio(over: list[float], under: list[float]) -> float:
    """The median of the rounds' ratios."""
    return median(a / b for a, b in zip(over, under, strict=True))


def deep(found: dict[str, list[float]], tuning: str) -> list[float]:
    """Seconds of our rounds with a last layer of 32."""
    pairs = zip(found[f"{tuning}, whole"], found[tuning], strict=True)
    return [at_published_depth(whole, ours) for whole, ours in pairs]


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of glibc: ten sizes, `hblkhd` the fifth and `uordblks` the eighth."""

    _fields_ = [("sizes", ctypes.c_size_t * 10)]


def live_bytes() -> int:
    """Bytes that the process has allocated and not freed, those of tensors on the CPU among them."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _Mallinfo2
    sizes = libc.mallinfo2().sizes
    return sizes[7] + sizes[4]


def forward_backward(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[int, float]:
    """Bytes that the forward pass leaves behind, and seconds of both passes."""
    model.zero_grad(set_to_none=True)
    before, start = live_bytes(), time.process_time()
    loss = model(**batch).loss
    kept = live_bytes() - before
    loss.backward()
    return kept, time.process_time() - start


def activations(folder: Path, tuning: str, rounds: int, whole: bool = False) -> dict[str, float]:
    """Our selective checkpointing over Hugging Face's eager model, on equal rows without padding.

    With `whole`, the last layer's feed-forward is computed at every position.
    """
    ours: Any = load(folder / "start")[0]
    theirs: Any = LlavaForConditionalGeneration.from_pretrained(folder / "stock")
    for model, vision, connector in (
        (ours, ours.vision_encoder, ours.connector),
        (theirs, theirs.model.vision_tower, theirs.model.multi_modal_projector),
    ):
        model.requires_grad_(tuning == "full").train()
        vision.requires_grad_(False)
        connector.requires_grad_(True)
    checkpoint_selectively(ours)
    ours.train()
    if whole:
        ours.label_feed_forward.remove()
    processor = MllmProcessor.from_pretrained(folder / "start")
    rows = open_rows(folder / "instruct.jsonl", "auto", folder)
    row = next(
        row for row in rows if any(p["type"] == "image" for m in row["messages"] for p in m["content"])
    )
    batch = PaddingCollator(processor)([row] * 8)
    ours(**batch).loss.backward()  # a graph's first pass allocates more
    theirs(**batch).loss.backward()
    mine, hers = [], []
    for _ in range(2 * rounds + 1):
        mine.append(forward_backward(ours, batch))
        hers.append(forward_backward(theirs, batch))
    return {
        "bytes": median(kept for kept, _ in mine) / median(kept for kept, _ in hers),
        "time": ratio([seconds for _, seconds in mine], [seconds for _, seconds in hers]),
    }


def head_speedup(rounds: int) -> float:
    """Head and loss at every position over those at the labels, one position of eight labelled."""
    torch.manual_seed(0)
    head = nn.Linear(1024, 8000, bias=False)  # width / vocabulary as in the 7B model
    hidden = torch.randn(16, 512, 1024, requires_grad=True)  # a micro-batch of 16 rows
    labels = torch.full((16, 512), IGNORE)
    labels[:, ::8] = torch.randint(0, 8000, (16, 64))
    places = labelled_places(labels)

    def seconds(chosen: torch.Tensor, context: Any) -> float:
        head.weight.grad = hidden.grad = None
        start = time.process_time()
        with context:
            logits = head(hidden)
        nn.functional.cross_entropy(logits.float().flatten(0, 1), chosen).backward()
        return time.process_time() - start

    pairs = []
    for _ in range(2 * rounds + 2):
        whole = seconds(labels.flatten(), nullcontext())
        pairs.append(whole / seconds(labels.flatten()[places], head_only_at(head, places)))
    return median(pairs[1:])


def second_stage(folder: Path, rounds: int) -> dict[str, Any]:
    """Stage 2 in full and with LoRA, beside the peer's kinds of checkpointing."""
    bench = Bench(folder, "instruct", 16)
    found = in_turns(bench.all_of("full", "lora"), rounds)
    return {
        "lora_over_full": ratio(found["lora"], found["full"]),
        "lora_over_full_of_32_layers": ratio(deep(found, "lora"), deep(found, "full")),
        **over_peers("stage2", found, "full"),
    }


def first_stage(folder: Path, rounds: int) -> dict[str, Any]:
    """Stage 1, the connector alone, beside the peer's kinds of checkpointing."""
    bench = Bench(folder, "align", 32)
    return over_peers("stage1", in_turns(bench.all_of("frozen"), rounds), "frozen")


def over_peers(stage: str, found: dict[str, list[float]], tuning: str) -> dict[str, Any]:
    """Our steps a second over those of each peer."""
    ratios = {}
    for name, seconds in found.items():
        if name.startswith("peer"):
            key = f"{stage}_vs_hf{name.removeprefix('peer').replace(' ', '_')}"
            ratios[key] = ratio(seconds, found[tuning])
            ratios[f"{key}_of_32_layers"] = ratio(seconds, deep(found, tuning))
    return {**ratios, f"{stage}_seconds": found}


def memory(folder: Path, rounds: int) -> dict[str, Any]:
    """Activations of both stages."""
    ratios = {}
    for tuning, ending in (("full", ""), ("frozen", "_stage1")):
        ours, whole = (activations(folder, tuning, rounds, whole) for whole in (False, True))
        for kind in ("bytes", "time"):
            key = f"activation_{kind}_over_hf{ending}"
            ratios[key] = ours[kind]
            ratios[f"{key}_of_32_layers"] = at_published_depth(whole[kind], ours[kind])
    return ratios


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "stage2": second_stage,
    "stage1": first_stage,
    "memory": memory,
    "head": lambda _, rounds: {"head_speedup": head_speedup(rounds)},
}


def keep(file: Path, measured: dict[str, Any], rounds: int, rows: int) -> None:
    """Write what was measured; what the file has of other parts stays."""
    about = {
        "rounds": rounds, "rows": rows, "torch": torch.__version__,
        "transformers": transformers.__version__, "machine": platform.machine(),
    }  # fmt: skip
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    write_atomic(file, json.dumps({**known, **measured, "about": about}, indent=1) + "\n")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        make_model(Path(folder))
        write_rows(Path(folder), args.rows)
        for part in args.parts:
            measured = PARTS[part](Path(folder), args.rounds)
            found |= measured
            if args.json:
                keep(args.json, measured, args.rounds, args.rows)
    table = Table(title="Ratios, medians over rounds", title_justify="left")
    for column in ("", "measured", "bar"):
        table.add_column(column)
    for name, value in found.items():
        if isinstance(value, float):
            sign, goal = GOALS.get(name, ("", ""))
            table.add_row(name, f"{value:.3f}", f"{sign} {goal}")
    Console().print(table)


if __name__ == "__main__":
    main()
