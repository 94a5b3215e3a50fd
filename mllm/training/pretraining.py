"""The stages before alignment: a recipe's `model` section -> a model of pairs, and its processor."""

from __future__ import annotations

from typing import Any

import torch

from mllm.config import RunConfig
from mllm.errors import ConfigError
from mllm.model.checkpoint import load, manifest_hash, origin_of
from mllm.model.pretraining.compose import compose_dual_encoder, compose_qformer_pretraining
from mllm.model.pretraining.dual_encoder import DualEncoder
from mllm.model.pretraining.pair_processing import PairProcessor
from mllm.model.pretraining.qformer_pretraining import QFormerForPretraining


def build_pretraining(config: RunConfig) -> tuple[DualEncoder | QFormerForPretraining, PairProcessor]:
    """The model and processor of `pretrain_vision` or `pretrain_qformer`, new or from an earlier run."""
    section, qformer = config.model, config.stage == "pretrain_qformer"
    dtype = getattr(torch, section.dtype)
    if section.init_from is not None:
        model, processor = load(section.init_from, dtype=dtype)
        if not isinstance(model, QFormerForPretraining if qformer else DualEncoder):
            raise ConfigError(
                f"model.init_from: {section.init_from!r} is a {type(model).__name__}, which the stage "
                f"{config.stage} does not train; give a checkpoint of that stage"
            )
        origin_of(model).parent = {"path": section.init_from, "manifest": manifest_hash(section.init_from)}
        return model, processor
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
    kind = connector.pop("type")
    if kind not in ("qformer", "instruct_qformer"):
        raise ConfigError(f"model.connector: {kind!r} in the stage pretrain_qformer; use type 'qformer'")
    return compose_qformer_pretraining(
        **options,
        connector=connector,
        vision_feature_layer=section.vision_feature_layer,
        vision_feature_select=section.vision_feature_select,
    )
