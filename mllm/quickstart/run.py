"""`mllm quickstart`: the whole story on a CPU, offline, with the commands that a 7B run uses."""

from __future__ import annotations

import json
import random
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from eval import run as eval_run
from eval.compare import four_columns
from eval.score import score
from eval.tasks import pope_build
from eval.tasks.pope import SPLITS
from mllm.chat.session import answer_of
from mllm.data.schema import user
from mllm.decoding import describe, parse_decode
from mllm.model import load
from mllm.quickstart.report import compare_columns, write_report
from mllm.quickstart.scenes import WorldFiles, file_names, write_world
from mllm.quickstart.wording import instruction_rows
from mllm.quickstart.world import measure_habits
from mllm.training.metrics import plot_losses, read_metrics
from mllm.training.train import train

# The settings of VCD are the paper's: alpha 1, beta 0.1, 500 noise steps; sampling at temperature 1.
COLUMNS = {
    "greedy": "greedy",
    "sample": "sample",
    "vcd_greedy": "vcd",
    "vcd_sample": "vcd,do_sample=true",
}
SEEDS = range(5)


@dataclass(frozen=True)
class Size:
    """How much is made, trained and asked."""

    train_scenes: int
    val_scenes: int
    pope_images: int
    overrides: tuple[str, ...] = ()


FULL = Size(train_scenes=4000, val_scenes=120, pope_images=50)
FAST = Size(train_scenes=64, val_scenes=40, pope_images=4, overrides=("train.max_steps=4",))


