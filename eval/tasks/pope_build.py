"""Build POPE questions from COCO-style annotations, by the rule of RUCAIBox/POPE (`main.py`, `utils.py`).

instances.json -> images with enough objects -> positives + negatives -> pope_{split}.jsonl
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.records import to_lines
from mllm.data.files import sha256_of, write_atomic
from mllm.errors import ConfigError, DataError

SPLITS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Selection:
    """The images that questions are asked about, `(file_name, distinct objects)`, and who was left out."""

    images: list[tuple[str, list[str]]]
    requested: int
    qualified: int
    too_few_objects: int
    too_few_absent: int


def build(
    instances: Path, split: str, n_images: int = 500, n_per_image: int = 6, seed: int = 0
) -> list[dict[str, Any]]:
    """Question rows `{"question_id", "image", "text", "label"}` from COCO-style instance annotations.

    The rule is POPE's own. Of `n_per_image` questions half are positive (the first objects in the
    annotation's order), each followed by a negative: an absent object drawn evenly (`random`), the most
    frequent one (`popular`), or the one seen most often with the positive just asked (`adversarial`).
    Frequencies are counted over the chosen images. All splits of one seed share images and positives.
    Where fewer than `n_images` qualify, all of them are taken; `write` reports the numbers.

    Args:
        instances: COCO-style JSON with `images`, `annotations` and `categories`.
        split: `random`, `popular` or `adversarial`.
        n_images: images wanted.
        n_per_image: questions an image, an even number.
        seed: decides the images and the random negatives.

    Raises:
        DataError: the annotations are malformed, or no image qualifies.
        ConfigError: an unknown split, or a number that makes no sense.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    rng = random.Random(seed)
    return _ask(select_images(instances, n_images, n_per_image, rng).images, split, n_per_image // 2, rng)


def write(
    instances: Path, out_dir: Path, n_images: int = 500, n_per_image: int = 6, seed: int = 0
) -> dict[str, Any]:
    """Build the three splits, write `pope_{split}.jsonl` and `pope_summary.json`; returns the summary.

    Nothing is written unless all three splits can be built. Arguments and errors as in `build`.
    """
    texts = {s: to_lines(build(instances, s, n_images, n_per_image, seed)) for s in SPLITS}
    chosen = select_images(instances, n_images, n_per_image, random.Random(seed))
    summary: dict[str, Any] = {
        "instances": Path(instances).name,
        "instances_sha256": sha256_of(instances),
        "seed": seed,
        "n_per_image": n_per_image,
        "images_requested": chosen.requested,
        "images_used": len(chosen.images),
        "images_qualified": chosen.qualified,
        "images_with_too_few_objects": chosen.too_few_objects,
        "images_with_too_few_absent_objects": chosen.too_few_absent,
        "files": {},
    }
    for split, text in texts.items():
        path = Path(out_dir) / f"pope_{split}.jsonl"
        write_atomic(path, text)
        summary["files"][split] = {"file": path.name, "rows": text.count("\n"), "sha256": sha256_of(path)}
    write_atomic(Path(out_dir) / "pope_summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def select_images(instances: Path, n_images: int, n_per_image: int, rng: random.Random) -> Selection:
    """Draw the images: those with enough distinct objects, and enough absent ones to ask about.

    Raises:
        DataError: no image qualifies, or the drawn ones are too few to find absent objects.
        ConfigError: `n_images` or `n_per_image` makes no sense.
    """
    if n_images < 1:
        raise ConfigError(f"n_images is {n_images}; ask for at least one image")
    if n_per_image < 2 or n_per_image % 2:
        raise ConfigError(f"n_per_image is {n_per_image}; use an even number, half yes and half no")
    each = n_per_image // 2
    everything = _objects_by_image(instances)
    enough = [(name, objects) for name, objects in everything if len(objects) >= each]
    kinds = {o for _, objects in enough for o in objects}
    qualified = [(name, objects) for name, objects in enough if len(kinds) - len(objects) >= each]
    if not qualified:
        raise DataError(
            f"{instances}: no image has {each} kinds of object present and {each} absent "
            f"({len(everything)} images, {len(kinds)} kinds); lower n_per_image or use more annotations"
        )
    images = rng.sample(qualified, min(n_images, len(qualified)))
    drawn_kinds = {o for _, objects in images for o in objects}
    for name, objects in images:
        if len(drawn_kinds) - len(objects) < each:
            raise DataError(
                f"{instances}: image {name!r} lacks only {len(drawn_kinds) - len(objects)} of the "
                f"{len(drawn_kinds)} kinds seen in {len(images)} drawn images; raise n_images"
            )
    return Selection(
        images, n_images, len(qualified), len(everything) - len(enough), len(enough) - len(qualified)
    )


def _ask(
    images: Sequence[tuple[str, list[str]]], split: str, each: int, rng: random.Random
) -> list[dict[str, Any]]:
    """`each` times (positive, negative) for every image, in POPE's order."""
    frequency = Counter(o for _, objects in images for o in objects)
    kinds = list(frequency)
    # Ties keep the order of first appearance, as a stable sort does in the official builder.
    popular = [o for o, _ in frequency.most_common()]
    beside: dict[str, Counter[str]] = {}
    for _, objects in images:
        for o in objects:
            beside.setdefault(o, Counter()).update(x for x in objects if x != o)
    rows: list[dict[str, Any]] = []
    for name, objects in images:
        used = set(objects)
        for positive in objects[:each]:
            if split == "random":
                ranking: list[str] = []
            elif split == "popular":
                ranking = popular
            else:
                ranking = [o for o, _ in beside[positive].most_common()]
            # No ranked object left (rare): an even draw, as in the official builder.
            negative = next((o for o in ranking if o not in used), None) or _draw_absent(kinds, used, rng)
            used.add(negative)
            for thing, label in ((positive, "yes"), (negative, "no")):
                rows.append(
                    {
                        "question_id": len(rows) + 1,
                        "image": name,
                        "text": question_about(thing),
                        "label": label,
                    }
                )
    return rows


def _draw_absent(kinds: Sequence[str], used: set[str], rng: random.Random) -> str:
    # Draw and reject, not a choice among the absent: it spends the random numbers that the official
    # builder spends, so one seed gives the official rows. `select_images` made sure that it ends.
    while (thing := rng.choice(kinds)) in used:
        pass
    return thing


def question_about(thing: str) -> str:
    """The question, with the article that the first letter asks for."""
    return f"Is there {'an' if thing[0].lower() in 'aeiou' else 'a'} {thing} in the image?"


def _objects_by_image(path: Path) -> list[tuple[str, list[str]]]:
    """`(file_name, distinct category names in annotation order)` for every image of a COCO-style file."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); give COCO-style instance annotations") from error
    tables: dict[str, list[Any]] = {}
    for key in ("images", "annotations", "categories"):
        table = raw.get(key) if isinstance(raw, dict) else None
        if not isinstance(table, list) or not all(isinstance(x, dict) for x in table):
            raise DataError(
                f"{path}: field {key!r} must be a list of objects; give COCO-style instance annotations"
            )
        tables[key] = table
    names = {_field(c, "id", path, "categories", i): _field(c, "name", path, "categories", i)
             for i, c in enumerate(tables["categories"])}  # fmt: skip
    files = {_field(m, "id", path, "images", i): _field(m, "file_name", path, "images", i)
             for i, m in enumerate(tables["images"])}  # fmt: skip
    if len(files) != len(tables["images"]):
        raise DataError(f"{path}: field 'images' holds the same 'id' twice; make the ids unique")
    objects: dict[Any, dict[str, None]] = {image_id: {} for image_id in files}
    for i, annotation in enumerate(tables["annotations"]):
        image_id = _field(annotation, "image_id", path, "annotations", i)
        category = _field(annotation, "category_id", path, "annotations", i)
        if image_id not in objects:
            raise DataError(f"{path}: annotations[{i}].image_id {image_id!r} is in no entry of 'images'")
        if category not in names:
            raise DataError(
                f"{path}: annotations[{i}].category_id {category!r} is in no entry of 'categories'"
            )
        objects[image_id][names[category]] = None
    return [(files[image_id], list(found)) for image_id, found in objects.items()]


def _field(entry: Mapping[str, Any], key: str, path: Path, table: str, index: int) -> Any:
    value = entry.get(key)
    wanted = str if key in ("name", "file_name") else (int, str)
    if not isinstance(value, wanted) or value == "":
        raise DataError(f"{path}: {table}[{index}].{key} is {value!r}; it must be set")
    return value
