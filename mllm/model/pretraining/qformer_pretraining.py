"""BLIP-2's first stage (arXiv 2301.12597): a Q-Former learns from pairs what of an image can be said.

    ITC   queries alone and text alone meet in one space: pull pairs together
    ITM   queries and text see each other: does the text fit the image?
    ITG   text sees the queries and what it has said so far: say the text

One pass serves ITC's image side and ITG: in ITG's mask the queries do not see the text either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import ModelOutput

from mllm.errors import ConfigError
from mllm.model.configuration import as_config
from mllm.model.connectors.qformer import InstructQFormerConnector, image_grounded_causal_mask
from mllm.model.parted import PartedModel, fixed_ids, fixed_pixels
from mllm.model.pretraining.contrastive import (
    batch_generator,
    contrastive_loss,
    gather,
    hard_negatives,
    world_size,
)
from mllm.model.vision_encoder import FeatureLayer, build_vision_encoder

SMOOTHING = 0.1  # of ITC and ITG
IGNORE = -100


class QFormerPretrainingConfig(PreTrainedConfig):
    """Configuration of `QFormerForPretraining`.

    Args:
        vision_config: the vision encoder's.
        connector: arguments of `InstructQFormerConnector`.
        width: D of the Q-Former.
        embed_dim: width in which ITC compares.
        dec_token_id: [DEC], which stands in the place of [CLS] where text is generated.
        vision_feature_layer: see `mllm.model.vision_encoder`.
        num_prefix_tokens: tokens dropped in front of the patches; BLIP-2 drops none.
        vision_dim: Dv.
        pixel_shape: [C, H, W] of one preprocessed image.
    """

    model_type = "mllm_qformer_pretraining"
    sub_configs = {"vision_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        width: int = 768,
        embed_dim: int = 256,
        dec_token_id: int = 30522,
        vision_feature_layer: FeatureLayer = "last",
        num_prefix_tokens: int = 0,
        vision_dim: int = 1,
        pixel_shape: tuple[int, int, int] | list[int] = (3, 1, 1),
        **kwargs: Any,
    ):
        self.vision_config = as_config(vision_config, "clip_vision_model")
        self.connector = dict(connector or {})
        self.width = width
        self.embed_dim = embed_dim
        self.dec_token_id = dec_token_id
        self.vision_feature_layer = vision_feature_layer
        self.num_prefix_tokens = num_prefix_tokens
        self.vision_dim = vision_dim
        self.pixel_shape = list(pixel_shape)
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


@dataclass
class QFormerPretrainingOutput(ModelOutput):
    """The sum of the losses, and each: this rank's shares of the global batch's."""

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None


class QFormerHeads(nn.Module):
    """What the three losses need beyond the Q-Former; none of it goes on to stage 2."""

    def __init__(self, width: int, embed_dim: int, vocab_size: int):
        super().__init__()
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(width, embed_dim)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.itm_head = nn.Linear(width, 2)  # no match, match
        self.itg_dense = nn.Linear(width, width)
        self.itg_norm = nn.LayerNorm(width, 1e-12)
        self.itg_bias = nn.Parameter(torch.zeros(vocab_size))

    def image_vectors(self, queries: torch.Tensor) -> torch.Tensor:
        """Query outputs [B, Q, D] -> unit vectors [B, Q, E]."""
        return F.normalize(self.vision_proj(queries), dim=-1)

    def text_vector(self, hidden: torch.Tensor) -> torch.Tensor:
        """Text outputs [B, T, D] -> unit vectors [B, E], taken at the first token."""
        return F.normalize(self.text_proj(hidden[:, 0]), dim=-1)

    def match(self, queries: torch.Tensor) -> torch.Tensor:
        """Query outputs [B, Q, D] -> mean of their votes [B, 2]."""
        return self.itm_head(queries).mean(1)

    def words(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """BERT's prediction head, whose matrix is the word embedding: [B, T, D], [V, D] -> [B, T, V]."""
        return F.linear(self.itg_norm(F.gelu(self.itg_dense(hidden))), embedding, self.itg_bias)


