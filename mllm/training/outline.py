"""A recipe's model without its weights: which parameters there are, which learn, what a batch looks like.

Configurations and tokenizers are read, weights never, so a 7B model takes seconds and no memory. A later
stage can be looked at before the earlier one has run: its parts are then those of the recipe that would
write the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm.config import AFTER_INIT, RECIPES, ModelSection, RunConfig, find_recipe, load_recipe
from mllm.data.collator import Collator
from mllm.data.pairs import PairCollator
from mllm.data.schema import Row, assistant, user
from mllm.errors import CheckpointError
from mllm.model.adapters import insert
from mllm.model.added_tokens import add_tokens
from mllm.model.checkpoint import has_manifest, model_class
from mllm.model.checkpoint.loading import MODELS
from mllm.model.language_model import build_language_model
from mllm.model.parted import PartedModel
from mllm.model.parts import load_config, load_named, load_vision_config
from mllm.model.pretraining.pair_processing import PairProcessor
from mllm.model.text_encoder import build_text_encoder
from mllm.model.vision_encoder import build_vision_encoder
from mllm.training.arguments import check_attention_name
from mllm.training.build import build, change_for_stage
from mllm.training.pretraining import build_pretraining
from mllm.training.shapes import shapes_only
from mllm.training.tuning import PartReport, apply_tuning


def outline(config: RunConfig) -> tuple[PartedModel, Any, list[PartReport]]:
    """The model of a run with shapes only, its processor, and what of it learns.

    A language model tuned by `qlora` carries LoRA on weights that are not packed.

    Raises:
        ConfigError: a part cannot be read, one line that says which.
    """
    tune = config.tune
    if tune.language_model == "qlora":
        tune = tune.model_copy(update={"language_model": "lora"})
    model: Any
    processor: Any
    with shapes_only():
        section = _with_shapes(config)
        if config.model.init_from is not None:
            model, processor = _of_checkpoint(section)
        elif config.on_pairs:
            model, processor = build_pretraining(config.model_copy(update={"model": section}))
        else:
            model, processor = build(section)
        return model, processor, apply_tuning(model, tune)


def whole_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A recipe whose model stands for itself, although the stages before it may not have run yet.

    Where `model.init_from` is no checkpoint, the parts are those of the recipe that writes there: one in
    the same folder, or a shipped one.

    Raises:
        CheckpointError: there is neither.
    """
    return _whole(load_recipe(recipe, overrides), find_recipe(recipe).parent)


def _whole(config: RunConfig, folder: Path) -> RunConfig:
    section = config.model
    reader = section.instruction_tokenizer
    if reader is not None and (before := _writer(reader, folder)):
        section = section.model_copy(update={"instruction_tokenizer": before.model.tokenizer})
    if section.init_from is not None and not has_manifest(section.init_from):
        before = _writer(section.init_from, folder)
        if before is None:
            raise CheckpointError(
                f"model.init_from: {section.init_from!r} is no checkpoint, and no recipe writes there; train "
                "that stage first"
            )
        given = section.model_fields_set & AFTER_INIT - {"init_from"}
        own = {key: getattr(section, key) for key in given}
        section = _whole(before, folder).model.model_copy(update=own)
    return config.model_copy(update={"model": section})


def _writer(place: str, folder: Path) -> RunConfig | None:
    """The recipe whose run would write to a directory that is not there yet."""
    if Path(place).is_dir():
        return None
    for path in [*sorted(folder.glob("*.yaml")), *sorted(RECIPES.glob("*/*.yaml"))]:
        # Other files may lie beside a recipe, so only those are checked that name the place.
        if place in path.read_text(encoding="utf-8"):
            before = load_recipe(path)
            if Path(before.train.output_dir) == Path(place):
                return before
    return None


def example_batch(
    model: Any, processor: Any, rows: int, tokens: int, features: bool = False
) -> dict[str, torch.Tensor]:
    """A training batch of equal rows, each with one image, of the largest kind, and at least `tokens`.

    The first row is a token shorter, so that there is a mask of padding, as in nearly every real batch. With
    `features`, the batch has what the vision encoder makes of the images in the place of their pixels.
    """
    height, width = max(model.tiling.pinpoints, key=prod) if getattr(model, "tiling", None) else (64, 64)
    picture = Image.new("RGB", (width, height))
    row: Row = {"id": "example", "messages": [user("a", picture), assistant("a")]}
    collate: Any = PairCollator(processor) if isinstance(processor, PairProcessor) else Collator(processor)
    batch = {k: v for k, v in collate([row] * rows).items() if isinstance(v, torch.Tensor)}
    if "labels" in batch:
        for name, value in {"input_ids": 0, "attention_mask": 1, "labels": 0}.items():
            if name != "labels" or not processor.encoder_decoder:
                batch[name] = F.pad(batch[name], (0, max(0, tokens - batch[name].shape[1])), value=value)
        batch["attention_mask"][0, -1] = 0
    if features:
        images, config = len(batch.pop("pixel_values")), model.config
        dtype = model.vision_encoder.dtype
        batch["image_features"] = torch.zeros(images, config.num_patches, config.vision_dim, dtype=dtype)
    return batch


