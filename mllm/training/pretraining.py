"""The stages before alignment: a recipe's `model` section -> a model of pairs, and its processor."""

from __future__ import annotations

from typing import Any

import torch

from mllm.config import RunConfig
from mllm.errors import ConfigError
from mllm.model.pretraining.compose import compose_dual_encoder, compose_qformer_pretraining
from mllm.model.pretraining.dual_encoder import DualEncoder
from mllm.model.pretraining.pair_processing import PairProcessor
from mllm.model.pretraining.qformer_pretraining import QFormerForPretraining
from mllm.training.build import load_earlier


def build_pretraining(config: RunConfig) -> tuple[DualEncoder | QFormerForPretraining, PairProcessor]:
    """The model and processor of `pretrain_vision` or `pretrain_qformer`, new or from an earlier run."""
    section, qformer = config.model, config.stage == "pretrain_qformer"
    dtype = getattr(torch, section.dtype)
    if section.init_from is not None:
        return load_earlier(section.init_from, QFormerForPretraining if qformer else DualEncoder, dtype=dtype)
    options: dict[str, Any] = {
        "vision_encoder": section.vision_encoder,
        "text_encoder": section.text_encoder,
        "tokenizer": section.tokenizer,
        "image_processor": section.image_processor,
        "embed_dim": section.pretraining.embed_dim,
        "max_text_length": section.pretraining.max_text_length,
        "dtype": dtype,
    }
    if not qformer:
        return compose_dual_encoder(**options, objective=section.pretraining.objective)
    connector = dict(section.connector)
    if connector.pop("type") != "qformer":
        raise ConfigError("model.connector: the stage pretrain_qformer trains the type 'qformer'; name it")
    if "vocab_size" in connector:
        raise ConfigError("model.connector.vocab_size is the tokenizer's in pretrain_qformer; remove it")
    return compose_qformer_pretraining(
        **options,
        connector=connector,
        vision_feature_layer=section.vision_feature_layer,
        vision_feature_select=section.vision_feature_select,
    )
