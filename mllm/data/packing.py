"""Packs: several rows in one sequence, without padding and without one row seeing another.

A pack is one row [1, S] whose positions start again at 0 with each of its rows, and which has no attention
mask. From such positions our `packed` attention (`mllm.model.packed_attention`) and flash attention find
the rows; for SDPA and eager attention transformers makes a mask of them, which is right and slow: the whole
square of the pack is computed. Each family of language models has to hand the positions on, and some do not,
so a model is tried before it is trained on packs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from mllm.data.collator import Collator
from mllm.data.tokens import IGNORE
from mllm.errors import ConfigError
from mllm.model import packed_attention  # noqa: F401  (registers with transformers)
from mllm.model.processing import Encoded


class PackingCollator(Collator):
    """Builds packs: `input_ids`, `position_ids` and `labels` are [1, S], all else is as in a padded batch.

    `cu_seq_lens_q` and `cu_seq_lens_k` [rows + 1] are where rows begin, `max_length_q` and `max_length_k` the
    longest row's tokens.
    """

    def layout(self, encoded: Sequence[Encoded]) -> dict[str, Any]:
        """The rows one after the other."""
        return join([(row.input_ids, row.labels) for row in encoded])


def join(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Any]:
    """(ids, labels) of rows as one pack, see `PackingCollator`."""
    sizes = [len(ids) for ids, _ in rows]
    bounds = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)  # [rows + 1]
    # Nothing predicts a row's first token; in a pack, the last token of the row before would.
    labels = [label for _, targets in rows for label in (IGNORE, *targets[1:])]
    return {
        "input_ids": torch.tensor([[token for ids, _ in rows for token in ids]]),
        "position_ids": torch.tensor([[place for size in sizes for place in range(size)]]),
        "labels": torch.tensor([labels]),
        # Where rows begin and end, under the names that transformers' flash attention has for it. They
        # follow from the positions, but to read them there would hold up a GPU in every layer.
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(sizes),
        "max_length_k": max(sizes),
    }


def check_packing(model: Any) -> None:
    """Raise `ConfigError` for a model whose parts do not keep the rows of a pack apart."""
    language_model = getattr(model, "language_model", None)
    obstacle = None
    if language_model is None:
        obstacle = "this stage learns from pairs, which have no padding worth saving"
    elif model.config.is_encoder_decoder:
        obstacle = "an encoder-decoder has two sequences a row"
    elif model.fusion is not None:
        obstacle = "the layers of a deep fusion do not know where a row begins"
    elif model.config.prefix_attention:
        obstacle = "prefix attention does not know where a row's prompt ends"
    elif getattr(language_model, "soft_prompt", None) is not None:
        obstacle = "learned tokens stand in front of a sequence, not of each row in it"
    if obstacle:
        raise ConfigError(f"data.packing cannot be used here: {obstacle}; set data.packing=false")


@torch.no_grad()
def try_packing(model: Any) -> None:
    """Raise `ConfigError` for a language model that lets a row of a pack bear on another.

    Three tiny packs are computed where the model is and as it will be: with its device and its attention.
    """
    device = model.get_input_embeddings().weight.device
    first, other, row = torch.tensor([[3, 5, 7], [7, 3, 5], [5, 3, 7]], device=device).split(1)
    was_training = model.training
    model.eval()
    beside_first, beside_other, alone = (
        model(
            input_ids=torch.cat([*before, row], dim=1),
            position_ids=torch.arange(3, device=device).repeat(1 + len(before))[None],
            use_cache=False,
        ).logits[0, -3:]
        for before in ([first], [other], [])
    )
    model.train(was_training)
    # Matrix products of another width may round otherwise, in 16 bit by some per cent behind many layers;
    # with positions that are counted on, a model says something else altogether.
    close = (alone - beside_first).norm() <= 0.1 * alone.norm()
    if not torch.equal(beside_first, beside_other) or not close:
        raise ConfigError(
            f"data.packing: {type(model.language_model).__name__} with attention "
            f"{model.language_model.config._attn_implementation!r} lets the rows of a pack see each other, "
            "or counts their positions on; set data.packing=false"
        )
