"""A million rows through real training: seconds to the first batch, and the memory of all processes.

    python scripts/bench/data_scale.py --json data_scale.json

Writes rows like LLaVA's instruction data (two thirds with a picture) and trains the quickstart's tiny model
on them with `mllm.training.train`, workers included. What a million rows cost is the difference to the same
run over ten thousand rows. Memory is the proportional set size of the main process and of its workers
(Linux), so that a page which several of them share is counted once. Each case has a process of its own.

Cases: `jsonl`; `shards` (the same rows with their pictures as .tar shards); `packed` (data.packing, which
measures the rows of a step when it comes to it); `grouped` (data.grouping, which measures all rows first).
The last two run twice, and the second time they know what was measured.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from mllm.data.files import atomic_writer, write_atomic

SENTENCE = "the quick brown fox sees an old red bridge near water where seven people watch a lazy dog"
WORDS = SENTENCE.split()
PICTURES = 64
FEW = 10_000  # more than the steps need: at the end of an epoch workers would start anew


def main() -> None:
    """Run all cases, print and write what they say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--cases", default="jsonl,shards,packed")
    parser.add_argument("--folder", type=Path, help="where the rows are kept; default: a temporary folder")
    parser.add_argument("--one", help="(one case, in this process)")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_case(json.loads(args.one))))
        return
    with TemporaryDirectory() as temporary:
        found = run_all(args, args.folder or Path(temporary))
    print(json.dumps(found, indent=2))
    if args.json:
        write_atomic(args.json, json.dumps(found, indent=2) + "\n")


def run_all(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every case over few and over many rows."""
    folder.mkdir(parents=True, exist_ok=True)
    few, many = (write_rows(folder, count) for count in (FEW, args.rows))
    found: dict[str, Any] = {
        "rows": args.rows,
        "workers": args.workers,
        "gigabytes": many.stat().st_size / 1e9,
    }
    for case in args.cases.split(","):
        base = in_a_process(case, few, folder, args)
        if case in ("packed", "grouped"):
            for known in folder.glob(f"{many.name}.lengths-*"):  # of an earlier run over the same folder
                known.unlink()
            found[f"{case}_first_time"] = in_a_process(case, many, folder, args)
        large = in_a_process(case, many, folder, args)
        extra = {at: large["megabytes"][at] - base["megabytes"][at] for at in large["megabytes"]}
        found[case] = {**large, "megabytes_of_few_rows": base["megabytes"], "extra_megabytes": extra}
    return found


def in_a_process(case: str, rows: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What `run_case` says, from a fresh process."""
    told = {
        "case": case,
        "rows": str(rows),
        "folder": str(folder),
        "steps": args.steps,
        "workers": args.workers,
    }
    command = [sys.executable, __file__, "--one", json.dumps(told)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def write_rows(folder: Path, count: int) -> Path:
    """LLaVA rows of one to three turns, the same for the same count, with pictures beside them."""
    path = folder / f"rows-{count}.jsonl"
    if path.exists():
        return path
    rng = random.Random(0)
    (folder / "pictures").mkdir(exist_ok=True)
    for number in range(PICTURES):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number:03d}.jpg")
    with atomic_writer(path) as file:
        for index in range(count):
            file.write(json.dumps(make_row(index, rng)) + "\n")
    return path


def make_row(index: int, rng: random.Random) -> dict[str, Any]:
    """One row."""
    turns = []
    for turn in range(rng.randint(1, 3)):
        marker = "<image>\n" if turn == 0 and index % 3 else ""
        turns.append({"from": "human", "value": marker + " ".join(rng.choices(WORDS, k=rng.randint(5, 15)))})
        turns.append({"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(10, 60)))})
    row: dict[str, Any] = {"id": f"{index:09d}", "conversations": turns}
    if index % 3:
        row["image"] = f"{index % PICTURES:03d}.jpg"
    return row


def run_case(told: dict[str, Any]) -> dict[str, Any]:
    """Train, and look at the clock and at the memory."""
    from transformers import TrainerCallback

    from mllm.config import RunConfig
    from mllm.training.train import train

    class Watch(TrainerCallback):
        """The time of the first batch, and memory at some steps."""

        def __init__(self) -> None:
            self.begin = time.perf_counter()
            self.first = 0.0
            self.megabytes: dict[str, float] = {}

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.first = self.first or time.perf_counter() - self.begin

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (50, told["steps"] // 2, told["steps"]):
                self.megabytes[str(state.global_step)] = round(proportional_set_size() / 1e6, 1)

    path = Path(told["rows"])
    if told["case"] == "shards":
        path = as_shards(path)
    watch = Watch()
    with TemporaryDirectory() as out:
        train(RunConfig.model_validate(recipe(told, path, Path(out))), callbacks=[watch])
    seconds = time.perf_counter() - watch.begin
    return {"first_batch_seconds": watch.first, "run_seconds": seconds, "megabytes": watch.megabytes}


def as_shards(rows: Path) -> Path:
    """The rows as shards, written once."""
    from mllm.data.shard_writer import write_shards

    folder = rows.with_suffix(".shards")
    write_shards(rows, folder, rows_per_shard=10_000, image_root=rows.parent / "pictures", workers=2)
    return folder


def recipe(told: dict[str, Any], path: Path, out: Path) -> dict[str, Any]:
    """The quickstart's first stage over these rows."""
    data: dict[str, Any] = {"path": str(path), "max_length": 512, "packing": told["case"] == "packed"}
    if told["case"] == "grouped":
        data["grouping"] = "modality_length"
    if path.is_file():
        data["image_root"] = str(path.parent / "pictures")
    return {
        "stage": "align",
        "model": {
            "vision_encoder": "mllm://quickstart/backbones/vision_encoder",
            "language_model": "mllm://quickstart/backbones/language_model",
            "vision_feature_layer": "last",
            "template": "vicuna_v1",
        },
        "data": data,
        "train": {
            "output_dir": str(out / "run"),
            "per_device_batch_size": 2,
            "max_steps": told["steps"],
            "num_workers": told["workers"],
        },
    }


def proportional_set_size() -> int:
    """Bytes of this process and of its children, shared pages divided among those who share them."""
    me = Path("/proc/self/task")
    children = [int(c) for task in me.iterdir() for c in (task / "children").read_text().split()]
    total = 0
    for process in ("self", *map(str, children)):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


if __name__ == "__main__":
    main()
