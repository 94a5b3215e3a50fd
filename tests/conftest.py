"""Tiny real parts, built by transformers itself: encoders, language models, tokenizers, pictures.

Nothing here is a stand-in: the classes are those that a 7B run loads, only small and with random weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BitConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    ResNetConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    T5Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm.data.schema import assistant, user
from mllm.model import MllmForConditionalGeneration, MllmProcessor
from mllm.model.language_model import build_language_model
from mllm.model.vision_encoder import build_vision_encoder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

IMAGE_SIZE = 32
_WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION = {**_WIDTH, "num_hidden_layers": 3, "image_size": IMAGE_SIZE, "patch_size": 8}

VISION_CONFIGS: dict[str, Any] = {
    "clip": lambda: CLIPVisionConfig(**_VISION),
    "siglip": lambda: SiglipVisionConfig(**_VISION),
    "dinov2": lambda: Dinov2Config(**{k: v for k, v in _VISION.items() if k != "intermediate_size"}),
}
# Their own initial weights are almost zero, so that all pictures would look alike.
_BLIP2 = {**_VISION, "initializer_range": 0.1}
# Not in the matrix of every part with every other; `tests/model/test_vision_encoders.py` runs them.
MORE_VISION_CONFIGS: dict[str, Any] = {
    "blip2": lambda: Blip2VisionConfig(**_BLIP2),
    "instructblip": lambda: InstructBlipVisionConfig(**_BLIP2),
    "siglip2": lambda: Siglip2VisionConfig(**_WIDTH, num_patches=(IMAGE_SIZE // 8) ** 2, patch_size=8),
    "dinov2_registers": lambda: Dinov2WithRegistersConfig(
        **{k: v for k, v in _VISION.items() if k != "intermediate_size"}, num_register_tokens=4
    ),
    "bit": lambda: BitConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4),
    "resnet": lambda: ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1]),
}
TEXT_CONFIGS: dict[str, Callable[[int], Any]] = {
    "llama": lambda v: LlamaConfig(
        vocab_size=v, num_key_value_heads=2, max_position_embeddings=1024, **_WIDTH
    ),
    "qwen2": lambda v: Qwen2Config(
        vocab_size=v, num_key_value_heads=2, max_position_embeddings=1024, **_WIDTH
    ),
    "phi": lambda v: PhiConfig(vocab_size=v, max_position_embeddings=1024, **_WIDTH),
    "mistral": lambda v: MistralConfig(
        vocab_size=v, num_key_value_heads=2, max_position_embeddings=1024, **_WIDTH
    ),
    "opt": lambda v: OPTConfig(
        vocab_size=v,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
    ),
    # As Flan-T5. Its start token is the padding, as in all of its family.
    "t5": lambda v: T5Config(
        vocab_size=v,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=2,
        decoder_start_token_id=2,
    ),
    "gpt2": lambda v: GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=1024),
}
# Not in the matrix; recipes name them.
MORE_TEXT_CONFIGS: dict[str, Callable[[int], Any]] = {
    "gptj": lambda v: GPTJConfig(
        vocab_size=v,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=1024,
        rotary_dim=4,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "gpt_neox": lambda v: GPTNeoXConfig(vocab_size=v, max_position_embeddings=1024, **_WIDTH),
}
_TINY_QFORMER = {"num_queries": 5, "width": 32, "layers": 3, "heads": 4, "intermediate": 64}
TINY_CONNECTORS: dict[str, dict[str, Any]] = {
    "qformer": _TINY_QFORMER,
    "instruct_qformer": {**_TINY_QFORMER, "vocab_size": 400, "max_positions": 140},
    "resampler": {"num_latents": 5, "depth": 2, "heads": 4, "head_dim": 8},
    "mapping_network": {"prefix_length": 4},
    "glu": {"intermediate": 48},
}
# What else a model with such a connector must be told.
CONNECTOR_NEEDS: dict[str, Callable[[], dict[str, Any]]] = {
    "instruct_qformer": lambda: {"instruction_tokenizer": make_tokenizer()},
    "mapping_network": lambda: {"vision_feature_layer": "pooled"},
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, in whatever order tests run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real photos, captions, boxes and question files; tests that use them skip where they are absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MLLM_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set MLLM_TEST_DATA to its folder")
    return folder


def make_tokenizer(words: str = "hello world the quick brown fox USER ASSISTANT") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without a beginning-of-sequence token in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_vision(name: str = "clip") -> PreTrainedModel:
    """A tiny vision encoder with random weights."""
    return build_vision_encoder({**VISION_CONFIGS, **MORE_VISION_CONFIGS}[name]()).eval()


def scale_weights(module: torch.nn.Module, scale: float) -> None:
    """Multiply every matrix."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)


def make_language_model(
    name: str = "llama", vocab_size: int | None = None, scale: float = 4.0
) -> PreTrainedModel:
    """A tiny language model; weights are scaled up, or all its answers would be near ties."""
    model = build_language_model(
        {**TEXT_CONFIGS, **MORE_TEXT_CONFIGS}[name](vocab_size or len(make_tokenizer()))
    ).eval()
    scale_weights(model, scale)
    return model


def make_image_processor() -> CLIPImageProcessorPil:
    """CLIP's preprocessing at the tiny encoder's size."""
    side = IMAGE_SIZE
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def make_model(
    vision: str = "clip", connector: str = "mlp", text: str = "llama", **kwargs: Any
) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    """A tiny composed model and its processor."""
    torch.manual_seed(0)
    model, processor = MllmForConditionalGeneration.from_components(
        vision_encoder=make_vision(vision),
        language_model=make_language_model(text),
        connector={"type": connector, **TINY_CONNECTORS.get(connector, {})},
        tokenizer=make_tokenizer(),
        image_processor=make_image_processor(),
        **{**CONNECTOR_NEEDS.get(connector, dict)(), **kwargs},
    )
    if "qformer" in connector:  # BERT's first weights are so small that all pictures would look alike
        scale_weights(model.connector, 6.0)
    return model, processor


def save_parts(folder: Path, vision: str = "clip", text: str = "llama") -> dict[str, str]:
    """Base models on disk, as a recipe names them: `{"vision_encoder": dir, "language_model": dir}`."""
    make_vision(vision).save_pretrained(folder / "vision")
    make_image_processor().save_pretrained(folder / "vision")
    make_language_model(text).save_pretrained(folder / "language")
    make_tokenizer().save_pretrained(folder / "language")
    return {"vision_encoder": str(folder / "vision"), "language_model": str(folder / "language")}


def make_picture(seed: int = 0, size: tuple[int, int] = (50, 40)) -> Image.Image:
    """A picture of noise, `size` being (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mixed_conversations() -> list[list[Any]]:
    """Four prompts of different lengths with one, no, three and two images, one of them multi-turn."""
    return [
        [user("hello", make_picture(0))],
        [user("the quick brown fox")],
        [user("compare", make_picture(1), make_picture(2)), assistant("yes"), user("why?", make_picture(3))],
        [user("a longer question about the world", make_picture(4), make_picture(5))],
    ]
