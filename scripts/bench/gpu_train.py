"""LLaVA-1.5-7B's shape on one GPU: stage 1, LoRA r=128 and full tuning, beside Hugging Face and PEFT.

    export PYTORCH_ALLOC_CONF=expandable_segments:True               # rows differ in length
    python scripts/bench/gpu_train.py --json gpu_train.json          # an H100 or H200: about 10 minutes
    python scripts/bench/gpu_train.py --json gpu_train.json --stages full --who ours      # the rest stays
    python scripts/bench/gpu_train.py --tiny --device cpu            # does it run?

Weights are random and made on the device: what a product costs does not depend on its numbers. Weights,
gradients and Adam's states are bf16, 8 bytes a trained weight. Rows have the lengths of LLaVA-1.5's mix as
`packing.py` guesses them (stage 1: captions of 20 tokens); every contender of a stage steps over the same
rows. Ours packs them and recomputes nothing; where that does not fit the card, what is cheap, and then with
half the tokens, for all contenders. Hugging Face's pads them and recomputes every layer, as LLaVA does.
TFLOP/s count what the model needs (`mllm.training.flops`), not padding, recomputation and unread logits; `of
the ceiling` is their share of what a large bf16 product reaches in the same run. What fails is told and does
not end the run, and the file is written after each contender.
"""

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from packing import make_manifest
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mllm.config import LoraSection, TuneSection
from mllm.data.files import write_atomic
from mllm.data.lengths import Lengths
from mllm.data.packing import join
from mllm.data.tokens import IGNORE
from mllm.model import MllmConfig, MllmForConditionalGeneration
from mllm.training.flops import decoder_flops
from mllm.training.recompute import checkpoint_selectively
from mllm.training.speed import compile_layers
from mllm.training.tuning import apply_tuning

AIMS = {"stage 1": 0.80, "lora": 0.75, "full": 0.75}
TUNING = {"stage 1": "frozen", "lora": "lora", "full": "full"}
CONTENDERS = ("ours", "hugging face", "ours compiled")
RANK = 128


