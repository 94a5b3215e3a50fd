"""LLaVA and LLaVA-NeXT: a CLIP or SigLIP encoder, a two-layer MLP, any causal language model."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from mllm.data.schema import user
from mllm.errors import ConfigError
from mllm.model.compose import describe
from mllm.model.configuration import MllmConfig
from mllm.model.convert.family import Family, demand
from mllm.model.modeling import MllmForConditionalGeneration
from mllm.model.parted import fixed_pixels
from mllm.model.processing import MllmProcessor

_SELECT = {"default": "patch", "full": "full"}
# What one image processor passes on to another that also tiles or pads.
_PIXELS = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


class Llava(Family):
    """`LlavaForConditionalGeneration`."""

    model: Any = LlavaForConditionalGeneration
    processor: Any = LlavaProcessor
    config_class: Any = LlavaConfig

    def read(self, config: Any, processor: Any, template: str | None) -> tuple[MllmConfig, MllmProcessor]:
        """Of several feature layers, or of another activation, ours has none."""
        demand(
            "connector 'mlp' can be it",
            projector_hidden_act=(config.projector_hidden_act, "gelu"),
            multimodal_projector_bias=(config.multimodal_projector_bias, True),
        )
        layer = config.vision_feature_layer
        if not isinstance(layer, int):
            raise ConfigError(f"vision_feature_layer is {layer}, several layers side by side; ours takes one")
        text_config = deepcopy(config.text_config)
        text_config.tie_word_embeddings = config.tie_word_embeddings  # theirs asks the whole model's
        if template is None and processor.chat_template:
            processor.tokenizer.chat_template = processor.chat_template
            template = "tokenizer"
        strategy = config.vision_feature_select_strategy
        ours, our_processor = describe(
            config.vision_config,
            text_config,
            {"type": "mlp", "depth": 2},
            tokenizer=processor.tokenizer,
            image_processor=self.read_images(processor.image_processor),
            template=template or "vicuna_v1",
            vision_feature_layer=layer,
            vision_feature_select=_SELECT[strategy],
            tiling=self.read_tiling(config, processor.image_processor),
        )
        if strategy == "default" and ours.num_prefix_tokens != 1:
            raise ConfigError(
                "vision_feature_select_strategy 'default' drops the first token, which of this encoder is "
                f"not its one class token ({ours.num_prefix_tokens} found); the model needs 'full'"
            )
        # Older directories leave the counting of placeholders to the model.
        vars(processor).update(_counts(config, ours.pixel_shape[-1], ours.num_image_tokens))
        return ours, our_processor

    def read_images(self, images: Any) -> Any:
        """The image processor, as ours takes it."""
        return images

    def read_tiling(self, config: Any, images: Any) -> dict[str, Any] | None:
        """How images are cut into tiles."""
        return None

    def names(self, config: Any) -> Iterator[tuple[str, str]]:
        """Theirs has the language model's body and its head apart."""
        whole: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]
        yield "model.vision_tower.", "vision_encoder."
        yield "model.multi_modal_projector.linear_1.", "connector.layers.0."
        yield "model.multi_modal_projector.linear_2.", "connector.layers.2."
        yield "model.language_model.", f"language_model.{whole.base_model_prefix}."
        yield "lm_head.", "language_model.lm_head."

    def batch(self, processor: Any, text: str, image: Any) -> dict[str, torch.Tensor]:
        """Tiles of an image stand in an axis of their own there."""
        bos = processor.tokenizer.bos_token
        begun = bos is not None and text.startswith(bos)
        batch = dict(
            processor(text=[text], images=[image], add_special_tokens=not begun, return_tensors="pt")
        )
        if batch["pixel_values"].dim() == 5:
            batch["pixel_values"] = batch["pixel_values"].flatten(0, 1)  # [1, T, C, H, W] -> [T, C, H, W]
        return batch

    def write(self, model: MllmForConditionalGeneration) -> Any:
        """One hidden state of a CLIP or SigLIP encoder, with or without its class token."""
        config = model.config
        if not isinstance(config.vision_config, (CLIPVisionConfig, SiglipVisionConfig)):
            raise ConfigError(
                f"{self.model.__name__} is served with a CLIP or SigLIP encoder, found "
                f"{config.vision_config.model_type!r}"
            )
        demand(
            f"{self.model.__name__} can be it",
            depth=(config.connector.get("depth", 2), 2),
            num_prefix_tokens=(min(config.num_prefix_tokens, 1), config.num_prefix_tokens),
        )
        return self.config_class(
            vision_config=deepcopy(config.vision_config),
            text_config=deepcopy(config.text_config),
            image_token_index=config.image_token_id,
            image_seq_length=config.num_image_tokens,
            vision_feature_layer=_hidden_state(model),
            vision_feature_select_strategy="default" if config.num_prefix_tokens else "full",
            tie_word_embeddings=config.text_config.tie_word_embeddings,
            **self.write_tiling(model),
        )

    def write_tiling(self, model: MllmForConditionalGeneration) -> dict[str, Any]:
        """How images are cut into tiles."""
        return {}

    def write_images(self, config: Any, processor: MllmProcessor) -> Any:
        """The image processor, which also pads to a square if ours does."""
        if processor.image_aspect_ratio == "square":
            return processor.image_processor
        return _like(processor.image_processor, LlavaImageProcessorPil, do_pad=True)

    def write_processor(self, config: Any, processor: MllmProcessor) -> Any:
        """With the numbers that it counts placeholders with."""
        return self.processor(
            self.write_images(config, processor),
            processor.tokenizer,
            **_counts(config, config.vision_config.image_size, processor.num_image_tokens),
            chat_template=openable(processor),
        )


