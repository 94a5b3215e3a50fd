"""Contrastive pretraining of the tiny vision encoder.

Images and captions are pulled together as in CLIP, but by late interaction: every phrase of a caption
looks for the patch that fits it best, and the caption's score is the mean over its phrases (after
FILIP, arXiv 2111.07783, section 3.2, with phrases for words). So patches, which are what the language
model will see, have to say what is on them. Captions with one thing changed are added as hard
negatives. The text tower, a bag of words a phrase, is thrown away.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from mllm.model.pretraining.contrastive import contrastive_loss
from mllm.quickstart.corpus import PATCH
from mllm.quickstart.drawing import render
from mllm.quickstart.wording import PLACES, SETTINGS, place_of
from mllm.quickstart.world import COLOURS, IMAGE_SIZE, KINDS, SIZES, Scene, SceneObject

WIDTH = 128
SHARED = 64  # width in which phrases and patches meet
HARD_NEGATIVES = 6  # changed captions an image
MEAN, STD = 0.5, 0.25

Caption = tuple[str, ...]  # its phrases
Report = Callable[[int, int, float], None]  # step, steps, loss


def image_processor() -> CLIPImageProcessorPil:
    """The preprocessing that goes with the encoder: resize to IMAGE_SIZE, centre crop, normalise."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
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


class PhraseTower(nn.Module):
    """Unit vectors [P, SHARED] of P phrases; the order of words within a phrase does not matter."""

    def __init__(self) -> None:
        super().__init__()
        places = [place for row in PLACES for place in row]
        text = [*KINDS, *COLOURS, *SIZES, *SETTINGS.values(), *places]
        words = sorted({word for phrase in text for word in phrase.split()})
        self.index = {word: i for i, word in enumerate(words)}
        self.words = nn.EmbeddingBag(len(words), WIDTH, mode="sum")
        self.layers = nn.Sequential(
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.GELU(),
            nn.Linear(2 * WIDTH, SHARED),
        )

    def forward(self, phrases: Sequence[str]) -> Tensor:
        """Encode the phrases."""
        ids = [[self.index[word] for word in phrase.split()] for phrase in phrases]
        starts = np.cumsum([0, *(len(row) for row in ids[:-1])])
        flat = torch.tensor([i for row in ids for i in row])
        bags = self.words(flat, torch.from_numpy(starts))
        return nn.functional.normalize(self.layers(bags), dim=-1)


def late_interaction(patches: Tensor, phrases: Tensor, member: Tensor) -> Tensor:
    """Scores [I, T]: best patch for each phrase, mean over a caption's phrases.

    Args:
        patches: unit vectors [I, N, D].
        phrases: unit vectors [P, D].
        member: [T, P], row sums 1: which phrases a caption has.
    """
    best = (patches.flatten(0, 1) @ phrases.T).unflatten(0, patches.shape[:2]).amax(1)  # [I, P]
    return best @ member.T


def train_vision(
    scenes: Sequence[Scene],
    steps: int,
    seed: int = 0,
    batch_size: int = 64,
    learning_rate: float = 1.5e-3,
    report: Report | None = None,
) -> CLIPVisionModel:
    """Train from scratch on `scenes` and their captions; the encoder that comes back is fp32."""
    torch.manual_seed(seed)
    rng = random.Random(f"vision/{seed}")
    pixels = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))
    encoder, tower = CLIPVisionModel(vision_config()), PhraseTower()
    head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SHARED, bias=False))
    scale = nn.Parameter(torch.tensor(math.log(20.0)))
    weights = [p for part in (encoder, tower, head) for p in part.parameters()] + [scale]
    optimizer = torch.optim.AdamW(weights, learning_rate, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps + 1, pct_start=0.05)
    order: list[int] = []
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = rng.sample(range(len(scenes)), len(scenes))
        chosen, order = order[:batch_size], order[batch_size:]
        images = (pixels[chosen].permute(0, 3, 1, 2) / 255 - MEAN) / STD
        patches = encoder(pixel_values=images).last_hidden_state[:, 1:]
        phrases, member = _phrases(_captions([scenes[i] for i in chosen], rng))
        patches = nn.functional.normalize(head(patches), dim=-1)
        scores = scale.exp() * late_interaction(patches, tower(phrases), member)
        loss = contrastive_loss(scores, scores[:, :batch_size].T)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if report:
            report(step, steps, loss.item())
    return encoder.eval()


def _captions(scenes: Sequence[Scene], rng: random.Random) -> list[Caption]:
    """One true caption a scene, in order, then the changed ones of all scenes."""
    true: list[Caption] = []
    changed: list[Caption] = []
    for scene in scenes:
        detail = rng.randrange(4)
        phrases = [_phrase(obj, detail) for obj in scene.objects]
        ground = SETTINGS[scene.background]
        true.append((*phrases, ground))
        for _ in range(HARD_NEGATIVES):
            i = rng.randrange(len(phrases))
            other = _phrase(_changed(scene, scene.objects[i], detail, rng), detail)
            changed.append((*phrases[:i], other, *phrases[i + 1 :], ground))
    return true + changed


def _phrase(obj: SceneObject, detail: int) -> str:
    """Kind; then with colour; then with place; then with size."""
    words = [obj.kind, obj.colour, place_of(obj), obj.size]
    return " ".join(words[: detail + 1])


def _changed(scene: Scene, obj: SceneObject, detail: int, rng: random.Random) -> SceneObject:
    """The object as another, absent kind or, where colour is said, in another colour."""
    if detail == 0 or rng.random() < 0.6:
        return replace(obj, kind=rng.choice([kind for kind in KINDS if kind not in scene.counts]))
    used = {o.colour for o in scene.objects if o.kind == obj.kind}
    return replace(obj, colour=rng.choice([colour for colour in COLOURS if colour not in used]))


def _phrases(captions: Sequence[Caption]) -> tuple[list[str], Tensor]:
    """All distinct phrases, and which caption has which: [T, P] with row sums 1."""
    index = {phrase: i for i, phrase in enumerate(dict.fromkeys(p for caption in captions for p in caption))}
    member = torch.zeros(len(captions), len(index))
    for row, caption in enumerate(captions):
        for phrase in caption:
            member[row, index[phrase]] += 1 / len(caption)
    return list(index), member
