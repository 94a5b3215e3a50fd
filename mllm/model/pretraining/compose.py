"""Build the models of the pretraining stages, and their processor, from parts."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedModel

from mllm.errors import ConfigError
from mllm.model.checkpoint import Origin
from mllm.model.connectors import build_connector
from mllm.model.connectors.qformer import InstructQFormerConnector
from mllm.model.convert.qformer_names import bert_names
from mllm.model.fused_vision import FusedVisionConfig
from mllm.model.parted import PartedModel
from mllm.model.parts import (
    base_of,
    load_image_processor,
    load_named,
    load_text_encoder,
    load_vision_encoder,
)
from mllm.model.pretraining.dual_encoder import DualEncoder, DualEncoderConfig, Objective
from mllm.model.pretraining.pair_processing import PairProcessor
from mllm.model.pretraining.qformer_pretraining import QFormerForPretraining, QFormerPretrainingConfig
from mllm.model.vision_encoder import FeatureLayer, feature_shape

Source = str | Path | PreTrainedModel | Mapping[str, Any]
DEC = "[DEC]"  # begins a text that is generated, as [CLS] begins one that is read


def compose_dual_encoder(
    vision_encoder: Source,
    text_encoder: Source,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    objective: Objective = "clip",
    embed_dim: int = 512,
    max_text_length: int = 32,
    dtype: torch.dtype | None = None,
) -> tuple[DualEncoder, PairProcessor]:
    """A dual encoder with new projections.

    Args:
        vision_encoder: a model, a directory or Hub name, or a configuration for new weights.
        text_encoder: likewise.
        tokenizer: tokenizer or where it lies; default: with the text encoder.
        image_processor: image processor or where it lies; default: with the vision encoder.
        objective: `clip` or `siglip`.
        embed_dim: width in which images and texts meet.
        max_text_length: tokens a caption.
        dtype: of the loaded weights; default: float32.

    Raises:
        ConfigError: an encoder has no pooled output, or one that does not hear the end of the text, or
            captions are longer than it can read.
    """
    processor = _processor(image_processor or vision_encoder, tokenizer or text_encoder, max_text_length)
    if isinstance(text_encoder, Mapping):
        text_encoder = {**_ids_of(processor.tokenizer), **text_encoder}
    vision = load_vision_encoder(vision_encoder, dtype, "pooled")
    text = load_text_encoder(text_encoder, dtype)
    _check_text_encoder(text, processor)
    pixel_shape = _pixel_shape(processor)
    config = DualEncoderConfig(
        vision_config=deepcopy(vision.config),
        text_config=deepcopy(text.config),
        objective=objective,
        embed_dim=embed_dim,
        vision_dim=feature_shape(vision.config, pixel_shape, "pooled")[2],
        pixel_shape=pixel_shape,
    )
    model = _assemble(DualEncoder, config, {"vision_encoder": vision, "text_encoder": text})
    model.origin = _origin(model, {"vision_encoder": vision_encoder, "text_encoder": text_encoder})
    return model, processor


def compose_qformer_pretraining(
    vision_encoder: Source,
    tokenizer: Any,
    connector: Mapping[str, Any] | None = None,
    *,
    text_encoder: Source | None = None,
    image_processor: Any = None,
    vision_feature_layer: FeatureLayer | list[FeatureLayer] = "last",
    vision_feature_select: str = "full",
    embed_dim: int = 256,
    max_text_length: int = 32,
    dtype: torch.dtype | None = None,
) -> tuple[QFormerForPretraining, PairProcessor]:
    """A Q-Former with text branch behind a vision encoder, for BLIP-2's first stage.

    Args:
        vision_encoder: a model, a directory or Hub name, or a configuration for new weights.
        tokenizer: BERT's, or where it lies; [DEC] is added.
        connector: arguments of `QFormerConnector`.
        text_encoder: the BERT that the Q-Former starts from, as BLIP-2's does; None: new weights.
        image_processor: image processor or where it lies; default: with the vision encoder.
        vision_feature_layer: index into the hidden states, or `last`.
        vision_feature_select: `full` keeps class tokens, as BLIP-2 does; `patch` drops them.
        embed_dim: width in which images and texts are contrasted.
        max_text_length: tokens a caption.
        dtype: of the loaded weights; default: float32.
    """
    processor = _processor(image_processor or vision_encoder, tokenizer, max_text_length)
    words = processor.tokenizer
    if words("a")["input_ids"][0] not in words.all_special_ids:
        raise ConfigError(
            "pretrain_qformer: the tokenizer puts no special token in front of a text, where ITC reads it "
            "and [DEC] takes its place; use BERT's"
        )
    words.add_special_tokens({"bos_token": DEC})
    vision = load_vision_encoder(vision_encoder, dtype, vision_feature_layer)
    fused = isinstance(vision.config, FusedVisionConfig)  # which holds its encoders' own layers
    layer: Any = "last" if fused else vision_feature_layer
    pixel_shape = _pixel_shape(processor)
    _, prefix, vision_dim = feature_shape(vision.config, pixel_shape, layer)
    bert = None if text_encoder is None else load_text_encoder(text_encoder)
    settings = {**_like(bert), **(connector or {}), "vocab_size": len(words)}
    with torch.device("meta"):
        qformer: Any = build_connector({"type": "instruct_qformer", **settings}, vision_dim, 1)
        width = qformer.query.shape[-1]
    config = QFormerPretrainingConfig(
        vision_config=deepcopy(vision.config),
        connector=settings,
        width=width,
        embed_dim=embed_dim,
        dec_token_id=words.bos_token_id,
        vision_feature_layer=layer,
        num_prefix_tokens=prefix if vision_feature_select == "patch" else 0,
        vision_dim=vision_dim,
        pixel_shape=pixel_shape,
    )
    model = _assemble(QFormerForPretraining, config, {"vision_encoder": vision})
    if bert is not None:
        start_from_bert(model.connector, bert)
    model.origin = _origin(model, {"vision_encoder": vision_encoder})
    return model, processor


def start_from_bert(connector: InstructQFormerConnector, bert: PreTrainedModel) -> None:
    """Copy BERT's weights into a Q-Former; its queries' feed-forwards start as the text's.

    Cross-attention stays new, and so does the word that BERT does not have, [DEC].

    Raises:
        ConfigError: the two differ in depth, width or vocabulary.
    """
    own, theirs = connector.state_dict(), bert.state_dict()
    for name, ours in bert_names(len(connector.qformer.layers)).items():
        new, old = own.get(ours), theirs.get(name)
        if new is None or old is None or new.shape[1:] != old.shape[1:] or len(new) < len(old):
            found, wanted = (None if x is None else list(x.shape) for x in (old, new))
            raise ConfigError(
                f"model.text_encoder: its tensor {name!r} is {found}, the Q-Former's {wanted}; use a BERT of "
                "the connector's shape"
            )
        new[: len(old)].copy_(old)
    connector.qformer.copy_text_mlp_to_queries()


def _like(bert: PreTrainedModel | None) -> dict[str, int]:
    """The Q-Former's shape, where a BERT gives it."""
    if bert is None:
        return {}
    config = bert.config
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "intermediate": config.intermediate_size,
        "max_positions": config.max_position_embeddings,
    }