def _of_checkpoint(section: ModelSection) -> tuple[Any, Any]:
    """A checkpoint's model and processor as this stage has them; its adapters count as merged."""
    path = Path(str(section.init_from))
    cls = model_class(path)
    model = cls(cls.config_class.from_pretrained(path))
    for part, spec in getattr(model.config, "inserted", {}).items():
        insert(getattr(model, part), part, spec)
    torch.nn.Module.to(model, getattr(torch, section.dtype))
    processor: Any = MODELS[model.config.model_type][1].from_pretrained(path)
    if not isinstance(processor, PairProcessor):
        change_for_stage(model, processor, section)
    return model, processor


def _with_shapes(config: RunConfig) -> ModelSection:
    """The section with models that have no values in the place of published ones."""
    section, dtype = config.model, getattr(torch, config.model.dtype)
    changed: dict[str, Any] = {"connector_from": None}
    attention = section.attn_implementation
    check_attention_name(attention)
    if attention not in (None, "eager"):
        attention = changed["attn_implementation"] = "sdpa"  # keeps the same, and needs no package
    if section.vision_encoder is not None:
        several = isinstance(section.vision_encoder, list)
        sources: Any = section.vision_encoder if several else [section.vision_encoder]
        layer: Any = "pooled" if config.stage == "pretrain_vision" else section.vision_feature_layer
        layers = layer if isinstance(layer, list) else [layer] * len(sources)
        encoders = [_vision(*each, dtype) for each in zip(sources, layers, strict=True)]
        readers = section.image_processor or section.vision_encoder
        readers = [_reader(one) for one in readers] if isinstance(readers, list) else _reader(readers)
        changed |= {"vision_encoder": encoders if several else encoders[0], "image_processor": readers}
    if isinstance(section.text_encoder, str):
        text = load_config(section.text_encoder, "text_encoder")
        text_model = build_text_encoder(getattr(text, "text_config", text))
        changed["text_encoder"] = torch.nn.Module.to(text_model, dtype)
    words: Any = section.tokenizer or section.language_model or section.text_encoder
    if section.language_model is not None:
        text = load_config(section.language_model, "language_model")
        if isinstance(words, Mapping):
            words = byte_tokenizer(text.vocab_size)
        if section.added_tokens:  # their rows would be the mean of values that are not there
            copy = deepcopy(load_named(AutoTokenizer, words, "tokenizer"))
            text.vocab_size = add_tokens(copy, section.added_tokens, text.vocab_size)
        options = {"attn_implementation": attention} if attention else {}
        changed["language_model"] = torch.nn.Module.to(build_language_model(text, **options), dtype)
    changed["tokenizer"] = words
    if section.fusion is not None:
        stacked = {"of": [_fusion(one) for one in section.fusion["of"]]} if "of" in section.fusion else {}
        changed["fusion"] = {**_fusion(section.fusion), **stacked}
    return section.model_copy(update=changed)


def _vision(source: Any, layer: Any, dtype: torch.dtype) -> Any:
    return torch.nn.Module.to(build_vision_encoder(load_vision_config(source, layer), layer), dtype)


def _fusion(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With the configuration of its own encoder, without settings that its class does not know."""
    source = settings.get("vision_encoder")
    if source is None:
        return dict(settings)
    config = load_vision_config(source, "last")
    known = type(config)()
    own = {key: value for key, value in config.to_dict().items() if hasattr(known, key)}
    return {**settings, "vision_encoder": {**own, "model_type": config.model_type}}


def _reader(source: Any) -> Any:
    """What is named; where a model is given by its configuration, one that makes pictures of its size."""
    if not isinstance(source, Mapping):
        return source
    side = getattr(load_vision_config(source, "last"), "image_size", 224)
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, for where only the size of the vocabulary matters."""
    words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<word{n}>" for n in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
