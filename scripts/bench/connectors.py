"""Connectors side by side: the quickstart's two stages on the same world, with the same steps and rates.

    python scripts/bench/connectors.py --out runs/connectors --json connectors.json --plot connectors.png

Each connector goes through stage 1 and stage 2 of the quickstart (its world, backbones, data order and
seed), then answers the three POPE splits greedily. The table has accuracy, soft tokens an image, the time of
a stage 2 step, seconds of both stages, and trained parameters of the connector. For the step they take
turns in one process, and the median of the rounds counts, so that a burst of load on the machine does not
decide; the seconds are what a run took. Runs that are there are not repeated.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from eval import run as eval_run
from eval.score import score
from eval.tasks import pope_build
from eval.tasks.pope import SPLITS
from mllm.config import load_recipe
from mllm.data.collator import Collator
from mllm.data.rows import open_rows
from mllm.model import load
from mllm.quickstart.scenes import WorldFiles, write_world
from mllm.training.metrics import read_metrics
from mllm.training.train import train
from mllm.training.tuning import apply_tuning

GOAL = 0.85
Q_FORMER = "width: 128, layers: 4, heads: 4, intermediate: 512, dropout: 0.0"
CONNECTORS = {
    "mlp": "{type: mlp}",
    "qformer": f"{{type: qformer, num_queries: 32, {Q_FORMER}}}",
    "linear": "{type: linear}",
    "pixel_shuffle": "{type: pixel_shuffle, factor: 2}",
    "concat_linear": "{type: concat_linear, factor: 4}",
    "resampler": "{type: resampler, num_latents: 32, depth: 2, heads: 4, head_dim: 32}",
}


def train_and_ask(name: str, connector: str, world: WorldFiles, out: Path, args: Any) -> dict[str, Any]:
    """Both stages and POPE for one connector."""
    stages = {
        "align": (world.align, f"model.connector={connector}", args.align_steps),
        "instruct": (world.instruct, f"model.init_from={out / 'align'}", args.instruct_steps),
    }
    for stage, (rows, model_setting, steps) in stages.items():
        settings = [
            f"data.path={rows}",
            f"data.image_root={world.images}",
            f"train.output_dir={out / stage}",
            f"train.max_steps={steps}",
            f"train.seed={args.seed}",
            model_setting,
        ]
        train(f"quickstart/{stage}", settings)
    model, processor = load(out / "instruct")
    questions = out.parent / "pope"
    accuracy = {}
    for split in SPLITS:
        asked = questions / f"pope_{split}.jsonl"
        answers = eval_run.run(
            model, processor, asked, world.images, out / f"{split}.jsonl", seed=args.seed, batch_size=60,
            max_new_tokens=4, checkpoint=out / "instruct", overwrite=True, progress=False,
        )  # fmt: skip
        accuracy[split] = score(answers, asked)["accuracy"]
    logs = [line for stage in stages for line in read_metrics(out / stage / "metrics.jsonl")]
    return {
        "connector": connector,
        "accuracy": accuracy,
        "mean_accuracy": sum(accuracy.values()) / len(accuracy),
        "tokens_per_image": processor.num_image_tokens,
        "seconds": round(sum(line.get("train_runtime", 0.0) for line in logs), 1),
        "connector_parameters": sum(p.numel() for p in model.connector.parameters()),
    }


def step_seconds(names: list[str], world: WorldFiles, out: Path, rounds: int = 9) -> dict[str, float]:
    """Median seconds of forward and backward over one batch of 16 stage 2 rows, connectors in turn."""
    steps = {}
    for name in names:
        model, processor = load(out / name / "instruct")
        rows = open_rows(world.instruct, "auto", world.images)[:16]
        batch = Collator(processor, 512)(rows)
        batch = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        apply_tuning(model, load_recipe("quickstart/instruct").tune)
        steps[name] = (model.train(), batch)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, (model, batch) in steps.items():
            model.zero_grad()
            start = time.perf_counter()
            model(**batch).loss.backward()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values[1:]) for name, values in seconds.items()}


def table(results: dict[str, Any]) -> Table:
    """One line a connector."""
    lines = Table(title="Connectors on the quickstart's world", title_justify="left")
    for column in ("connector", "POPE accuracy", "tokens an image", "step, ms", "seconds", "parameters"):
        lines.add_column(column, justify="left" if column == "connector" else "right")
    for name, result in sorted(results.items(), key=lambda item: -item[1]["mean_accuracy"]):
        lines.add_row(
            name,
            f"{result['mean_accuracy']:.3f}",
            str(result["tokens_per_image"]),
            f"{1000 * result['step_seconds']:.0f}",
            f"{result['seconds']:.0f}",
            f"{result['connector_parameters']:,}",
        )
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Accuracy over soft tokens an image, the size of a point being the connector's parameters."""
    figure = Figure(figsize=(6.5, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, result in sorted(results.items(), key=lambda item: -item[1]["mean_accuracy"]):
        axes.scatter(
            result["tokens_per_image"],
            result["mean_accuracy"],
            s=30 + result["connector_parameters"] ** 0.5 / 4,
            alpha=0.7,
            label=f"{name} {result['mean_accuracy']:.3f}",
        )
    axes.axhline(GOAL, linestyle="--", linewidth=1, color="grey")
    axes.set_xlabel("soft tokens an image")
    axes.set_ylabel("POPE accuracy, mean of three splits")
    axes.margins(0.15)
    axes.legend(loc="center", fontsize="small", frameon=False, markerscale=0.6)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(CONNECTORS), choices=list(CONNECTORS))
    parser.add_argument("--out", type=Path, default=Path("runs/connectors"))
    parser.add_argument("--align-steps", type=int, default=150)
    parser.add_argument("--instruct-steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    world = write_world(args.out / "world", 4000, 120, args.seed)
    pope_build.write(world.instances["val"], args.out / "pope", n_images=50, n_per_image=6, seed=args.seed)
    results = {}
    for name in args.only:
        kept = args.out / name / "result.json"
        if not kept.is_file():
            result = train_and_ask(name, CONNECTORS[name], world, args.out / name, args)
            kept.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        results[name] = json.loads(kept.read_text(encoding="utf-8"))
    for name, seconds in step_seconds(args.only, world, args.out).items():
        results[name]["step_seconds"] = round(seconds, 4)
    Console().print(table(results))
    settings = {"align_steps": args.align_steps, "instruct_steps": args.instruct_steps, "seed": args.seed}
    if args.json:
        text = json.dumps({"settings": settings, "results": results}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
