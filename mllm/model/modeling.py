"""The model: vision encoder, connector, language model, and the one place where they meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from mllm.model.anyres import AnyRes, make_newline, tiling_of
from mllm.model.configuration import MllmConfig
from mllm.model.connectors import build_connector
from mllm.model.fusion import build_fusion
from mllm.model.fusion.base import Context
from mllm.model.generation import ImageGenerationMixin
from mllm.model.label_feed_forward import LabelFeedForward, label_feed_forward
from mllm.model.label_head import head_only_at, labelled_places, next_labels
from mllm.model.language_model import build_language_model
from mllm.model.parted import PartedModel, fixed_ids, fixed_pixels
from mllm.model.prefix_attention import prefix_attention_mask
from mllm.model.soft_prompt import call_language_model
from mllm.model.vision_encoder import build_vision_encoder

PARTS = ("vision_encoder", "connector", "fusion", "language_model")


@dataclass
class MllmOutput(CausalLMOutputWithPast):
    """Loss, logits and cache; in cached generation also what a fusion needs for the next token."""

    fusion_context: Any = None


class MllmForConditionalGeneration(PartedModel, ImageGenerationMixin):
    """Any vision model, a connector, if wanted a deep fusion, and any Hugging Face language model."""

    config_class = MllmConfig
    config: MllmConfig
    parts = PARTS
    vision_encoder: Any
    connector: Any
    fusion: Any
    language_model: Any
    label_feed_forward: LabelFeedForward | None = None
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012

    @classmethod
    def build_part(cls, config: MllmConfig, part: str) -> nn.Module | None:
        """One part with fresh weights; None for the fusion of a model without one."""
        if part == "vision_encoder":
            return build_vision_encoder(config.vision_config, config.vision_feature_layer)
        if part == "language_model":
            return build_language_model(config.text_config)
        text_dim = config.text_config.hidden_size
        if part == "connector":
            connector = build_connector(config.connector, config.vision_dim, text_dim)
            if config.tiling is not None:
                connector.image_newline = make_newline(text_dim)
            return connector
        if config.fusion is None:
            return None
        with torch.device("meta"):
            connector = build_connector(config.connector, config.vision_dim, text_dim)
        media_tokens = connector.num_tokens(config.num_patches)
        return build_fusion(config.fusion, config.text_config, connector.out_dim, media_tokens)

    def connect(self) -> None:
        """Attach to the language model's layers the fusion's modules, or what leaves out unread positions."""
        if self.label_feed_forward is not None:
            self.label_feed_forward.remove()
            self.label_feed_forward = None
        if self.fusion is not None:  # it may act on the feed-forward itself, at every position
            self.fusion.attach(self.language_model)
        else:
            self.label_feed_forward = label_feed_forward(self.language_model)

    @classmethod
    def from_components(cls, **components: Any) -> tuple[MllmForConditionalGeneration, Any]:
        """Compose a model and its processor from parts; see `mllm.model.compose.compose`."""
        from mllm.model.compose import compose  # compose imports this module

        return compose(**components)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    @property
    def tiling(self) -> AnyRes | None:
        """How images are cut into tiles, if they are."""
        return tiling_of(self.config)

    def set_tiling(self, settings: dict[str, Any]) -> None:
        """Tile images from now on, as LLaVA-NeXT's second stage does on a first one without tiles."""
        self.config.tiling = dict(settings)
        tiling_of(self.config)  # raises ConfigError where it cannot be
        if not hasattr(self.connector, "image_newline"):
            like = next(self.connector.parameters())
            newline = make_newline(self.config.text_config.hidden_size, like.dtype, like.device)
            self.connector.image_newline = newline

    def encode_images(
        self,
        pixel_values: torch.Tensor | None,
        image_sizes: torch.Tensor | None = None,
        instruction_ids: torch.Tensor | None = None,
        instruction_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Images to the connector's tokens: [I, C, H, W] -> [I, M, D].

        `instruction_ids` and `instruction_mask` [I, L] are for connectors that read the instruction. With
        tiling, [T, C, H, W] are the views of all images, `image_sizes` [I, 2] their (height, width), and
        the result is [total, D], since images differ in length. `image_features` [I, N, Dv], what the vision
        encoder made of the images, may be given in place of their pixels.
        """
        features = image_features
        if features is None:
            features = self.vision_features(pixel_values)  # type: ignore[arg-type]  # [I, N, Dv]
        features = features.to(next(self.connector.parameters()).dtype)
        soft = self.connector(features, instruction_ids, instruction_mask)  # [I, M, D]
        if self.tiling is None:
            return soft
        if image_sizes is None:
            raise ValueError("this model tiles its images: give image_sizes [I, 2], (height, width) of each")
        return self.tiling.merge(soft, image_sizes.tolist(), self.connector.image_newline)

    def embed(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, **of_images: Any
    ) -> tuple[torch.Tensor, Context]:
        """Token embeddings with soft tokens in the place of the placeholders, and the fusion's context.

        Args:
            input_ids: [B, S].
            pixel_values: [I, C, H, W], or None where there is no image.
            **of_images: `image_sizes`, `instruction_ids`, `instruction_mask`, `pixel_values_high` and
                `image_features` of `forward`.

        Returns:
            ([B, S, Dt], context).

        Raises:
            ValueError: placeholders and soft tokens differ in number.
        """
        is_image = input_ids == self.config.image_token_id  # [B, S]
        placeholders = int(is_image.sum())  # asked for here, where the device has nothing to do yet
        # The placeholder's id may lie beyond the embedding, so it must not be looked up.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))  # [B, S, Dt]
        context: Context = None
        features = of_images.get("image_features")
        images: Any = pixel_values if features is None else features
        no_image = images is None or not len(images)
        if no_image:
            if placeholders:
                raise ValueError(f"{placeholders} image placeholders, but no pixel_values")
            # A model that was left in training mode may generate, and its tokens come without images.
            if not self.training or not torch.is_grad_enabled():
                return embeds, context
            # On many ranks every rank must call every part in every micro-step, or collectives wait for
            # ever on the rank whose rows hold text only.
            of_images = self._beside_one_image(embeds.device)
            if features is not None:
                of_images["image_features"] = features.new_zeros(1, *features.shape[1:])
            ((views, _),) = self.image_counts(1, of_images.get("image_sizes"))
            pixel_values = torch.zeros(views, *self.config.pixel_shape, device=embeds.device)
        high = of_images.pop("pixel_values_high", None)
        soft = self.encode_images(pixel_values, **of_images)  # [I, M, D], with tiling [total, D]
        if self.fusion is not None:
            soft, context = self.fusion.prepare(is_image, soft, high)  # [I, P, Dt]
        soft = soft.to(embeds.dtype)
        if no_image:
            return embeds + (soft * 0).sum(), context
        if placeholders * soft.shape[-1] != soft.numel():
            images = images if of_images.get("image_sizes") is None else of_images["image_sizes"]
            raise ValueError(
                f"{placeholders} image placeholders for {len(images)} images "
                f"with {soft.numel() // soft.shape[-1]} tokens in all"
            )
        return embeds.masked_scatter(is_image.unsqueeze(-1), soft), context

    def image_counts(self, images: int, image_sizes: torch.Tensor | None) -> list[tuple[int, int]]:
        """(views, placeholders) of each image."""
        if self.tiling is None or image_sizes is None:
            return [(1, self.config.num_image_tokens)] * images
        return [(self.tiling.num_tiles(s), self.tiling.num_tokens(s)) for s in image_sizes.tolist()]

    def _beside_one_image(self, device: torch.device) -> dict[str, Any]:
        """What goes with one image of the encoder's size, beside its pixels, where nothing is asked of it."""
        inputs = {}
        if self.tiling is not None:
            inputs["image_sizes"] = torch.tensor([self.config.pixel_shape[1:]], device=device)
        if self.fusion is not None and self.fusion.high_res_size:
            side = self.fusion.high_res_size
            inputs["pixel_values_high"] = fixed_pixels((3, side, side), device)
        if self.connector.reads_text:
            blank = torch.zeros(1, 1, dtype=torch.long, device=device)
            inputs |= {"instruction_ids": blank, "instruction_mask": torch.ones_like(blank)}
        return inputs

    def position_ids(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Positions [B, S] counted along the mask, so that left padding does not move a row."""
        if self.fusion is not None and input_ids is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            own = self.fusion.position_ids(input_ids == self.config.image_token_id, mask)
            if own is not None:
                return own
        if attention_mask is None or attention_mask.dim() != 2:
            return None
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def probe_inputs(self) -> dict[str, torch.Tensor]:
        """One image and eight tokens, which an encoder-decoder also has as its answer."""
        config = self.config
        device: Any = self.get_input_embeddings().weight.device
        text = fixed_ids(config.text_config.vocab_size, config.image_token_id)
        beside = self._beside_one_image(device)
        ((views, placeholders),) = self.image_counts(1, beside.get("image_sizes"))
        image = torch.full((placeholders,), config.image_token_id)
        return {
            "input_ids": torch.cat([image, text])[None].to(device),
            "pixel_values": fixed_pixels((views, *config.pixel_shape), device)[0],
            **beside,
            **({"decoder_input_ids": text[None].to(device)} if config.is_encoder_decoder else {}),
        }

    def _targets(
        self, labels: torch.Tensor | None, everywhere: bool, hidden_states: bool
    ) -> tuple[torch.Tensor | None, AbstractContextManager[None]]:
        """Targets [B, S], or those that are labels, [1, n], and what lets no others be computed."""
        if labels is None:
            return None, nullcontext()
        # An encoder-decoder's inputs are shifted already, so its labels must not be.
        targets = labels if self.config.is_encoder_decoder else next_labels(labels)
        if everywhere:
            return targets, nullcontext()
        places = labelled_places(targets)
        return targets.flatten()[places][None], self._only_at(places, targets.numel(), hidden_states)

    @contextmanager
    def _only_at(self, places: torch.Tensor, positions: int, hidden_states: bool) -> Iterator[None]:
        last = None if hidden_states else self.label_feed_forward
        spared = nullcontext() if last is None else last.only_at(places, positions)
        with head_only_at(self.get_output_embeddings(), places), spared:
            yield

    def _mask_and_positions(
        self,
        input_ids: torch.Tensor | None,
        embeds: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        cache: Any,
        prefix_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
    ) -> dict[str, Any]:
        """Of a decoder-only model's tokens [B, S, Dt]."""
        if self.config.prefix_attention and mask is None:
            # Positions are counted along it, and no language model can count along the mask made below.
            past = 0 if cache is None else cache.get_seq_length()
            mask = torch.ones(len(embeds), past + embeds.shape[1], device=embeds.device)
        if positions is None:
            positions = self.position_ids(input_ids, mask)
            if positions is not None:
                positions = positions[:, -embeds.shape[1] :]
        if self.config.prefix_attention:
            config = self.language_model.config
            mask = prefix_attention_mask(config, embeds, mask, cache, prefix_mask, labels)
        return {"attention_mask": mask, "position_ids": positions}

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        pixel_values_high: torch.Tensor | None = None,
        instruction_ids: torch.Tensor | None = None,
        instruction_mask: torch.Tensor | None = None,
        fusion_context: Context | None = None,
        prefix_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MllmOutput:
        """Logits, and the loss when labels are given.

        Args:
            input_ids: [B, S], M placeholders an image.
            pixel_values: [I, C, H, W], every image of the batch in row order; None when there is none, and
                after the first step of cached generation.
            attention_mask: [B, S] (with a cache: [B, past + S]), 0 at padding, on either side.
            position_ids: [B, S]; counted along the attention mask when not given, so that left padding
                does not move a row.
            past_key_values: the language model's cache; also taken as `cache`.
            inputs_embeds: [B, S, Dt] in place of `input_ids` and `pixel_values`.
            labels: [B, S], -100 where masked; shifted inside. Of an encoder-decoder, [B, T]: the answers.
                In training mode, and with `num_items_in_batch`, the logits are then [1, n, V], those of the n
                positions that have a label.
            use_cache: return a cache.
            logits_to_keep: compute only the last k logits (or those at the indices given); 0 means all.
                Encoder-decoders always compute all.
            image_sizes: [I, 2], (height, width) of each image before it was cut into tiles; `pixel_values`
                are then [T, C, H, W], the views of all images.
            pixel_values_high: [I, C, H, W], the images at the resolution of a fusion with an own encoder.
            instruction_ids, instruction_mask: [I, L], what is asked of each image, in the tokens of an
                instruction-aware connector.
            fusion_context: what the fusion kept of the prompt, in cached generation.
            prefix_mask: [B, P], 1 where the prompt is, for prefix attention; see `prefix_attention_mask`.
            decoder_input_ids: [B, T], of encoder-decoders; default: the labels shifted, or the start token
                alone, so that `logits[:, -1]` is about the first token of the answer.
            encoder_outputs: what the language model's encoder made of the prompt, in generation.
            image_features: [I, N, Dv], what the vision encoder made of the images, in place of
                `pixel_values`; of no image where the batch has none.
            **kwargs: passed on; `num_items_in_batch` normalises the loss over the global batch.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        past_key_values = kwargs.pop("cache", past_key_values)  # as transformers calls it from 5.24 on
        # First: to find the labels, one has to wait for what the device is doing.
        targets, at_labels = self._targets(
            labels,
            everywhere=not self.training and num_items is None,
            hidden_states=bool(
                kwargs.get("output_hidden_states", self.language_model.config.output_hidden_states)
            ),
        )
        if inputs_embeds is None and encoder_outputs is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            of_images = {
                "image_sizes": image_sizes,
                "pixel_values_high": pixel_values_high,
                "instruction_ids": instruction_ids,
                "instruction_mask": instruction_mask,
                "image_features": image_features,
            }
            inputs_embeds, context = self.embed(input_ids, pixel_values, **of_images)
            fusion_context = context if context is not None else fusion_context
        own: dict[str, Any]
        if self.config.is_encoder_decoder or inputs_embeds is None:  # None: in encoder_outputs already
            own = {"attention_mask": attention_mask, "encoder_outputs": encoder_outputs}
            if decoder_input_ids is None:
                prompt: Any = inputs_embeds if encoder_outputs is None else encoder_outputs[0]  # [B, S, Dt]
                answer = labels if labels is not None else prompt.new_zeros(len(prompt), 1, dtype=torch.long)
                decoder_input_ids = self.language_model.prepare_decoder_input_ids_from_labels(answer)
            own["decoder_input_ids"] = decoder_input_ids
        else:
            own = self._mask_and_positions(
                input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, prefix_mask, labels
            )
            own["logits_to_keep"] = logits_to_keep
            if self.fusion is not None:
                own |= self.fusion.arguments(fusion_context)
        with at_labels:
            output = call_language_model(
                self.language_model,
                inputs_embeds=inputs_embeds,
                past_key_values=past_key_values,
                # A cache filled during training would only take memory.
                use_cache=False if use_cache is None and labels is not None else use_cache,
                **own,
                **kwargs,
            )
        loss = None
        if targets is not None:
            loss = self.loss_function(
                output.logits,
                targets,
                output.logits.shape[-1],
                num_items_in_batch=num_items,
                shift_labels=targets,
            )
        return MllmOutput(
            loss=loss,
            logits=output.logits,
            past_key_values=output.past_key_values,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
            fusion_context=fusion_context if output.past_key_values is not None else None,
        )
