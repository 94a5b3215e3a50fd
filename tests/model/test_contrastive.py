"""Contrastive losses: numbers by plain loops, and two real ranks against one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from torch.nn import functional as F
from transformers.models.siglip.modeling_siglip import SiglipModel

from mllm.model.pretraining.contrastive import (
    batch_generator,
    clip_loss,
    contrastive_loss,
    gather,
    hard_negatives,
    siglip_loss,
)


def vectors(seed: int, rows: int = 8, width: int = 6) -> torch.Tensor:
    """Unit vectors [rows, width]."""
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@given(st.integers(0, 99), st.integers(2, 6), st.floats(0.0, 4.0))
def test_clip_loss_by_plain_loops(seed: int, rows: int, log_scale: float) -> None:
    image, text = vectors(seed, rows), vectors(seed + 1, rows)
    scores = [[math.exp(log_scale) * float(i @ t) for t in text] for i in image]
    expected = 0.0
    for i in range(rows):
        for line in (scores[i], [scores[j][i] for j in range(rows)]):
            expected += math.log(sum(math.exp(s) for s in line)) - line[i]
    found = clip_loss(image, text, torch.tensor(log_scale)).item()
    assert found == pytest.approx(expected / (2 * rows), rel=1e-4, abs=1e-5)


@given(st.integers(0, 99), st.integers(1, 6), st.floats(0.0, 3.0), st.floats(-10.0, 2.0))
def test_siglip_loss_by_plain_loops(seed: int, rows: int, log_scale: float, bias: float) -> None:
    image, text = vectors(seed, rows), vectors(seed + 1, rows)
    expected = 0.0
    for i in range(rows):
        for j in range(rows):
            score = math.exp(log_scale) * float(image[i] @ text[j]) + bias
            expected += math.log1p(math.exp(-score if i == j else score))
    found = siglip_loss(image, text, torch.tensor(log_scale), torch.tensor(bias)).item()
    assert found == pytest.approx(expected / rows, rel=1e-4, abs=1e-5)


def test_further_columns_are_negatives_of_images_only() -> None:
    scores = torch.randn(3, 5)
    expected = (
        F.cross_entropy(scores, torch.arange(3)) + F.cross_entropy(scores[:, :3].T, torch.arange(3))
    ) / 2
    assert torch.equal(contrastive_loss(scores, scores[:, :3].T), expected)


# -- hard negatives ---------------------------------------------------------------------------------


@given(st.integers(0, 999), st.integers(2, 7), st.floats(0.0, 1e4))
def test_a_negative_is_never_the_row_itself(seed: int, rows: int, scale: float) -> None:
    """Scores far apart: then most chances are 0 in float32, and every draw meets an edge."""
    scores = scale * torch.randn(rows, rows, generator=torch.Generator().manual_seed(seed))
    for draw in range(20):
        chosen = hard_negatives(scores, torch.Generator().manual_seed(draw))
        assert chosen.shape == (rows,)
        assert ((chosen >= 0) & (chosen < rows) & (chosen != torch.arange(rows))).all()


def test_negatives_are_drawn_by_softmax() -> None:
    scores = torch.randn(5, 5)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([hard_negatives(scores, generator) for _ in range(20000)])  # [20000, 5]
    found = F.one_hot(draws, 5).double().mean(0)
    expected = scores.clone().fill_diagonal_(-torch.inf).softmax(-1)
    assert (found - expected).abs().max() < 0.015


def test_the_generator_depends_on_the_batch_and_on_nothing_else() -> None:
    ids = torch.randint(0, 30000, (8, 32))
    first = torch.rand(4, generator=batch_generator(ids))
    torch.manual_seed(123)
    assert torch.equal(first, torch.rand(4, generator=batch_generator(ids)))
    assert not torch.equal(first, torch.rand(4, generator=batch_generator(ids.flip(0))))


# -- two ranks --------------------------------------------------------------------------------------


def share(rank: int, world: int) -> dict[str, Any]:
    """Losses and gradients of this rank's part of eight rows."""
    own = slice(rank * 8 // world, (rank + 1) * 8 // world)
    weight = vectors(7, 6).requires_grad_()  # [6, 6], a parameter that both ranks hold
    scale, bias = torch.tensor(1.5, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    image = F.normalize(vectors(0)[own] @ weight, dim=-1)
    text = F.normalize(vectors(1)[own] @ weight.T, dim=-1)
    similar = 9 * image @ gather(text).T
    negatives = hard_negatives(similar, batch_generator(gather(torch.arange(8)[own])))
    losses = {
        "clip": clip_loss(image, text, scale),
        "siglip": siglip_loss(image, text, scale, bias),
        # A gathered row that another rank chose brings its gradient home.
        "hard": (gather(image)[negatives] * text).sum(-1).pow(3).mean(),
    }
    parameters = (weight, scale, bias)
    gradients = {
        name: torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for name, loss in losses.items()
    }
    return {
        "losses": {name: loss.detach() for name, loss in losses.items()},
        "gradients": {name: [g for g in found if g is not None] for name, found in gradients.items()},
        "negatives": negatives,
    }


def test_two_ranks_compute_what_one_computes(tmp_path: Path) -> None:
    one, both = share(0, 1), on_ranks(share, 2, tmp_path)
    assert torch.equal(torch.cat([rank["negatives"] for rank in both]), one["negatives"])
    for name, loss in one["losses"].items():
        mean = torch.stack([rank["losses"][name] for rank in both]).mean()
        torch.testing.assert_close(mean, loss, rtol=1e-6, atol=1e-7)
        for expected, *shares in zip(
            one["gradients"][name], *(rank["gradients"][name] for rank in both), strict=True
        ):
            assert expected.abs().max() > 1e-4
            torch.testing.assert_close(torch.stack(shares).mean(0), expected, rtol=1e-5, atol=1e-6)


# -- transformers -----------------------------------------------------------------------------------


def test_siglip_loss_is_that_of_transformers() -> None:
    """SiglipModel with its loss on, on the same embeddings."""
    from transformers import SiglipConfig

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**small, "vocab_size": 20, "max_position_embeddings": 4},
        vision_config={**small, "image_size": 16, "patch_size": 8},
    )
    model = SiglipModel(config).eval()
    with torch.no_grad():
        model.logit_bias.fill_(-1.3)
        out = model(
            input_ids=torch.randint(0, 20, (3, 4)), pixel_values=torch.randn(3, 3, 16, 16), return_loss=True
        )
        found = siglip_loss(out.image_embeds, out.text_embeds, model.logit_scale, model.logit_bias)
    torch.testing.assert_close(found, out.loss.reshape(()), rtol=1e-5, atol=1e-6)
