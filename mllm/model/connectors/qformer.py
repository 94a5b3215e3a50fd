"""The Q-Former of BLIP-2 (arXiv 2301.12597) and InstructBLIP (arXiv 2305.06500), and its two connectors.

A BERT whose learned queries read the image by cross-attention in every second layer. Queries and text share
the self-attention: the attention mask alone decides which of the two sees the other.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.errors import ConfigError, DataError
from mllm.model.connectors.base import Connector, Text, check_positive
from mllm.model.connectors.qformer_layers import QFormerLayer

INIT_STD = 0.02  # BERT's; the queries have it too


class QFormer(nn.Module):
    """Queries and, with a vocabulary, text through `layers` layers.

    Args:
        width: D.
        layers: number of layers.
        heads: attention heads; must divide `width`.
        intermediate: width inside the feed-forward blocks.
        vision_dim: Dv of the features that the queries read.
        cross_every: layers 0, `cross_every`, 2 * `cross_every`, ... have cross-attention.
        vocab_size: rows of the word embedding; None: no text branch, as in BLIP-2 behind stage 1.
        max_positions: longest text.
        dropout: of embeddings, attention weights and block outputs.
        eps: of the layer norms.

    Raises:
        ConfigError: a size below 1, or `heads` does not divide `width`.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        intermediate: int,
        vision_dim: int,
        cross_every: int = 2,
        vocab_size: int | None = None,
        max_positions: int = 512,
        dropout: float = 0.1,
        eps: float = 1e-12,
    ):
        super().__init__()
        check_positive(width=width, layers=layers, heads=heads, cross_every=cross_every)
        if width % heads:
            raise ConfigError(f"connector: width is {width} with {heads} heads; heads must divide width")
        self.norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(width, heads, intermediate, None if i % cross_every else vision_dim, dropout, eps)
            for i in range(layers)
        )
        self.word_embeddings: nn.Embedding | None = None
        self.position_embeddings: nn.Embedding | None = None
        self.apply(_init_as_bert)
        if vocab_size is not None:
            self.add_text_branch(vocab_size, max_positions)

    def add_text_branch(self, vocab_size: int, max_positions: int = 512) -> None:
        """New embeddings, and a text feed-forward in every layer that starts as the queries' one."""
        width = self.norm.weight.shape[0]
        self.word_embeddings = nn.Embedding(vocab_size, width).apply(_init_as_bert)
        self.position_embeddings = nn.Embedding(max_positions, width).apply(_init_as_bert)
        for layer in self.layers:
            layer.text_mlp = deepcopy(layer.query_mlp)

    def copy_text_mlp_to_queries(self) -> None:
        """Start the queries' feed-forwards from the text's, as stage 1 of BLIP-2 does once BERT is loaded."""
        layer: Any
        for layer in self.layers:
            layer.query_mlp.load_state_dict(layer.text_mlp.state_dict())

    def forward(
        self,
        queries: Tensor | None,
        features: Tensor | None,
        text_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, Q + T, D], queries in front.

        Args:
            queries: [B, Q, D]; None for text alone (Q = 0), which reads no features.
            features: [B, N, Dv], read by the queries; None without queries.
            text_ids: [B, T]; None for queries alone (T = 0).
            attention_mask: True where self-attention may look. [B, Q + T] masks keys for every position;
                [B, Q + T, Q + T] says for each position (rows) what it sees (columns), and every row needs
                one True. None: everybody sees everybody. Cross-attention is never masked.

        Raises:
            DataError: text longer than `max_positions`.
        """
        parts = [] if queries is None else [queries]
        if text_ids is not None:
            parts.append(self._embed(text_ids))
        # transformers keeps what it likes in float32 where the rest is float16, and saves it so.
        dtype = self.norm.weight.dtype
        features = None if features is None else features.to(dtype)
        x = self.dropout(self.norm(torch.cat(parts, dim=1).to(dtype)))  # [B, Q + T, D]
        mask = attention_mask
        if mask is not None:
            mask = mask.bool()  # SDPA would add anything else to the scores
            mask = mask[:, None, None] if mask.dim() == 2 else mask[:, None]  # [B, 1, 1 or S, S]
        for layer in self.layers:
            x = layer(x, 0 if queries is None else queries.shape[1], features, mask)
        return x

    def _embed(self, text_ids: Tensor) -> Tensor:
        if self.word_embeddings is None or self.position_embeddings is None:
            raise ValueError("this Q-Former has no text branch; build it with vocab_size")
        length, limit = text_ids.shape[1], self.position_embeddings.num_embeddings
        if length > limit:
            raise DataError(f"text of {length} tokens for a Q-Former of {limit} positions; truncate it")
        return self.word_embeddings(text_ids) + self.position_embeddings.weight[:length]  # [B, T, D]


def image_grounded_causal_mask(num_queries: int, text_mask: Tensor) -> Tensor:
    """Who sees whom when text is generated from queries (ITG): [B, T] -> bool [B, Q + T, Q + T].

    Queries see queries only; a text token sees all queries and the text up to itself, padding excepted.
    """
    keys = F.pad(text_mask.bool(), (num_queries, 0), value=True)  # [B, S]
    visible = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool, device=keys.device).tril()
    visible[:num_queries, :num_queries] = True
    return visible & keys.unsqueeze(1)  # [B, S, S]


def _init_as_bert(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class QFormerConnector(Connector):
    """`num_queries` learned queries through a Q-Former, then one linear layer (BLIP-2 stage 2).

    Args:
        vision_dim: Dv.
        text_dim: Dt.
        num_queries: Q, the soft tokens an image.
        width: D of the Q-Former; for it and what follows see `QFormer`. The defaults are BLIP-2's.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        num_queries: int = 32,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        intermediate: int = 3072,
        cross_every: int = 2,
        dropout: float = 0.1,
        eps: float = 1e-12,
    ):
        super().__init__()
        check_positive(num_queries=num_queries)
        self.out_dim = text_dim
        self.query = nn.Parameter(torch.empty(1, num_queries, width))
        self.qformer = QFormer(
            width, layers, heads, intermediate, vision_dim, cross_every, dropout=dropout, eps=eps
        )
        self.proj = nn.Linear(width, text_dim)
        nn.init.normal_(self.query, std=INIT_STD)

    def num_tokens(self, num_patches: int) -> int:
        """Q, whatever the number of patches."""
        return self.query.shape[1]

    def forward(self, features: Tensor, text: Text = None, text_mask: Text = None) -> Tensor:
        """[I, N, Dv] -> [I, Q, Dt]; does not read text."""
        return self._project(self.qformer(self.query.expand(len(features), -1, -1), features))

    def _project(self, queries: Tensor) -> Tensor:
        return self.proj(queries.to(self.proj.weight.dtype))


