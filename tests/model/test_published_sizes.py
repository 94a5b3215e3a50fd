"""The published LLaVA models, built from their configurations alone: token and parameter counts."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tokenizer
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm.model.compose import describe
from mllm.model.connectors import build_connector


# Counts: LLaVA's Linear and LLaVA-1.5's MLP at Vicuna-7B's width; tokens of CLIP-L/14 at 224 and 336 px.
@pytest.mark.parametrize(
    ("connector", "pixels", "tokens", "parameters"),
    [("linear", 224, 256, 4_198_400), ("mlp", 336, 576, 20_979_712)],
)
def test_llava_7b(connector: str, pixels: int, tokens: int, parameters: int) -> None:
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=pixels,
        patch_size=14,
    )
    config, processor = describe(
        vision,
        LlamaConfig(),
        connector,
        tokenizer=make_tokenizer(),
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}
        ),
        image_aspect_ratio="pad",
    )
    assert config.num_prefix_tokens == 1
    assert config.num_image_tokens == processor.num_image_tokens == tokens
    assert processor.mean_colour == (122, 116, 104)
    with torch.device("meta"):
        module = build_connector(config.connector, config.vision_dim, config.text_config.hidden_size)
    assert sum(p.numel() for p in module.parameters()) == parameters
