"""Checkpoints turned into others, proven equal first: published layouts in and out, merged adapters.

family.py              what a family of transformers' models has to say
llava.py, blip2.py     LLaVA and LLaVA-NeXT, BLIP-2 and InstructBLIP say it
stock.py               transformers' directories in and out, for every family
retrieval.py           a Q-Former out of BLIP-2's first stage
original_llava.py      what LLaVA's own code writes
merge.py               adapters into the weights that they stand on
proof.py               both sides' logits and answers on the same prompts
"""

from __future__ import annotations

from pathlib import Path

from mllm.errors import CheckpointError, ConfigError
from mllm.model.checkpoint import check_new
from mllm.model.convert.merge import Merge, merge_checkpoint
from mllm.model.convert.original_llava import import_original, is_original
from mllm.model.convert.proof import Proof
from mllm.model.convert.retrieval import RETRIEVAL, import_retrieval
from mllm.model.convert.stock import FAMILIES, architecture, export_stock, import_stock


def import_weights(
    source: str | Path,
    out: str | Path,
    template: str | None = None,
    language_model: str | Path | None = None,
    vision_encoder: str | Path | None = None,
) -> Proof:
    """Turn published weights into a checkpoint of ours.

    What they are is read from their files; see `import_stock`, `import_retrieval`, `import_original`.
    """
    check_new(out)
    if is_original(source):
        return import_original(source, out, template or "vicuna_v1", language_model, vision_encoder)
    if language_model or vision_encoder:
        raise ConfigError(
            f"{source} is whole: --language-model and --vision-encoder are for LLaVA's own layout"
        )
    kind = architecture(source)
    if kind == RETRIEVAL:
        return import_retrieval(source, out)
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{source}: cannot import {kind!r}; give one of {', '.join([*FAMILIES, RETRIEVAL])}"
        )
    return import_stock(source, out, template)


__all__ = ["Merge", "Proof", "export_stock", "import_weights", "merge_checkpoint"]
