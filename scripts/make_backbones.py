"""Make the tiny backbones of the quickstart: a tokenizer, a vision encoder and a language model.

python scripts/make_backbones.py --output mllm/quickstart/backbones

Everything is drawn and trained on the spot from a seed; nothing is downloaded. The scenes are of
splits of their own, so no scene of the quickstart's training or held-out data is among them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mllm.quickstart.corpus import documents, train_tokenizer
from mllm.quickstart.pretrain_language import train_language
from mllm.quickstart.pretrain_vision import image_processor, train_vision
from mllm.quickstart.world import make_scenes, measure_habits


def main() -> None:
    """Parse, train both parts, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=20000, help="scenes to pretrain on")
    parser.add_argument("--vision-steps", type=int, default=3000)
    parser.add_argument("--language-steps", type=int, default=2400)
    parser.add_argument("--only", choices=["vision", "language"], help="make one of the two")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    start = time.perf_counter()
    scenes = make_scenes(args.scenes, args.seed, "pretrain_language")
    corpus = documents(scenes, measure_habits(scenes), args.seed)
    pieces = itertools.chain.from_iterable(itertools.islice(corpus, 4000))
    tokenizer = train_tokenizer(piece.text for piece in pieces)
    print(f"tokenizer: {len(tokenizer)} tokens, {time.perf_counter() - start:.0f} s", flush=True)
    if args.only != "language":
        begin = time.perf_counter()
        encoder = train_vision(scenes, args.vision_steps, args.seed, report=_printer("vision_encoder"))
        target = args.output / "vision_encoder"
        save_small(encoder, target)
        image_processor().save_pretrained(target)
        print(f"vision_encoder: {time.perf_counter() - begin:.0f} s", flush=True)
    if args.only != "vision":
        begin = time.perf_counter()
        model = train_language(
            scenes, tokenizer, args.language_steps, args.seed, report=_printer("language_model")
        )
        target = args.output / "language_model"
        save_small(model, target)
        tokenizer.save_pretrained(target)
        print(f"language_model: {time.perf_counter() - begin:.0f} s", flush=True)
    print(f"wrote {args.output} in {time.perf_counter() - start:.0f} s")


def save_small(model: PreTrainedModel, directory: Path) -> None:
    """Save with half-precision weights, and a configuration that says to load them in fp32."""
    model.save_pretrained(directory)
    weights = directory / "model.safetensors"
    halves = {
        name: tensor.half() for name, tensor in load_file(weights).items() if tensor.is_floating_point()
    }
    save_file(halves, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes files that only their owner can read
    config = directory / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n")


def _printer(part: str) -> Callable[[int, int, float], None]:
    start, recent = time.perf_counter(), []

    def report(step: int, steps: int, loss: float) -> None:
        recent.append(loss)
        if step % 50 == 0 or step == steps:
            mean, seconds = sum(recent) / len(recent), time.perf_counter() - start
            print(f"{part}: step {step}/{steps}, loss {mean:.3f}, {seconds:.0f} s", flush=True)
            recent.clear()

    return report


if __name__ == "__main__":
    main()
