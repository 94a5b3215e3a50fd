"""Where a model's parts came from, which decides what of it a checkpoint must hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mllm.model.parted import PartedModel
from mllm.model.parts import Base


@dataclass
class Origin:
    """What a model object remembers of its making, so that a save can leave out what has not changed.

    Attributes:
        base: for each part, the base it was loaded from; a part without one is saved whole.
        changed: names of tensors that differ from their base, as this or an earlier run trained them.
        parent: directory and manifest hash of the checkpoint that training started from.
        adapters: for each part that carries PEFT's adapters, their configuration as PEFT writes it.
    """

    base: dict[str, Base] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    parent: dict[str, str] | None = None
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)


def origin_of(model: PartedModel) -> Origin:
    """The model's origin; a model composed of objects has an empty one and is saved whole."""
    if not hasattr(model, "origin"):
        model.origin = Origin()
    return model.origin


def part_of(name: str) -> str:
    """The part that a tensor belongs to."""
    return name.split(".", 1)[0]
