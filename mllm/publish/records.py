"""A checkpoint's manifest and the files beside it -> the facts that a model card tells.

Nothing is guessed: what a run did not record is said to be unknown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml

from mllm.config import USERS, CardSection
from mllm.model.checkpoint import has_manifest, manifest_hash, part_of, read_manifest
from mllm.publish.secrets import redact_values
from mllm.training.metrics import read_metrics


@dataclass(frozen=True)
class Part:
    """One part of the model.

    Attributes:
        name: of the part.
        made_of: its class, or the kind of connector or fusion.
        base: name of the published model that holds its untrained weights; None where all are here.
        tuning: how this stage trained it.
        saved: numbers in this checkpoint that belong to it.
    """

    name: str
    made_of: str
    base: str | None
    tuning: str
    saved: int


@dataclass(frozen=True)
class Ancestor:
    """A checkpoint that this one comes from; `stage` is None where it cannot be looked at any more."""

    path: str
    manifest: str
    stage: str | None


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint; see the module's docstring."""

    card: CardSection
    kind: str
    stage: str | None
    step: int | None
    merged: dict[str, str]
    parts: list[Part]
    data: list[dict[str, Any]]
    mixing: dict[str, Any]
    settings: str
    versions: dict[str, Any]
    code: dict[str, Any]
    ancestors: list[Ancestor]
    loss: float | None
    curve: str | None
    manifest: str


def read_facts(checkpoint: Path) -> Facts:
    """The facts about a checkpoint directory."""
    manifest = read_manifest(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    recipe = manifest.get("recipe", {})
    data = manifest.get("data", {})
    parts = _parts(manifest, config)
    settings = dict(recipe)
    if "tune" in manifest:
        settings |= {"tune": _tune(manifest["tune"], [p.name for p in parts]), "train": manifest["train"]}
    return Facts(
        card=CardSection.model_validate(recipe.get("card", {})),
        kind=config["model_type"],
        stage=manifest.get("stage"),
        step=manifest.get("step"),
        merged=manifest.get("merged", {}),
        parts=parts,
        data=_data(data, recipe.get("data", {})),
        mixing={key: value for key, value in data.items() if key != "files"},
        settings=yaml.safe_dump(redact_values(settings), sort_keys=False, allow_unicode=True).rstrip(),
        versions=manifest.get("versions", {}),
        code=manifest.get("code", {}),
        ancestors=ancestors(manifest),
        loss=_last_loss(checkpoint / "metrics.jsonl"),
        curve="loss.png" if (checkpoint / "loss.png").is_file() else None,
        manifest=manifest_hash(checkpoint),
    )


def ancestors(manifest: dict[str, Any]) -> list[Ancestor]:
    """The checkpoints that training started from, the nearest first, as far as they are still there."""
    found: list[Ancestor] = []
    parent = manifest.get("parent")
    while parent and len(found) < 20:
        path = Path(parent["path"])
        same = has_manifest(path) and manifest_hash(path) == parent["manifest"]
        before = read_manifest(path) if same else {}
        found.append(
            Ancestor(path.name, parent["manifest"], before.get("stage", "unknown") if same else None)
        )
        parent = before.get("parent")
    return found


def _tune(tune: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    """The tuning as it was resolved, without what means nothing for this model: so it is a recipe again."""
    kinds = {tune[part] for part in parts if part in tune}
    settings = [name for name, users in USERS.items() if kinds & set(users)]
    kept = [*parts, *settings, *(["overrides"] if tune.get("overrides") else [])]
    return {key: value for key, value in tune.items() if key in kept}


def _parts(manifest: dict[str, Any], config: dict[str, Any]) -> list[Part]:
    saved: dict[str, int] = {}
    for name, entry in {**manifest["weights"], **manifest["adapter"]}.items():
        saved[part_of(name)] = saved.get(part_of(name), 0) + prod(entry["shape"])
    tune = manifest.get("tune", {})
    names = dict.fromkeys([*("vision_encoder", "connector", "fusion", "language_model"), *saved])
    present = [name for name in names if name in saved or name in manifest["base"]]
    return [
        Part(
            name,
            _made_of(name, config),
            _base(manifest["base"].get(name)),
            str(tune.get(name, "unknown")),
            saved.get(name, 0),
        )
        for name in present
    ]


def _made_of(part: str, config: dict[str, Any]) -> str:
    """What a part is, in its configuration's words."""
    if part not in ("vision_encoder", "language_model", "text_encoder"):
        return str((config.get(part) or {}).get("type", part))
    section = "vision_config" if part == "vision_encoder" else "text_config"
    found = config.get(section, {}) or {}
    kind = str(found.get("model_type", part))
    sizes = [
        f"{found[key]:,} {words}"
        for key, words in (("num_hidden_layers", "layers"), ("hidden_size", "wide"))
        if isinstance(found.get(key), int)
    ]
    return f"{kind} ({', '.join(sizes)})" if sizes else kind


def _base(entry: dict[str, Any] | None) -> str | None:
    """A Hub name as it is; of a folder, its name: where it lay on one machine tells nobody anything."""
    if entry is None:
        return None
    source = str(entry["source"])
    return Path(source).name if source.startswith(("/", "~", ".")) or Path(source).is_dir() else source


def _data(data: dict[str, Any], said: dict[str, Any]) -> list[dict[str, Any]]:
    """The data files with the licences that the recipe gives them."""
    listed = said.get("path", [])
    listed = [*(listed if isinstance(listed, list) else [listed]), said.get("replay")]
    licences = {one["path"]: one.get("license") for one in listed if isinstance(one, dict)}
    return [
        {**file, "license": licences.get(file["path"]) or said.get("license")}
        for file in data.get("files", [])
    ]


def _last_loss(path: Path) -> float | None:
    losses = [line["loss"] for line in read_metrics(path) if "loss" in line]
    return losses[-1] if losses else None


def metadata_bases(checkpoint: Path, card: CardSection) -> list[str]:
    """Hub names of the models that this one comes from: those of the recipe, and bases that have one."""
    sources = [entry["source"] for entry in read_manifest(checkpoint)["base"].values()]
    names = [source for source in map(str, sources) if source.count("/") == 1 and not Path(source).exists()]
    return list(dict.fromkeys([*card.base_models, *names]))