def _processor(image_processor: Any, tokenizer: Any, max_text_length: int) -> PairProcessor:
    images = load_image_processor(image_processor)
    return PairProcessor(images, load_named(AutoTokenizer, tokenizer, "tokenizer"), max_text_length)


def _pixel_shape(processor: PairProcessor) -> list[int]:
    return list(processor(images=[Image.new("RGB", (64, 48))])["pixel_values"].shape[1:])


def _ids_of(tokenizer: Any) -> dict[str, int | None]:
    """What a new text encoder has to know of the tokenizer; CLIP's finds a text's end by its id."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {"vocab_size": len(tokenizer), **ids}


def _check_text_encoder(text_encoder: PreTrainedModel, processor: PairProcessor) -> None:
    """The text encoder takes captions of this length, and pools what differs at their end differently."""
    limit = getattr(text_encoder.config, "max_position_embeddings", processor.max_text_length)
    if processor.max_text_length > limit:
        raise ConfigError(
            f"model.pretraining.max_text_length is {processor.max_text_length}, but the text encoder has "
            f"{limit} positions; lower it"
        )
    with torch.no_grad():
        pooled = getattr(text_encoder.eval()(**processor(text=["a 1", "a 2"])), "pooler_output", None)
    if pooled is None:
        raise ConfigError("model.text_encoder: it gives no pooled output; use CLIP's, SigLIP's or BERT's")
    if torch.equal(pooled[0], pooled[1]):
        raise ConfigError(
            "model.text_encoder: it pools at an end token, which the tokenizer does not write; use "
            "the tokenizer that belongs to it"
        )


def _assemble(cls: type[Any], config: Any, given: Mapping[str, PreTrainedModel]) -> Any:
    """A model is built without memory, then its parts are put in; those not given are new."""
    with torch.device("meta"):
        model = cls(config)
    for part in cls.parts:
        setattr(model, part, given[part] if part in given else model.build_part(config, part))
    return model.eval()


def _origin(model: PartedModel, sources: Mapping[str, Any]) -> Origin:
    """Parts that come from a directory or the Hub are named, not copied, as long as they are frozen."""
    return Origin(
        base={
            part: base_of(source, getattr(model, part))
            for part, source in sources.items()
            if isinstance(source, (str, Path))
        }
    )
