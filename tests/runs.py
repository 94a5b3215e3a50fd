"""Tiny training runs: rows on disk and the configuration of a run over them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import make_picture, mixed_conversations, save_parts

from mllm.config import RunConfig
from mllm.data.schema import assistant, user
from mllm.model import MllmForConditionalGeneration, MllmProcessor

# The ways of tuning that a run is saved and resumed in, by the parts (vision encoder, connector, language
# model).
TUNINGS = {
    "connector": ("frozen", "full", "frozen"),
    "llm": ("frozen", "full", "full"),
    "all": ("full", "full", "full"),
    "lora_llm": ("frozen", "frozen", "lora"),
    "lora_llm_vision": ("lora", "full", "lora"),
    "lora_all": ("lora", "lora", "lora"),
}
WORDS = ["fox", "brown", "the quick fox", "hello world the quick brown fox", "a", "world hello fox"]


def tune(vision_encoder: str, connector: str, language_model: str) -> dict[str, Any]:
    """The section `tune`; LoRA is small and without dropout, so that runs can be compared."""
    parts = {"vision_encoder": vision_encoder, "connector": connector, "language_model": language_model}
    return (
        {**parts, "lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
        if {"lora", "qlora"} & {*parts.values()}
        else parts
    )


def make_rows(count: int) -> list[dict[str, Any]]:
    """Rows with answers of uneven length; every third has no image, some have two, some two rounds."""
    rows = []
    for index in range(count):
        answer = WORDS[index % len(WORDS)]
        pictures = [make_picture(index), make_picture(100 + index)][: (1, 0, 2)[index % 3]]
        messages = [user("what", *pictures), assistant(answer)]
        if index % 4 == 3:
            messages += [user("why"), assistant("hello")]
        rows.append({"id": f"r{index}", "messages": messages})
    return rows


def write_rows(folder: Path, count: int = 16) -> Path:
    """The rows as JSON Lines with their pictures beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in make_rows(count):
        for message in row["messages"]:
            for number, part in enumerate(message["content"]):
                if part["type"] == "image":
                    name = f"{row['id']}-{number}.png"
                    part["image"].save(folder / name)
                    part["image"] = name
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "rows.jsonl"


def make_world(folder: Path, vision: str = "clip", text: str = "llama") -> Path:
    """Base models and rows in one folder."""
    torch.manual_seed(0)
    save_parts(folder, vision, text)
    write_rows(folder / "rows")
    return folder


def run_config(
    world: Path,
    output_dir: Path,
    tuning: Mapping[str, Any] | tuple[str, str, str],
    model: Mapping[str, Any] | None = None,
    **train: Any,
) -> RunConfig:
    """A run over `make_world`'s folder; a constant rate, so that a shorter run is a longer one's start."""
    parts = {
        "vision_encoder": str(world / "vision"),
        "language_model": str(world / "language"),
        "template": "vicuna_v1",
    }
    return RunConfig.model_validate(
        {
            "stage": "instruct",
            "model": parts if model is None else model,
            "tune": tune(*tuning) if isinstance(tuning, tuple) else tuning,
            "data": {"path": str(world / "rows" / "rows.jsonl"), "image_root": str(world / "rows")},
            "train": {
                "output_dir": str(output_dir),
                "learning_rate": 1e-3,
                "lr_scheduler_type": "constant",
                "warmup_ratio": 0.0,
                "per_device_batch_size": 4,
                "max_steps": 3,
                "logging_steps": 1,
                **train,
            },
        }
    )


def logits_of(model: MllmForConditionalGeneration, processor: MllmProcessor) -> torch.Tensor:
    """Logits on mixed prompts, in evaluation mode; the model's mode stays as it was."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(**processor(mixed_conversations())).logits
    model.train(was_training)
    return logits
