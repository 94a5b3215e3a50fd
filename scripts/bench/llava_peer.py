"""The peer of `train.py`: Hugging Face's Trainer and `LlavaForConditionalGeneration` with LLaVA's settings.

LLaVA's own code needs a transformers of 2023 and does not run beside ours, so its published settings are
built again on today's classes: batches of one modality by its sampler, padded to the longest row, every
layer recomputed, logits at every position. Rows come through our processor, so that both sides read the same
tokens and pixels at the same cost.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from packing import llava
from torch.utils.data import Sampler
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from mllm.data.lengths import Lengths
from mllm.data.tokens import IGNORE, pad_rows
from mllm.model import MllmProcessor


class PaddingCollator:
    """Rows -> `input_ids`, `attention_mask`, `labels` [B, S] padded on the right, `pixel_values`, if any."""

    def __init__(self, processor: MllmProcessor):
        self.processor = processor

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """One batch."""
        encoded = [self.processor.encode(row["messages"]) for row in rows]
        images = [image for row in encoded for image in row.images]
        batch = {
            "input_ids": pad_rows([row.input_ids for row in encoded], self.processor.tokenizer.pad_token_id),
            "attention_mask": pad_rows([[1] * len(row.input_ids) for row in encoded], 0),
            "labels": pad_rows([row.labels for row in encoded], IGNORE),
        }
        return batch | (self.processor.image_inputs(images) if images else {})


class GroupedByModality(Sampler[int]):
    """LLaVA's order of rows, see `packing.llava`; all rows, the mixed rest last."""

    def __init__(self, lengths: Lengths, batch: int, seed: int):
        self.lengths, self.args = lengths, Namespace(seed=seed, batch=batch, ranks=1, accumulation=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = [row for step in llava(self.lengths, self.args) for micro in step for row in micro[0]]
        yield from order
        yield from sorted(set(range(len(self))) - set(order))


class PeerTrainer(Trainer):
    """Hugging Face's Trainer with LLaVA's sampler."""

    def __init__(self, *, order: Sampler[int] | None, **kwargs: Any):
        super().__init__(**kwargs)
        self.order = order

    def _get_train_sampler(self, *args: Any) -> Any:
        return self.order or super()._get_train_sampler(*args)


def train_peer(
    model: LlavaForConditionalGeneration,
    processor: MllmProcessor,
    rows: Any,
    callback: TrainerCallback,
    folder: Path,
    *,
    batch: int,
    lengths: Lengths | None,
    checkpointing: str | None,
    rate: float,
) -> None:
    """One epoch; with `lengths`, in LLaVA's order.

    `checkpointing` is `reentrant` (of transformers 4.37, which LLaVA pins), `early stop` (today's) or None.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=rate,
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
    )
    PeerTrainer(
        order=None if lengths is None else GroupedByModality(lengths, batch, seed=0),
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=PaddingCollator(processor),
        callbacks=[callback],
    ).train()
