"""A new model's connector starts from an earlier checkpoint's: BLIP-2's second stage from its first."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from mllm.errors import CheckpointError
from mllm.model.checkpoint import has_manifest, manifest_hash, origin_of, read_manifest, saved_tensors
from mllm.model.modeling import MllmForConditionalGeneration

NEW = "proj."  # into another language model's width: never taken over
log = logging.getLogger(__name__)


def take_connector(model: MllmForConditionalGeneration, source: str | Path) -> list[str]:
    """Copy a checkpoint's connector, and what it trained of the vision encoder, into a new model.

    Args:
        model: has the same vision encoder, and a connector of which all but `proj` is in the checkpoint.
        source: a checkpoint of ours, of whatever stage.

    Returns:
        The checkpoint's tensors that have no place here: heads, and a text branch where there is none.

    Raises:
        CheckpointError: another vision encoder, or a tensor that is missing or of another shape.
    """
    path = Path(source)
    if not has_manifest(path):
        raise CheckpointError(
            f"model.connector_from: {str(source)!r} is no checkpoint; train that stage first"
        )
    manifest, origin = read_manifest(path), origin_of(model)
    if manifest["adapter"]:
        raise CheckpointError(f"model.connector_from: {path} has adapters; give a checkpoint without")
    before, now = manifest["base"].get("vision_encoder"), origin.base.get("vision_encoder")
    if before and now and before["fingerprint"] != now.fingerprint:
        raise CheckpointError(
            f"model.connector_from: {path} was trained behind {before['source']!r}, this model has "
            f"{now.source!r}; use the same vision encoder"
        )
    earlier = json.loads((path / "config.json").read_text(encoding="utf-8"))
    for key in ("vision_feature_layer", "num_prefix_tokens"):
        if earlier.get(key) != getattr(model.config, key):
            raise CheckpointError(
                f"model.connector_from: {path} was trained with {key} {earlier.get(key)!r}, this model has "
                f"{getattr(model.config, key)!r}; use the same vision_feature_layer and _select"
            )
    saved, own = saved_tensors(path), model.state_dict()
    vision = [name for name in saved if name.startswith("vision_encoder.")]
    wanted = [n for n in own if n.startswith("connector.") and not n.startswith(f"connector.{NEW}")]
    if not wanted:
        raise CheckpointError("model.connector_from: this connector is one projection, always new; drop it")
    for name in vision + wanted:
        old, new = saved.get(name), own.get(name)
        if old is None or new is None or old.shape != new.shape:
            found, here = ("absent" if x is None else list(x.shape) for x in (old, new))
            raise CheckpointError(
                f"model.connector_from: tensor {name!r} is {found} in {path} and {here} in this model; "
                "make vision encoder and connector as they were there"
            )
    # In the precision they were trained in: the parts of a new model may be loaded in a lower one.
    for name in vision + wanted:
        module = model.get_submodule(name.rpartition(".")[0])
        getattr(module, name.rpartition(".")[2]).data = saved[name]
    model.connector.to(saved[wanted[0]].dtype)
    # They differ from the base model now, so every checkpoint has to hold them.
    origin.changed |= set(vision)
    origin.parent = {"path": str(source), "manifest": manifest_hash(path)}
    unused = sorted(set(saved) - set(vision) - set(wanted))
    if unused:
        modules = sorted({re.sub(r"\.\d+\.", ".*.", name.rpartition(".")[0]) for name in unused})
        log.warning("connector from %s; not used of it: %s", path, ", ".join(modules))
    return unused
