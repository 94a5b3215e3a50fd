"""The quickstart's world on disk: images, LLaVA-format data for both stages, COCO annotations.

`write_world` is the entry. The world itself is in world.py, its pictures in drawing.py and what is
said about it in wording.py; their public names can be imported from here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm.quickstart.drawing import drawn_box, render
from mllm.quickstart.wording import Turn, captions, instruction_rows, world_rows
from mllm.quickstart.world import (
    IMAGE_SIZE,
    KINDS,
    Habits,
    Scene,
    SceneObject,
    make_scenes,
    measure_habits,
)

__all__ = [
    "IMAGE_SIZE",
    "KINDS",
    "Habits",
    "Scene",
    "SceneObject",
    "WorldFiles",
    "captions",
    "coco_annotations",
    "drawn_box",
    "instruction_rows",
    "make_scenes",
    "measure_habits",
    "render",
    "world_rows",
    "write_world",
]

ALIGN_PROMPT = "<image>\nDescribe the image."
TEXT_ONLY_SHARE = 0.02  # rows of instruct.json without an image, as a share of the scenes


@dataclass(frozen=True)
class WorldFiles:
    """Where `write_world` put things; image names inside the files are relative to `images`."""

    images: Path
    align: Path
    instruct: Path
    captions: dict[str, Path]  # split -> COCO captions
    instances: dict[str, Path]  # split -> COCO instances
    scenes: dict[str, list[Scene]]  # split -> the scenes, in the order of the image ids


def write_world(
    directory: Path | str,
    n_train: int = 4000,
    n_val: int = 200,
    seed: int = 0,
    progress: Callable[[Sequence[Scene], str], Sequence[Scene]] | None = None,
) -> WorldFiles:
    """Write a world: `images/`, `align.json`, `instruct.json`, `annotations/*_{train,val}.json`.

    Args:
        directory: made if missing; files in it are overwritten.
        n_train: scenes with instruction data.
        n_val: held-out scenes: annotations only, none of them equal to a training scene.
        seed: the same seed writes the same bytes.
        progress: wraps the list of scenes to draw and a label, e.g. with a progress bar.

    Returns:
        The paths and the scenes.
    """
    root = Path(directory)
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    train = make_scenes(n_train, seed, "train")
    known = {(scene.background, scene.objects) for scene in train}
    spare = make_scenes(n_val + n_val // 10 + 10, seed, "val")
    val = [scene for scene in spare if (scene.background, scene.objects) not in known][:n_val]
    scenes = {"train": train, "val": val}
    for split, members in scenes.items():
        names = file_names(split, len(members))
        shown = progress(members, f"draw {split}") if progress else members
        for scene, name in zip(shown, names, strict=True):
            render(scene).save(root / "images" / name)
        described, boxed = coco_annotations(members, names, seed)
        _write(root / "annotations" / f"captions_{split}.json", described)
        _write(root / "annotations" / f"instances_{split}.json", boxed)
    names = file_names("train", n_train)
    _write(root / "align.json", align_rows(train, names, seed))
    _write(root / "instruct.json", instruct_rows(train, names, seed))
    return WorldFiles(
        images=root / "images",
        align=root / "align.json",
        instruct=root / "instruct.json",
        captions={s: root / "annotations" / f"captions_{s}.json" for s in scenes},
        instances={s: root / "annotations" / f"instances_{s}.json" for s in scenes},
        scenes=scenes,
    )


def file_names(split: str, n: int) -> list[str]:
    """Image file names of a split: 'train_00000.png', ..."""
    return [f"{split}_{i:05d}.png" for i in range(n)]


def align_rows(scenes: Sequence[Scene], names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Stage 1 in LLaVA format: one caption a scene, mostly ones that name every object."""
    rng = random.Random(f"align/{seed}")
    rows = []
    for scene, name in zip(scenes, names, strict=True):
        caption = rng.choice(captions(scene, rng, 4))
        rows.append(_row(name, [(ALIGN_PROMPT, caption)], name))
    return rows


def instruct_rows(scenes: Sequence[Scene], names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Stage 2 in LLaVA format: several questions a scene, and a few rows without an image."""
    rng = random.Random(f"instruct/{seed}")
    habits = measure_habits(scenes)
    rows = []
    for scene, name in zip(scenes, names, strict=True):
        (question, answer), *rest = instruction_rows(scene, rng, habits)
        rows.append(_row(name, [(f"<image>\n{question}", answer), *rest], name))
    for i in range(round(TEXT_ONLY_SHARE * len(scenes))):
        rows.append(_row(f"text_{i:05d}", world_rows(rng)))
    rng.shuffle(rows)
    return rows


def coco_annotations(
    scenes: Sequence[Scene], names: Sequence[str], seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(captions, instances) of the scenes in COCO format; ids start at 1, boxes are tight."""
    rng = random.Random(f"captions/{seed}")
    images = [
        {"id": i, "file_name": name, "width": IMAGE_SIZE, "height": IMAGE_SIZE}
        for i, name in enumerate(names, 1)
    ]
    categories = [{"id": i, "name": kind, "supercategory": "thing"} for i, kind in _category_ids()]
    category_of = {kind: i for i, kind in _category_ids()}
    described: list[dict[str, Any]] = []
    boxed: list[dict[str, Any]] = []
    for image_id, scene in enumerate(scenes, 1):
        for caption in captions(scene, rng):
            described.append({"id": len(described) + 1, "image_id": image_id, "caption": caption})
        for obj in scene.objects:
            x, y, width, height = drawn_box(obj)
            boxed.append(
                {
                    "id": len(boxed) + 1,
                    "image_id": image_id,
                    "category_id": category_of[obj.kind],
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "segmentation": [],
                }
            )
    info = {"description": "rendered scenes", "version": "1.0"}
    return (
        {"info": info, "licenses": [], "images": images, "annotations": described},
        {
            "info": info,
            "licenses": [],
            "images": images,
            "annotations": boxed,
            "categories": categories,
        },
    )


def _category_ids() -> list[tuple[int, str]]:
    return list(enumerate(KINDS, 1))


def _row(row_id: str, turns: Sequence[Turn], image: str | None = None) -> dict[str, Any]:
    """A LLaVA row; the first question already holds the image marker where there is an image."""
    conversations = []
    for question, answer in turns:
        conversations.append({"from": "human", "value": question})
        conversations.append({"from": "gpt", "value": answer})
    head = {"id": row_id.removesuffix(".png")} | ({"image": image} if image else {})
    return head | {"conversations": conversations}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
