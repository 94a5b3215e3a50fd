"""Pretraining of the tiny language model on the world's text. No image comes in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from mllm.quickstart.corpus import documents, encode
from mllm.quickstart.world import Scene, measure_habits

Report = Callable[[int, int, float], None]  # step, steps, loss


def language_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """About 0.95 M parameters."""
    return LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_language(
    scenes: Sequence[Scene],
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    seed: int = 0,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    report: Report | None = None,
) -> LlamaForCausalLM:
    """Train from scratch on documents about `scenes`; the model that comes back is fp32."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(language_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.05)
    stream = documents(scenes, measure_habits(scenes), seed)
    rows = (encode(pieces, tokenizer) for pieces in stream)
    pad = int(tokenizer.pad_token_id)
    step = 0
    while step < steps:
        # Documents of like length go together: less padding.
        pool = sorted(itertools.islice(rows, 8 * batch_size), key=lambda row: len(row[0]))
        batches = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        for k in torch.randperm(len(batches)).tolist():
            loss = model(**_collate(batches[k], pad)).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if report:
                report(step, steps, loss.item())
            if step == steps:
                break
            schedule.step()
    return model.eval()


def _collate(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """Right-padded batch [B, S]; causal attention needs no mask for padding at the end."""
    length = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
    }