@dataclass(frozen=True)
class Way:
    """Tokens of a micro-batch, and what is computed again in its backward pass."""

    tokens: int
    recomputed: str


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    width: int = 4096
    inner: int = 11008
    layers: int = 32
    heads: int = 32
    vocab: int = 32000
    side: int = 336
    vision: tuple[int, int, int, int] = (1024, 4096, 24, 16)  # width, inner, layers, heads

    @property
    def vision_config(self) -> CLIPVisionConfig:
        """CLIP ViT-L/14."""
        width, inner, layers, heads = self.vision
        return CLIPVisionConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            image_size=self.side, patch_size=14,
        )  # fmt: skip

    @property
    def text_config(self) -> LlamaConfig:
        """Llama-2; its words with the placeholder, which Hugging Face looks up, are filled up to 64s."""
        return LlamaConfig(
            vocab_size=self.words, hidden_size=self.width, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, max_position_embeddings=4096,
        )  # fmt: skip

    @property
    def words(self) -> int:
        """As published models have it: products with an odd side are slow."""
        return (self.vocab // 64 + 1) * 64

    @property
    def image_tokens(self) -> int:
        """Patches of an image."""
        return (self.side // 14) ** 2

    def flops(self, lengths: Lengths, stage: str) -> float:
        """Of a step over these rows: what the model needs, forward and backward."""
        last = 3 * self.width * self.inner  # the last feed-forward, like the head, is needed at labels only
        body = self.layers * (4 * self.width**2 + 3 * self.width * self.inner) - last
        head = self.width * self.words + last
        last_adapters = RANK * 3 * (self.width + self.inner) * (stage == "lora")
        adapters = self.layers * (RANK * 8 * self.width * (stage == "lora") + last_adapters) - last_adapters
        trained = {"stage 1": (0, 0), "lora": (adapters, last_adapters), "full": (body, head)}[stage]
        text = decoder_flops(
            lengths.tokens.tolist(), int(lengths.labels.sum()), weights=body + adapters,
            head=head + last_adapters, width=self.width, layers=self.layers,
            trained=trained[0], head_trained=trained[1],
        )  # fmt: skip
        width, inner, layers, _ = self.vision
        seen = self.image_tokens + 1
        encoder = (layers - 1) * (2 * seen * (4 * width**2 + 2 * width * inner) + 4 * seen**2 * width)
        products = self.image_tokens * (width * self.width + self.width**2)
        connector = 6 * products - 2 * self.image_tokens * width * self.width  # no gradient of its input
        return text + int(lengths.views.sum()) * (encoder + connector)


TINY = Shape(64, 172, 2, 4, 300, 56, (32, 64, 3, 4))


def rows_of(shape: Shape, stage: str, budget: int, steps: int) -> list[Lengths]:
    """Micro-batches of about `budget` tokens."""
    manifest = make_manifest(4096, seed=0)
    short = max(1, 576 // shape.image_tokens)
    views = np.ones_like(manifest.views) if stage == "stage 1" else manifest.views
    text = np.maximum(8, (manifest.tokens - 576 * manifest.views) // short)
    labels = np.maximum(1, manifest.labels // short)
    if stage == "stage 1":
        text, labels = np.full_like(text, 21), np.full_like(labels, 20)
    tokens = text + shape.image_tokens * views
    lengths, batches, at = Lengths(tokens, np.minimum(labels, text - 1), views), [], 0
    for _ in range(steps):
        end = at + max(1, int(np.searchsorted(np.cumsum(tokens[at:]), budget)))
        batches.append(lengths.take(np.arange(at, end)))
        at = end
    return batches


def batch_of(shape: Shape, lengths: Lengths, device: str, *, packed: bool) -> dict[str, Any]:
    """Random rows of these lengths: a pack, or padded on the right."""
    rng = torch.Generator().manual_seed(0)
    rows = []
    for tokens, labels, views in zip(lengths.tokens, lengths.labels, lengths.views, strict=True):
        ids = torch.randint(3, shape.vocab, (int(tokens),), generator=rng)
        ids[: shape.image_tokens * int(views)] = shape.vocab
        target = torch.full_like(ids, IGNORE)
        target[-int(labels) :] = ids[-int(labels) :]
        rows.append((ids, target))
    pixels = torch.randn(int(lengths.views.sum()), 3, shape.side, shape.side, generator=rng)
    batch: dict[str, Any]
    if packed:
        batch = join([(ids.tolist(), target.tolist()) for ids, target in rows])
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        batch = {
            "input_ids": pad([ids for ids, _ in rows], batch_first=True),
            "labels": pad([target for _, target in rows], batch_first=True, padding_value=IGNORE),
            "attention_mask": pad([torch.ones_like(ids) for ids, _ in rows], batch_first=True),
        }
    if len(pixels):
        batch["pixel_values"] = pixels.to(torch.bfloat16)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def make_ours(shape: Shape, stage: str, device: str, way: Way) -> Any:
    """Our model, tuned for the stage."""
    config = MllmConfig(
        vision_config=shape.vision_config, text_config=shape.text_config, connector={"type": "mlp"},
        image_token_id=shape.vocab, num_image_tokens=shape.image_tokens, num_patches=shape.image_tokens,
        num_prefix_tokens=1, pixel_shape=[3, shape.side, shape.side], vision_feature_layer=-2,
        vision_dim=shape.vision[0],
    )  # fmt: skip
    lora = {"lora": LoraSection(r=RANK, alpha=2 * RANK, dropout=0.0)} if stage == "lora" else {}
    with made_in_half(device):
        model: Any = MllmForConditionalGeneration(config)
        apply_tuning(model, TuneSection(language_model=TUNING[stage], **lora))  # type: ignore[arg-type]
    in_half(model)
    model.language_model.set_attn_implementation("packed")
    if way.recomputed == "selective":
        checkpoint_selectively(model)
    return model.train()


def make_peer(shape: Shape, stage: str, device: str) -> Any:
    """Hugging Face's model with PEFT's adapters, every layer recomputed."""
    from peft import LoraConfig, get_peft_model

    config = LlavaConfig(
        vision_config=shape.vision_config, text_config=shape.text_config, image_token_index=shape.vocab
    )
    with made_in_half(device):
        model: Any = LlavaForConditionalGeneration(config)
    parts = model.model
    model.requires_grad_(stage == "full")
    parts.vision_tower.requires_grad_(False)
    if stage == "lora":
        where = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
        adapters = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=where)
        with made_in_half(device):
            model = get_peft_model(model, adapters)
    parts.multi_modal_projector.requires_grad_(True)
    in_half(model)
    parts.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@contextmanager
def made_in_half(device: str) -> Iterator[None]:
    """Within it, parameters are made on the device, in bf16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def in_half(model: torch.nn.Module) -> None:
    """Adapters are made in float32; here everything is computed in bf16."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def seconds_of(device: str, work: Callable[[], Any]) -> float:
    """Seconds that `work` takes on the device."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def ceiling(device: str) -> float:
    """TFLOP/s of a large bf16 product."""
    side = 8192 if device != "cpu" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [seconds_of(device, lambda: a @ b) for _ in range(100)]
    return 2 * side**3 / median(times[20:]) / 1e12


def measure(shape: Shape, stage: str, who: str, way: Way, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of one contender over the stage's rows, at most `args.steps` in `args.seconds`."""
    ours = who != "hugging face"
    model = make_ours(shape, stage, args.device, way) if ours else make_peer(shape, stage, args.device)
    if who == "ours compiled":
        compile_layers(model)
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=1e-5, fused=args.device != "cpu")
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    times, rows, flops = [], [], []

    def step(batch: dict[str, Any]) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for number, lengths in enumerate(rows_of(shape, stage, way.tokens, args.warmup + args.steps)):
        batch = batch_of(shape, lengths, args.device, packed=ours)
        taken = seconds_of(args.device, lambda batch=batch: step(batch))  # type: ignore[misc]
        if number >= args.warmup:
            times.append(taken)
            rows.append(len(lengths))
            flops.append(shape.flops(lengths, stage))
        if sum(times) > args.seconds:
            break
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device != "cpu" else 0.0
    return {
        "samples_per_second": sum(rows) / sum(times),
        "tflops": sum(flops) / sum(times) / 1e12,
        "peak_gib": peak,
        "steps": len(times),
        **asdict(way),
    }


def tried(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` measures, or why it could not; then its memory is free again."""
    try:
        found = work()
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # also of memory, and compilers'
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def measure_first(shape: Shape, stage: str, who: str, ways: list[Way], args: Any) -> dict[str, Any]:
    """In the first of the ways that fits the card."""
    for way in ways:
        found = tried(lambda way=way: measure(shape, stage, who, way, args))  # type: ignore[misc]
        if not any(word in found.get("error", "") for word in ("OutOfMemoryError", "ALLOC_FAILED")):
            break
    return found


def ways_of(who: str, ours: dict[str, Any], args: argparse.Namespace) -> list[Way]:
    """What a contender tries; where ours has been measured, over the same rows."""
    if who != "ours":
        return [Way(ours.get("tokens", args.tokens), "every layer" if who == "hugging face" else "none")]
    kinds = ["none", "selective"] if args.checkpointing == "auto" else [args.checkpointing]
    less = [Way(args.tokens // part, kinds[-1]) for part in (2, 4)]
    return [*(Way(args.tokens, kind) for kind in kinds), *less]


def table_of(found: dict[str, Any], best: float) -> Table:
    """All contenders, those that failed with their reason."""
    table = Table(title=f"ceiling {best:.0f} TFLOP/s", title_justify="left")
    for column in ("stage", "", "samples/s", "TFLOP/s", "of ceiling", "aim", "GiB", "tokens", "recomputed"):
        table.add_column(column)
    for stage, contenders in found.items():
        for who, numbers in contenders.items():
            if "error" in numbers:
                table.add_row(stage, who, numbers["error"])
                continue
            table.add_row(
                stage, who, f"{numbers['samples_per_second']:.2f}", f"{numbers['tflops']:.3g}",
                f"{numbers['of_ceiling']:.2f}", "" if who == "hugging face" else f"{AIMS[stage]:.2f}",
                f"{numbers['peak_gib']:.1f}", str(numbers["tokens"]), numbers["recomputed"],
            )  # fmt: skip
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights")
    parser.add_argument("--tokens", type=int, default=9000, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30, help="of a contender's steps, warm-up left out")
    parser.add_argument("--stages", nargs="+", default=list(TUNING), choices=list(TUNING))
    parser.add_argument("--who", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--checkpointing", default="auto", choices=["auto", "none", "selective"])
    args = parser.parse_args()
    shape = TINY if args.tiny else Shape()
    best = ceiling(args.device)
    about = {
        "card": torch.cuda.get_device_name() if args.device != "cpu" else "cpu", "ceiling_tflops": best,
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    known = args.json and args.json.is_file()
    found: dict[str, Any] = json.loads(args.json.read_text(encoding="utf-8"))["stages"] if known else {}
    # Compilers take their time: they come last.
    parts = [(stage, who) for stage in args.stages for who in args.who if who != "ours compiled"]
    parts += [(stage, who) for stage in args.stages for who in args.who if who == "ours compiled"]
    for stage, who in parts:
        of_stage = found.setdefault(stage, {})
        ways = ways_of(who, of_stage.get("ours", {}), args)
        of_stage[who] = numbers = measure_first(shape, stage, who, ways, args)
        if "tflops" in numbers:
            numbers["of_ceiling"] = numbers["tflops"] / best
        print(stage, who, numbers, flush=True)
        if args.json:
            write_atomic(args.json, json.dumps({"stages": found, "about": about}, indent=1) + "\n")
    Console().print(table_of(found, best))


if __name__ == "__main__":
    main()
