"""Contrastive pretraining of the tiny vision encoder.

Images and captions are pulled together as in CLIP, but by late interaction: every word looks for the
patch that fits it best, and a caption's score is the mean over its words (FILIP, arXiv 2111.07783,
section 3.2). So patches, which are what the language model will see, have to say what is on them.
Captions with one thing changed are added as hard negatives. The text tower is thrown away.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerBase,
)

from mllm.quickstart.corpus import PATCH
from mllm.quickstart.drawing import render
from mllm.quickstart.wording import caption_colours, caption_positions
from mllm.quickstart.world import COLOURS, IMAGE_SIZE, KINDS, Scene

WIDTH = 128
SHARED = 64  # width in which words and patches meet
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

Report = Callable[[int, int, float], None]  # step, steps, loss


def image_processor() -> CLIPImageProcessorPil:
    """The preprocessing that goes with the encoder: resize to IMAGE_SIZE, centre crop, normalise."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def vision_config() -> CLIPVisionConfig:
    """About 0.9 M parameters, 36 patches and a CLS token."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=SHARED,
        hidden_act="gelu",
    )


class TextTower(nn.Module):
    """Word vectors in context: ids [B, L] -> unit vectors [B, L, SHARED]."""

    def __init__(self, vocabulary: int, max_length: int = 128) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, WIDTH)
        self.places = nn.Embedding(max_length, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, SHARED, bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`mask` is True at real words."""
        hidden = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        hidden = self.layers(hidden, src_key_padding_mask=~mask)
        return nn.functional.normalize(self.out(hidden), dim=-1)


def late_interaction(patches: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """Scores [I, T] of patches [I, N, D] against words [T, L, D]: best patch a word, mean of words."""
    images, count, width = patches.shape
    texts, length, _ = words.shape
    similarity = patches.reshape(-1, width) @ words.reshape(-1, width).T
    best = similarity.view(images, count, texts, length).amax(1)  # [I, T, L]
    weight = mask / mask.sum(1, keepdim=True)
    return (best * weight).sum(-1)


def train_vision(
    scenes: Sequence[Scene],
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    seed: int = 0,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    report: Report | None = None,
) -> CLIPVisionModel:
    """Train from scratch on `scenes` and their captions; the encoder that comes back is fp32."""
    torch.manual_seed(seed)
    rng = random.Random(f"vision/{seed}")
    pixels = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))
    encoder, text = CLIPVisionModel(vision_config()), TextTower(len(tokenizer))
    norm, projection = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SHARED, bias=False)
    scale = nn.Parameter(torch.tensor(math.log(20.0)))
    weights = [p for m in (encoder, text, norm, projection) for p in m.parameters()] + [scale]
    optimizer = torch.optim.AdamW(weights, learning_rate, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.05)
    order: list[int] = []
    for step in range(steps):
        if len(order) < batch_size:
            order = rng.sample(range(len(scenes)), len(scenes))
        chosen, order = order[:batch_size], order[batch_size:]
        members = [scenes[i] for i in chosen]
        ids, mask = _words([*_captions(members, rng), *_captions(_changed(members, rng), rng)], tokenizer)
        images = (pixels[chosen].permute(0, 3, 1, 2) / 255 - MEAN[0]) / STD[0]
        patches = encoder(pixel_values=images).last_hidden_state[:, 1:]
        patches = nn.functional.normalize(projection(norm(patches)), dim=-1)
        scores = scale.exp() * late_interaction(patches, text(ids, mask), mask)
        target = torch.arange(batch_size)
        loss = nn.functional.cross_entropy(scores, target)
        loss = (loss + nn.functional.cross_entropy(scores[:, :batch_size].T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if report:
            report(step + 1, steps, loss.item())
    return encoder.eval()


def _captions(scenes: Sequence[Scene], rng: random.Random) -> list[str]:
    return [
        rng.choice((caption_positions, caption_positions, caption_colours))(
            scene, with_size=rng.random() < 0.3
        )
        for scene in scenes
    ]


def _changed(scenes: Sequence[Scene], rng: random.Random) -> list[Scene]:
    """The scenes with one object of another kind or colour, or on another ground."""
    return [_change(scene, rng) for scene in scenes]


def _change(scene: Scene, rng: random.Random) -> Scene:
    i = rng.randrange(len(scene.objects))
    obj = scene.objects[i]
    if rng.random() < 0.65:
        obj = replace(obj, kind=rng.choice([kind for kind in KINDS if kind not in scene.counts]))
    else:
        obj = replace(obj, colour=rng.choice([c for c in COLOURS if c != obj.colour]))
    return replace(scene, objects=(*scene.objects[:i], obj, *scene.objects[i + 1 :]))


def _words(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    batch = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"].bool()