class InstructQFormerConnector(QFormerConnector):
    """The Q-Former connector whose queries also see the instruction (InstructBLIP).

    Holds every tensor of `QFormerConnector` under the same name. Of the last layer's text feed-forward
    nothing reaches the soft tokens: its gradient is exactly zero (not absent, so that distributed training
    does not wait for it).

    Args:
        vision_dim: Dv.
        text_dim: Dt.
        vocab_size: BERT's 30,522 words and BLIP-2's [DEC].
        max_positions: longest instruction.
        **settings: of `QFormerConnector`.
    """

    reads_text = True

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        vocab_size: int = 30523,
        max_positions: int = 512,
        **settings: Any,
    ):
        super().__init__(vision_dim, text_dim, **settings)
        self.qformer.add_text_branch(vocab_size, max_positions)

    def forward(self, features: Tensor, text: Text = None, text_mask: Text = None) -> Tensor:
        """[I, N, Dv] and the instruction's token ids [I, L] -> [I, Q, Dt]; text_mask [I, L], 0 at padding.

        Raises:
            ValueError: no text.
            DataError: the instruction is longer than `max_positions`.
        """
        if text is None:
            raise ValueError("connector 'instruct_qformer' reads the instruction; give its token ids [I, L]")
        num_queries = self.query.shape[1]
        mask = torch.ones_like(text) if text_mask is None else text_mask
        mask = F.pad(mask.bool(), (num_queries, 0), value=True)  # [I, Q + L]
        hidden = self.qformer(self.query.expand(len(features), -1, -1), features, text, mask)
        return self._project(hidden[:, :num_queries])
