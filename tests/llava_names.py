"""transformers' names of LLaVA's tensors and ours, written apart from `mllm.model.convert`."""

from __future__ import annotations

PREFIXES = (
    ("model.vision_tower.", "vision_encoder."),
    ("model.multi_modal_projector.", "connector."),
    ("model.image_newline", "connector.image_newline"),  # LLaVA-NeXT alone has it
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def our_name(name: str) -> str:
    """transformers' tensor name -> ours."""
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    return name.replace("linear_1.", "layers.0.").replace("linear_2.", "layers.2.")
