"""Every connector against transformers, or against its published mathematics in plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Idefics3Config, IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from mllm.errors import ConfigError
from mllm.model.connectors import Connector, build_connector

DV, DT = 12, 16
# name -> (settings small enough to run, a number of patches that they take)
SMALL: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"type": "linear"}, 16),
    "mlp": ({"type": "mlp"}, 16),
    "resampler": ({"type": "resampler", "num_latents": 5, "depth": 2, "heads": 2, "head_dim": 4}, 16),
    "resampler at width Dv": ({"type": "resampler", "num_latents": 5, "depth": 1, "project": False}, 16),
    "pixel_shuffle": ({"type": "pixel_shuffle", "factor": 2}, 16),
    "concat_linear": ({"type": "concat_linear", "factor": 4}, 16),
    "frozen": ({"type": "mapping_network", "kind": "linear", "prefix_length": 2}, 1),
    "clipcap mlp": ({"type": "mapping_network", "kind": "mlp", "prefix_length": 3}, 1),
    "clipcap transformer": (
        {"type": "mapping_network", "kind": "transformer", "prefix_length": 3, "layers": 2, "heads": 2},
        1,
    ),
    "glu": ({"type": "glu", "intermediate": 24}, 16),
    "glu with positions": ({"type": "glu", "intermediate": 24, "num_positions": 16}, 16),
}


def build(name: str) -> tuple[Connector, Tensor]:
    """A small connector, none of its parameters at a special value such as 0 or 1, and features for it."""
    arguments, patches = SMALL[name]
    connector = build_connector(arguments, DV, DT)
    for parameter in connector.parameters():
        nn.init.normal_(parameter, std=0.5)
    return connector, torch.randn(3, patches, DV)


@pytest.mark.parametrize("name", SMALL)
def test_shape_gradient_and_batch(name: str) -> None:
    connector, features = build(name)
    tokens = connector(features)
    assert tokens.shape == (3, connector.num_tokens(features.shape[1]), connector.out_dim)
    assert connector.out_dim == (DV if name == "resampler at width Dv" else DT)
    torch.testing.assert_close(tokens, torch.cat([connector(row[None]) for row in features]))
    assert not torch.allclose(tokens[0], tokens[1])
    (tokens * torch.randn_like(tokens)).sum().backward()
    untouched = [k for k, p in connector.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(list(SMALL)), patches=st.integers(1, 40))
def test_the_count_is_what_forward_gives_or_both_refuse(name: str, patches: int) -> None:
    connector, _ = build(name)
    features = torch.randn(2, patches, DV)
    try:
        count = connector.num_tokens(patches)
    except ConfigError:
        with pytest.raises(ConfigError):
            connector(features)
    else:
        assert connector(features).shape == (2, count, connector.out_dim)


# (connector, Dv, Dt, parameters): published sizes. CogVLM's count is without the two border tokens.
@pytest.mark.parametrize(
    ("arguments", "vision_dim", "text_dim", "parameters"),
    [
        ({"type": "resampler", "project": False}, 1024, 4096, 63_019_008),
        ({"type": "pixel_shuffle", "factor": 4}, 768, 960, 11_796_480),
        ({"type": "concat_linear"}, 1408, 4096, 23_072_768),
        ({"type": "mapping_network", "kind": "linear", "prefix_length": 2}, 2048, 4096, 2049 * 2 * 4096),
        ({"type": "mapping_network", "kind": "mlp"}, 512, 768, 31_468_800),
        ({"type": "mapping_network", "kind": "transformer"}, 512, 768, 41_745_408),
        (
            {"type": "mapping_network", "kind": "transformer", "prefix_length": 40, "clip_length": 40},
            512,
            768,
            53_587_968,
        ),
        ({"type": "glu"}, 1792, 4096, 142_614_528 + 2 * 4096),
        ({"type": "glu", "num_positions": 256}, 1792, 4096, 142_614_528 + 2 * 4096 + 256 * 1792),
    ],
)
def test_published_parameter_counts(
    arguments: dict[str, Any], vision_dim: int, text_dim: int, parameters: int
) -> None:
    with torch.device("meta"):
        connector = build_connector(arguments, vision_dim, text_dim)
    assert sum(p.numel() for p in connector.parameters()) == parameters


@pytest.mark.parametrize(
    ("arguments", "patches", "message"),
    [
        ({"type": "pixel_shuffle", "factor": 2}, 15, "15 patches"),  # no square
        ({"type": "pixel_shuffle", "factor": 2}, 9, "9 patches"),  # the side is odd
        ({"type": "pixel_shuffle", "factor": 0}, 16, "factor is 0"),
        ({"type": "concat_linear", "factor": 4}, 257, "257 patches"),
        ({"type": "concat_linear", "factor": 2.5}, 16, "factor is 2.5"),
        ({"type": "mapping_network"}, 16, "found 16"),
        ({"type": "mapping_network", "kind": "cnn"}, 1, "unknown kind 'cnn'"),
        ({"type": "mapping_network", "kind": "transformer", "heads": 5}, 1, "5 heads"),
        ({"type": "resampler", "depth": 0}, 16, "depth is 0"),
        ({"type": "resampler", "activation": "gleu"}, 16, "unknown activation 'gleu'"),
        ({"type": "glu", "num_positions": 9}, 16, "num_positions is 9, found 16"),
        ({"type": "glu", "num_positions": -1}, 16, "num_positions is -1"),
        ({"type": "glu", "width": 3}, 16, "width"),
        ({"type": "resampler", "project": False}, 0, "text_dim is 0"),
    ],
)
def test_what_cannot_work_is_one_line(arguments: dict[str, Any], patches: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_connector(arguments, DV, DT if patches else 0).num_tokens(patches)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [("pixel_shuffle", [0, 1, 4, 5], [2, 3, 6, 7]), ("concat_linear", [0, 1, 2, 3], [4, 5, 6, 7])],
)
def test_which_patches_share_a_token(kind: str, first: list[int], second: list[int]) -> None:
    connector, features = build(kind)  # 4 x 4 patches, groups of 4
    tokens = connector(features)
    for position, patches in enumerate((first, second)):
        together = torch.cat([features[:, patch] for patch in patches], dim=-1)
        torch.testing.assert_close(tokens[:, position], connector.proj(together))


@pytest.mark.parametrize("factor", [2, 4])
def test_pixel_shuffle_is_idefics3s(factor: int) -> None:
    theirs = Idefics3Connector(
        Idefics3Config(
            vision_config={"hidden_size": DV},
            text_config={"model_type": "llama", "hidden_size": DT, "num_attention_heads": 2},
            scale_factor=factor,
        )
    )
    ours = build_connector({"type": "pixel_shuffle", "factor": factor}, DV, DT)
    ours.load_state_dict({"proj.weight": theirs.modality_projection.proj.weight})
    features = torch.randn(2, 64, DV)
    torch.testing.assert_close(ours(features), theirs(features), atol=1e-6, rtol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_resampler_is_idefics(qk_norm: bool) -> None:
    # Its mathematics are ours with ReLU in the place of GELU, and without the last projection.
    width, heads, head_dim, latents, depth = DV, 3, 8, 5, 2
    theirs = IdeficsPerceiverResampler(
        IdeficsConfig(
            vision_config={"embed_dim": width}, perceiver_config={"qk_layer_norms_perceiver": qk_norm}
        ),
        width,
        depth,
        heads,
        head_dim,
        latents,
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    state = {"latents": theirs.latents, "norm.weight": theirs.layer_norm.weight}
    state["norm.bias"] = theirs.layer_norm.bias
    for i, (attention, feed_forward) in enumerate(theirs.blocks):
        parts = {
            "norm_features": attention.context_layer_norm,
            "norm_latents": attention.latents_layer_norm,
            "query": attention.q_proj,
            "out": attention.output_proj,
            "feed_forward.0": feed_forward.ln,
            "feed_forward.1": feed_forward.fc,
            "feed_forward.3": feed_forward.c_proj,
        }
        if qk_norm:
            parts |= {"norm_query": attention.q_layer_norm, "norm_key": attention.k_layer_norm}
        for ours_name, module in parts.items():
            state |= {f"blocks.{i}.{ours_name}.{key}": value for key, value in module.state_dict().items()}
        state[f"blocks.{i}.key_value.weight"] = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
    arguments = {"num_latents": latents, "depth": depth, "heads": heads, "head_dim": head_dim}
    arguments |= {"activation": "relu", "qk_norm": qk_norm, "project": False}
    ours = build_connector({"type": "resampler", **arguments}, width, DT)
    ours.load_state_dict(state)
    features = torch.randn(2, 9, width)
    torch.testing.assert_close(ours(features), theirs(features), atol=1e-5, rtol=0)


def test_the_resampler_has_flamingos_activations() -> None:
    hidden = torch.linspace(-3, 3, 7)
    exact_gelu = torch.tensor([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in hidden.tolist()])
    for name, expected in [("gelu", exact_gelu), ("relu2", hidden.clamp(min=0) ** 2)]:
        connector = build_connector({"type": "resampler", "depth": 1, "activation": name}, DV, DT)
        torch.testing.assert_close(connector.blocks[0].feed_forward[2](hidden), expected)


def test_clipcaps_transformer_in_loops() -> None:
    connector, features = build("clipcap transformer")
    network, heads, d = connector.network, 2, DT // 2
    vector = features[0, 0]
    image = network.expand.weight @ vector + network.expand.bias
    rows = [*image.reshape(-1, DT), *network.prefix]  # the prefix is behind the image
    for layer in network.layers:
        normed = [layer.norm(row) for row in rows]
        query, key, value = ([w @ row for row in normed] for w in layer.query_key_value.weight.chunk(3))
        for s in range(len(rows)):
            read = []
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                scores = [(query[s][part] @ k[part]).item() / math.sqrt(d) for k in key]
                weights = [math.exp(score - max(scores)) for score in scores]
                mixed = sum(w * v[part] for w, v in zip(weights, value, strict=True))
                read.append(mixed / sum(weights))
            rows[s] = rows[s] + layer.out.weight @ torch.cat(read) + layer.out.bias
        norm, up, _, down = layer.feed_forward
        rows = [x + down(up(norm(x)).clamp(min=0)) for x in rows]
    torch.testing.assert_close(connector(features)[0], torch.stack(rows[-3:]), atol=2e-5, rtol=1e-5)


def test_clipcaps_mlp_and_frozens_linear_in_loops() -> None:
    mlp, features = build("clipcap mlp")
    first, _, second = mlp.network
    flat = second.weight @ torch.tanh(first.weight @ features[0, 0] + first.bias) + second.bias
    torch.testing.assert_close(mlp(features)[0], torch.stack([flat[i * DT : (i + 1) * DT] for i in range(3)]))
    frozen, features = build("frozen")
    flat = frozen.network.weight @ features[0, 0] + frozen.network.bias
    torch.testing.assert_close(frozen(features)[0], torch.stack([flat[:DT], flat[DT:]]))


def test_glu_in_loops() -> None:
    connector, features = build("glu with positions")
    linear, norm, _ = connector.stem
    rows = [connector.begin]
    for patch, position in zip(features[0], connector.positions, strict=True):
        x = linear.weight @ (patch + position)
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        gate = connector.gate.weight @ x
        rows.append(connector.down.weight @ (gate / (1 + torch.exp(-gate)) * (connector.up.weight @ x)))
    rows.append(connector.end)
    torch.testing.assert_close(connector(features)[0], torch.stack(rows), atol=1e-5, rtol=1e-5)


def test_first_values() -> None:
    glu = build_connector({"type": "glu", "num_positions": 4}, DV, DT)
    assert not torch.cat([glu.begin, glu.end, glu.positions.flatten()]).any()
    shuffle = build_connector({"type": "pixel_shuffle", "factor": 4}, 64, 256)
    assert shuffle.proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    resampler = build_connector({"type": "resampler"}, 256, DT)
    assert resampler.latents.std().item() == pytest.approx(1, rel=0.05)