class QFormerForPretraining(PartedModel):
    """A vision encoder, a Q-Former with its text branch, and the heads of three losses."""

    config_class = QFormerPretrainingConfig
    config: QFormerPretrainingConfig
    parts = ("vision_encoder", "connector", "heads")
    connector: Any
    heads: Any
    main_input_name = "pixel_values"

    @classmethod
    def build_part(cls, config: QFormerPretrainingConfig, part: str) -> nn.Module:
        """One part with fresh weights."""
        if part == "vision_encoder":
            return build_vision_encoder(config.vision_config, config.vision_feature_layer)
        if part == "heads":
            return QFormerHeads(config.width, config.embed_dim, config.connector["vocab_size"])
        connector: Any = InstructQFormerConnector(config.vision_dim, config.width, **config.connector)
        connector.proj = nn.Identity()  # there is no language model yet
        return connector

    # -- what the Q-Former sees, in three ways ----------------------------------------------------------

    def read_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Text alone: [B, T] -> [B, T, D]."""
        return self.connector.qformer(None, None, input_ids, attention_mask)

    def read_together(
        self, features: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Queries [B, Q, D] that have seen the text, and it them."""
        queries = self._queries(features)
        mask = F.pad(attention_mask.bool(), (queries.shape[1], 0), value=True)  # [B, Q + T]
        return self.connector.qformer(queries, features, input_ids, mask)[:, : queries.shape[1]]

    def read_to_write(
        self, features: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries alone [B, Q, D], and text [B, T, D] whose tokens see them and the text before."""
        queries = self._queries(features)
        mask = image_grounded_causal_mask(queries.shape[1], attention_mask)  # [B, Q + T, Q + T]
        hidden = self.connector.qformer(queries, features, input_ids, mask)
        return hidden[:, : queries.shape[1]], hidden[:, queries.shape[1] :]

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, N, Dv], in the Q-Former's precision."""
        return self.vision_features(pixel_values).to(self.connector.query.dtype)

    def _queries(self, features: torch.Tensor) -> torch.Tensor:
        return self.connector.query.expand(len(features), -1, -1)

    def _decoder_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[DEC] in the place of [CLS]: it tells the Q-Former to write."""
        return F.pad(input_ids[:, 1:], (1, 0), value=self.config.dec_token_id)

    # -- scores -----------------------------------------------------------------------------------------

    def itc_scores(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Cosine of each image's best query with each text: [I, C, H, W], [B, T] -> [I, B]."""
        features = self.image_features(pixel_values)
        images = self.heads.image_vectors(self.connector.qformer(self._queries(features), features))
        return _best_query(images, self.heads.text_vector(self.read_text(input_ids, attention_mask)))

    def itm_scores(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Logits (no match, match) of B pairs: [B, 2]."""
        return self.heads.match(
            self.read_together(self.image_features(pixel_values), input_ids, attention_mask)
        )

    def itg_logits(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, T, V]: at each place the next word, given the image and the text so far."""
        features = self.image_features(pixel_values)
        _, text = self.read_to_write(features, self._decoder_ids(input_ids), attention_mask)
        return self.heads.words(text, self.connector.qformer.word_embeddings.weight)

    def probe_inputs(self) -> dict[str, torch.Tensor]:
        """Two images, each with eight tokens: the losses need another pair to compare with."""
        device: Any = self.connector.query.device
        pixels = fixed_pixels(self.config.pixel_shape, device)
        ids = fixed_ids(self.config.connector["vocab_size"], -1)[None].to(device)
        return {
            "pixel_values": torch.cat([pixels, pixels.flip(-1)]),
            "input_ids": torch.cat([ids, ids.flip(-1)]),
            "attention_mask": torch.ones_like(ids).expand(2, -1),
        }

    def probe_logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Numbers from every head, for the first image: [1, 16]."""
        words = self.itg_logits(**inputs)[0, -1, :12]
        contrast = self.itc_scores(**inputs)[0] / self.heads.temperature
        return torch.cat([words, contrast, self.itm_scores(**inputs)[0]])[None]

    # -- losses -----------------------------------------------------------------------------------------

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> QFormerPretrainingOutput:
        """B pairs, captions [B, T] with [CLS] in front, to the three losses over the global batch of G.

        Raises:
            ConfigError: G is 1, which leaves nothing to contrast with.
        """
        heads = self.heads
        all_ids, all_masks = gather(input_ids), gather(attention_mask)  # [G, T]
        if len(all_ids) < 2:
            raise ConfigError("a batch of one pair has no negatives; raise train.per_device_batch_size")
        features = self.image_features(pixel_values)  # [B, N, Dv]

        decoder_ids = self._decoder_ids(input_ids)
        queries, words = self.read_to_write(features, decoder_ids, attention_mask)
        images = heads.image_vectors(queries)  # [B, Q, E]
        texts = heads.text_vector(self.read_text(input_ids, attention_mask))  # [B, E]
        image_to_text = _best_query(images, gather(texts)) / heads.temperature  # [B, G]
        text_to_image = _best_query(gather(images), texts).T / heads.temperature  # [B, G]
        itc = contrastive_loss(image_to_text, text_to_image, SMOOTHING)

        # Pairs, then wrong images for the texts, then wrong texts for the images: [3 B, ...].
        generator = batch_generator(all_ids)
        wrong_images = gather(features)[hard_negatives(text_to_image, generator)]
        wrong_texts = hard_negatives(image_to_text, generator)
        votes = self.read_together(
            torch.cat([features, wrong_images, features]),
            torch.cat([input_ids, input_ids, all_ids[wrong_texts]]),
            torch.cat([attention_mask, attention_mask, all_masks[wrong_texts]]),
        )
        matches = torch.arange(3, device=votes.device).repeat_interleave(len(features)) == 0  # [3 B]
        itm = F.cross_entropy(heads.match(votes), matches.long())

        logits = heads.words(words[:, :-1], self.connector.qformer.word_embeddings.weight)  # [B, T - 1, V]
        targets = decoder_ids.masked_fill(attention_mask == 0, IGNORE)[:, 1:]
        itg = F.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=IGNORE, label_smoothing=SMOOTHING, reduction="sum"
        )
        # Captions differ in length, so each rank divides by the words of all ranks.
        itg = itg * world_size() / all_masks[:, 1:].sum()
        losses = {"itc": itc, "itm": itm, "itg": itg}
        return QFormerPretrainingOutput(
            loss=itc + itm + itg, losses={name: loss.detach() for name, loss in losses.items()}
        )


def _best_query(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Products of the query that fits best: [I, Q, E], [T, E] -> [I, T]."""
    return torch.einsum("iqe,te->iqt", images, texts).amax(1)