class LlavaNext(Llava):
    """`LlavaNextForConditionalGeneration`: tiles, and a newline token."""

    model = LlavaNextForConditionalGeneration
    processor = LlavaNextProcessor
    config_class = LlavaNextConfig

    def read_images(self, images: Any) -> Any:
        """What becomes of one tile."""
        return _like(images, CLIPImageProcessorPil)

    def read_tiling(self, config: Any, images: Any) -> dict[str, Any]:
        """Theirs reads pinpoints as (height, width)."""
        points = [list(point) for point in config.image_grid_pinpoints]
        found = [list(point) for point in images.image_grid_pinpoints]
        demand("the model agrees with its image processor", image_grid_pinpoints=(found, points))
        return {"type": "anyres", "pinpoints": points, "order": "hf"}

    def names(self, config: Any) -> Iterator[tuple[str, str]]:
        """The newline token is the connector's in ours."""
        yield "model.image_newline", "connector.image_newline"
        yield from super().names(config)

    def write_tiling(self, model: MllmForConditionalGeneration) -> dict[str, Any]:
        """Published weights were trained with the original's order, which theirs does not have."""
        tiles: Any = model.tiling
        if tiles.order != "hf":
            raise ConfigError(
                f"model.tiling.order is {tiles.order!r}, but LlavaNextForConditionalGeneration lays small "
                "pictures on other tiles; train with model.tiling.order=hf to export"
            )
        return {"image_grid_pinpoints": [list(point) for point in tiles.pinpoints]}

    def write_images(self, config: Any, processor: MllmProcessor) -> Any:
        """The image processor, which also tiles."""
        points = config.image_grid_pinpoints
        return _like(processor.image_processor, LlavaNextImageProcessorPil, image_grid_pinpoints=points)


def _counts(config: Any, size: int, num_image_tokens: int) -> dict[str, Any]:
    """Their processor counts patches, plus what else the encoder gives, less what is dropped."""
    patch, strategy = config.vision_config.patch_size, config.vision_feature_select_strategy
    dropped = int(strategy == "default")
    return {
        "patch_size": patch,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": num_image_tokens + dropped - (size // patch) ** 2,
    }


def _like(images: Any, cls: Any, **more: Any) -> Any:
    found = images.to_dict()
    pixels = {name: found[name] for name in _PIXELS if found.get(name) is not None}
    return cls(**pixels, **{name: bool(found.get(name)) for name in _STEPS}, **more)


def _hidden_state(model: MllmForConditionalGeneration) -> int:
    """The feature layer as an index into hidden states, which `last` is for CLIP."""
    layer = model.config.vision_feature_layer
    if isinstance(layer, int):
        return layer
    if layer == "last":
        pixels = fixed_pixels(model.config.pixel_shape, model.device).to(model.vision_encoder.dtype)
        with torch.no_grad():
            output = model.vision_encoder(pixels, output_hidden_states=True)
        if torch.equal(output.last_hidden_state, output.hidden_states[-1]):
            return -1
    raise ConfigError(
        f"vision_feature_layer is {layer!r}; LLaVA takes hidden states only, here before the final norm"
    )


def openable(processor: MllmProcessor) -> str:
    """Our chat template as transformers uses one: asked to, it ends the prompt where the answer begins."""
    if not processor.content_parts:
        raise ConfigError(
            "this chat template takes one string a message, transformers' processors give it parts; "
            "use another template"
        )
    template = str(processor.chat_template)
    messages: list[Any] = [user("question", None)]
    wanted = processor.prompt_text(messages)
    if processor.piece_tokenizer.prefix_space:
        wanted = wanted.rstrip(" ")  # the tokenizer writes that space in front of the answer itself
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if rendered == wanted:
        return template
    if not wanted.startswith(rendered):
        raise ConfigError(f"this chat template renders {rendered!r} where our prompt is {wanted!r}")
    opening = repr(wanted.removeprefix(rendered))
    return template + "{% if add_generation_prompt %}{{ " + opening + " }}{% endif %}"