@dataclass
class Stopwatch:
    """Seconds of each step, and of the whole."""

    console: Console
    start: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        """Announce and time one step."""
        self.console.rule(f"[bold]{what}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)

    @property
    def total(self) -> dict[str, float]:
        """All steps and the total."""
        return {**self.seconds, "total": round(time.perf_counter() - self.start, 1)}


def run(out: Path, *, fast: bool = False, seed: int = 0) -> Path:
    """Make a world, train both stages on it, evaluate, ask, and write `report.html` and `report.json`.

    Args:
        out: folder for everything; files of an earlier quickstart in it are replaced.
        fast: a few steps and questions, to see that every part works.
        seed: of the world, the training and the sampling.

    Returns:
        The path of the report.
    """
    size = FAST if fast else FULL
    out = Path(out)
    console = Console(stderr=True, highlight=False)
    watch = Stopwatch(console)
    with watch.step("world", f"1/6  draw a world of {size.train_scenes:,} annotated scenes"):
        world = write_world(out / "world", size.train_scenes, size.val_scenes, seed)
    with watch.step("align", "2/6  stage 1: align the connector on captions"):
        _train(console, "align", world.align, world.images, out, seed, size.overrides)
    with watch.step("instruct", "3/6  stage 2: instruction tuning"):
        init = f"model.init_from={out / 'align'}"
        _train(console, "instruct", world.instruct, world.images, out, seed, (init, *size.overrides))
    model, processor = load(out / "instruct")
    with watch.step("pope", "4/6  POPE: greedy, sampled, VCD greedy, VCD sampled"):
        pope, blank = _evaluate(console, model, processor, world, out, size, seed)
    with watch.step("ask", "5/6  ask about three scenes"):
        scenes = _ask(model, processor, world, seed)
    with watch.step("report", "6/6  report"):
        losses = {stage: read_metrics(out / stage / "metrics.jsonl") for stage in ("align", "instruct")}
        plot_losses(losses, out / "loss.png")
    result = {
        "fast": fast,
        "seed": seed,
        "pope": pope,
        "comparison": compare_columns(pope, out / "pope", seed),
        "blank_image": blank,
        "scenes": scenes,
        "decode": {column: describe(parse_decode(decode)) for column, decode in COLUMNS.items()},
        "parameters": {
            part: sum(p.numel() for p in getattr(model, part).parameters())
            for part in ("vision_encoder", "connector", "language_model")
        },
        "losses": {
            stage: [{"step": x["step"], "loss": x["loss"]} for x in lines if "loss" in x]
            for stage, lines in losses.items()
        },
        "seconds": watch.total,
    }
    (out / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = write_report(result, out)
    _summary(console, result, page, out)
    return page


def _train(
    console: Console, stage: str, rows: Path, images: Path, out: Path, seed: int, overrides: Sequence[str]
) -> None:
    settings = [
        f"data.path={rows}",
        f"data.image_root={images}",
        f"train.output_dir={out / stage}",
        f"train.seed={seed}",
        *overrides,
    ]
    recipe = f"quickstart/{stage}"
    _show(console, "train", recipe, *settings)
    train(recipe, settings)


def _show(console: Console, *command: object) -> None:
    """The command that does the same."""
    console.print(f"[dim]$ mllm {shlex.join(map(str, command))}[/]", soft_wrap=True)


def _evaluate(
    console: Console, model: Any, processor: Any, world: WorldFiles, out: Path, size: Size, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(four columns, blank images): every prediction is kept under `out/pope`."""
    folder = out / "pope"
    instances = world.instances["val"]
    _show(console, "eval", "build", instances, folder, "--images", size.pope_images, "--seed", seed)
    pope_build.write(instances, folder, n_images=size.pope_images, n_per_image=6, seed=seed)

    def accuracy_of(split: str, name: str, decode: str, run_seed: int, blank: bool = False) -> dict[str, Any]:
        questions = folder / f"pope_{split}.jsonl"
        out_file = folder / f"{name}.{split}.{run_seed}.jsonl"
        predictions = eval_run.run(
            model,
            processor,
            questions,
            world.images,
            out_file,
            decode=decode,
            seed=run_seed,
            batch_size=60,
            max_new_tokens=4,
            checkpoint=out / "instruct",
            blank_images=blank,
            overwrite=True,
            progress=False,
        )
        return score(predictions, questions)

    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for column, decode in COLUMNS.items():
        seeds = [seed + s for s in SEEDS] if "sample" in column else [seed]
        runs[column] = {split: [accuracy_of(split, column, decode, s) for s in seeds] for split in SPLITS}
        example = (folder / "pope_random.jsonl", folder / f"{column}.random.{seeds[0]}.jsonl")
        options = (
            "--image-root",
            world.images,
            "--decode",
            decode,
            "--batch-size",
            60,
            "--max-new-tokens",
            4,
        )
        _show(console, "eval", "run", out / "instruct", *example, *options)
        console.print(f"{column}: {len(SPLITS)} splits, {len(seeds)} {'seeds' if len(seeds) > 1 else 'run'}")
    blank = [accuracy_of(split, "blank", "greedy", seed, blank=True) for split in SPLITS]
    means = {key: sum(result[key] for result in blank) / len(blank) for key in ("accuracy", "yes_ratio")}
    return four_columns(runs), means


def _ask(model: Any, processor: Any, world: WorldFiles, seed: int) -> list[dict[str, Any]]:
    """Questions, the model's answers and the truth for three held-out scenes."""
    habits = measure_habits(world.scenes["train"])
    rng = random.Random(seed)
    names = file_names("val", len(world.scenes["val"]))
    asked = []
    for scene, name in list(zip(world.scenes["val"], names, strict=True))[:3]:
        turns = []
        for question, truth in instruction_rows(scene, rng, habits):
            messages = [user(question, str(world.images / name))]
            answer = answer_of(model, processor, messages, max_new_tokens=40)
            turns.append({"question": question.split("\n")[0], "answer": answer, "truth": truth})
        asked.append({"image": str(Path("world") / "images" / name), "turns": turns})
    return asked


def _summary(console: Console, result: dict[str, Any], page: Path, out: Path) -> None:
    image = out / result["scenes"][0]["image"]
    console.rule("[bold]done", align="left")
    for column, numbers in result["pope"].items():
        console.print(f"POPE accuracy, {column:<11} {numbers['accuracy']:.3f}")
    console.print(f"with blank images          {result['blank_image']['accuracy']:.3f}")
    for sentence in result["comparison"]["sentences"]:
        console.print(sentence)
    for turn in result["scenes"][0]["turns"][:2]:
        console.print(
            f"[bold]Q[/] {turn['question']}  [bold]A[/] {turn['answer']}  [dim]truth: {turn['truth']}[/]"
        )
    console.print(f"{result['seconds']['total']:.0f} seconds; report: {page}")
    console.print(f"talk to it: mllm chat {out / 'instruct'} --image {image}", soft_wrap=True)
