"""The Q-Former against transformers', tensor by tensor and number by number; masks; the two connectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_image_processor, make_language_model, make_tokenizer, make_vision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTConfig,
)

from mllm.errors import ConfigError, DataError
from mllm.model import MllmForConditionalGeneration
from mllm.model.connectors import build_connector
from mllm.model.connectors.qformer import QFormer, QFormerConnector, image_grounded_causal_mask
from mllm.model.convert.qformer_names import bert_names, qformer_names, retrieval_names

LAYERS, WIDTH, QUERIES, VISION_DIM, TEXT_DIM, WORDS, POSITIONS = 3, 32, 5, 24, 48, 60, 12
TINY = {"num_queries": QUERIES, "width": WIDTH, "layers": LAYERS, "heads": 4, "intermediate": 64}
TEXT = {"vocab_size": WORDS, "max_positions": POSITIONS}
TEXT_MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
BOTH_MASK = torch.cat([torch.ones(2, QUERIES, dtype=torch.long), TEXT_MASK], dim=1)  # [B, Q + T]


# -- transformers' models, and ours with their weights ----------------------------------------------


def theirs(kind: str) -> Any:
    """A tiny model of transformers with random weights; norms and biases too, which it starts at 1 and 0."""
    qformer = {
        "vocab_size": WORDS,
        "max_position_embeddings": POSITIONS,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "encoder_hidden_size": VISION_DIM,
    }
    text = OPTConfig(
        vocab_size=WORDS,
        hidden_size=TEXT_DIM,
        word_embed_proj_dim=TEXT_DIM,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    vision = {"hidden_size": VISION_DIM, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 28}
    parts = {"vision_config": {**vision, "num_attention_heads": 4}, "num_query_tokens": QUERIES}
    model: Any
    if kind == "blip2":
        config = Blip2Config(qformer_config=qformer, text_config=text.to_dict(), **parts)
        model = Blip2ForConditionalGeneration(config)
    elif kind == "retrieval":
        config = Blip2Config(qformer_config={**qformer, "use_qformer_text_input": True}, **parts)
        config.image_text_hidden_size = 8
        model = Blip2ForImageTextRetrieval(config)
    else:
        config = InstructBlipConfig(qformer_config=qformer, text_config=text.to_dict(), **parts)
        model = InstructBlipForConditionalGeneration(config)
    return randomised(model)


def randomised(module: Any) -> Any:
    with torch.no_grad():
        for part in module.modules():
            for parameter in part.parameters(recurse=False):
                parameter.normal_(std=0.2)
            if isinstance(part, nn.LayerNorm):
                part.weight.add_(1)
    return module.eval()


NAMES = {
    "blip2": qformer_names(LAYERS, instruct=False),
    "retrieval": retrieval_names(LAYERS),
    "instructblip": qformer_names(LAYERS, instruct=True),
}
HEADS = ("vision_projection", "text_projection", "itm_head")  # of the retrieval model, no part of a connector


def ours(kind: str) -> Any:
    """Our connector of the same sizes; `proj` cut off where the other side has none."""
    instruct = kind != "blip2"
    sizes = TINY | (TEXT if instruct else {})
    connector = build_connector(
        {"type": "instruct_qformer" if instruct else "qformer", **sizes}, VISION_DIM, TEXT_DIM
    )
    if kind == "retrieval":
        connector.proj = nn.Identity()
    return randomised(connector)


def pair(kind: str) -> tuple[Any, Any]:
    """Their model, and our connector with its weights."""
    model, connector = theirs(kind), ours(kind)
    state = model.state_dict()
    connector.load_state_dict({mine: state[name] for name, mine in NAMES[kind].items()})
    return model, connector


def inputs() -> tuple[Tensor, Tensor]:
    """Features [B, N, Dv] and text ids [B, T]."""
    return torch.randn(2, 7, VISION_DIM), torch.randint(0, WORDS, TEXT_MASK.shape)


def assert_same(got: Tensor, want: Tensor) -> None:
    assert want.std() > 0.1  # or nothing would be compared
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


# -- parity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMES)
def test_every_tensor_has_one_counterpart(kind: str) -> None:
    model, connector = pair(kind)
    rest = ("vision_model.", "language_model.", *HEADS)
    expected = {name for name in model.state_dict() if not name.startswith(rest)}
    assert set(NAMES[kind]) == expected
    assert sorted(NAMES[kind].values()) == sorted(connector.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("kind", NAMES)
def test_the_way_back_gives_the_same_model(kind: str) -> None:
    fresh, connector = theirs(kind), ours(kind)
    mine = connector.state_dict()
    state = {name: mine[ours] for name, ours in NAMES[kind].items()}
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert not unexpected
    assert not set(missing) & set(NAMES[kind])
    features, ids = inputs()
    text = {"input_ids": ids} if kind == "instructblip" else {}
    queries = fresh.query_tokens.expand(2, -1, -1)
    want = fresh.qformer(query_embeds=queries, encoder_hidden_states=features, **text)
    got = connector.qformer(queries, features, ids if text else None)
    assert_same(got, want.last_hidden_state)


@torch.no_grad()
def test_blip2_connector() -> None:
    model, connector = pair("blip2")
    features, ids = inputs()
    queries = model.query_tokens.expand(2, -1, -1)
    hidden = model.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
    assert_same(connector(features, ids, TEXT_MASK), model.language_projection(hidden))


@torch.no_grad()
@pytest.mark.parametrize("mask", [TEXT_MASK, None], ids=["padded", "no mask"])
def test_instructblip_connector(mask: Tensor | None) -> None:
    model, connector = pair("instructblip")
    features, ids = inputs()
    hidden = model.qformer(
        input_ids=ids,
        attention_mask=None if mask is None else BOTH_MASK,
        query_embeds=model.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=features,
    ).last_hidden_state
    assert_same(connector(features, ids, mask), model.language_projection(hidden[:, :QUERIES]))


@torch.no_grad()
def test_retrieval_three_ways() -> None:
    """Queries alone and text alone (ITC), both (ITM), as Blip2ForImageTextRetrieval calls them."""
    model, connector = pair("retrieval")
    features, ids = inputs()
    queries, q = model.query_tokens.expand(2, -1, -1), connector.qformer
    alone = model.qformer(query_embeds=queries, encoder_hidden_states=features)
    assert_same(q(queries, features), alone.last_hidden_state)
    text = model.qformer(
        query_embeds=model.embeddings(input_ids=ids), query_length=0, attention_mask=TEXT_MASK
    )
    assert_same(q(None, None, ids, TEXT_MASK), text.last_hidden_state)
    both = model.qformer(
        query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
        query_length=QUERIES,
        attention_mask=BOTH_MASK,
        encoder_hidden_states=features,
    )
    assert_same(q(queries, features, ids, BOTH_MASK), both.last_hidden_state)


@torch.no_grad()
def test_text_branch_is_bert() -> None:
    config = BertConfig(
        vocab_size=WORDS,
        max_position_embeddings=POSITIONS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=64,
    )
    bert, qformer = randomised(BertModel(config, add_pooling_layer=False)), ours("retrieval").qformer
    bert.embeddings.token_type_embeddings.weight.zero_()
    names = {theirs: ours.removeprefix("qformer.") for theirs, ours in bert_names(LAYERS).items()}
    assert set(bert.state_dict()) - set(names) == {"embeddings.token_type_embeddings.weight"}
    state = bert.state_dict()
    missing, unexpected = qformer.load_state_dict({names[n]: state[n] for n in names}, strict=False)
    assert not unexpected
    assert all("cross_attention" in name or "query_mlp" in name for name in missing)
    _, ids = inputs()
    want = bert(input_ids=ids, attention_mask=TEXT_MASK).last_hidden_state
    assert_same(qformer(None, None, ids, TEXT_MASK), want)
    qformer.copy_text_mlp_to_queries()
    for layer in qformer.layers:
        for a, b in zip(layer.query_mlp.parameters(), layer.text_mlp.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a is not b


# -- sizes ------------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_sizes() -> None:
    """BLIP-2's with ViT-g and OPT-2.7B (paper: 107M); InstructBLIP's with BERT's vocabulary."""
    with torch.device("meta"):
        blip2: Any = build_connector({"type": "qformer"}, 1408, 2560)
        instruct: Any = build_connector({"type": "instruct_qformer", "vocab_size": 30522}, 1408, 4096)
        default: Any = build_connector({"type": "instruct_qformer"}, 1408, 4096)
    assert count(blip2.qformer) == 105_137_664
    assert count(blip2) == 107_130_880
    assert blip2.num_tokens(257) == 32
    assert count(instruct.qformer) == 185_659_392
    assert count(default) - count(instruct) == 768  # [DEC]


def test_blip2_weights_fit_instructblip() -> None:
    small, large = (
        {name: tensor.shape for name, tensor in ours(kind).state_dict().items()}
        for kind in ("blip2", "instructblip")
    )
    assert small.items() <= large.items()


# -- masks ------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(length=st.integers(2, POSITIONS), data=st.data())
def test_a_generated_word_sees_the_past_only(length: int, data: st.DataObject) -> None:
    torch.manual_seed(0)
    qformer = ours("retrieval").qformer
    changed = data.draw(st.integers(1, length - 1))
    queries, features = torch.randn(1, QUERIES, WIDTH), torch.randn(1, 7, VISION_DIM)
    ids = torch.randint(0, WORDS, (1, length))
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % WORDS
    mask = image_grounded_causal_mask(QUERIES, torch.ones_like(ids))
    with torch.no_grad():
        before, after, alone = (
            qformer(queries, features, ids, mask),
            qformer(queries, features, other, mask),
            qformer(queries, features),
        )
    assert torch.equal(before[:, : QUERIES + changed], after[:, : QUERIES + changed])
    assert not torch.equal(before[:, QUERIES + changed], after[:, QUERIES + changed])
    assert_same(before[:, :QUERIES], alone)  # queries are those of the pass without text
    blind = qformer(queries + 1, features, ids, mask)
    assert not torch.equal(blind[:, QUERIES], before[:, QUERIES])  # but text sees queries


def test_mask_of_padded_text() -> None:
    got = image_grounded_causal_mask(2, torch.tensor([[1, 1, 0]]))
    want = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert got.int().tolist() == [want]


@torch.no_grad()
def test_padding_of_the_instruction_changes_nothing() -> None:
    connector = ours("instructblip")
    features, ids = inputs()
    short = connector(features[1:], ids[1:, :3])
    assert_same(connector(features, ids, TEXT_MASK)[1:], short)
    assert not torch.allclose(connector(features[1:], ids[1:, 3:]), short, atol=1e-2)  # text is read


# -- training and composing -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
def test_every_parameter_learns(kind: str) -> None:
    """Every gradient is there; zero is only that of the feed-forward whose output nothing reads."""
    connector = ours(kind).train()
    features, ids = inputs()
    (connector(features, ids, TEXT_MASK) ** 2).sum().backward()
    gradients = {name: p.grad for name, p in connector.named_parameters()}
    assert all(g is not None for g in gradients.values())
    zero = {name for name, g in gradients.items() if g is not None and not g.any()}
    unread = connector.qformer.layers[-1].text_mlp
    of_unread = () if unread is None else (n for n, _ in unread.named_parameters())
    assert zero == {f"qformer.layers.{LAYERS - 1}.text_mlp.{name}" for name in of_unread}


def test_dropout_is_for_training_only() -> None:
    connector = ours("blip2")
    features, _ = inputs()
    with torch.no_grad():
        assert torch.equal(connector(features), connector(features))
        connector.train()
        assert not torch.equal(connector(features), connector(features))


def test_composed_model_gives_a_loss() -> None:
    model, processor = MllmForConditionalGeneration.from_components(
        vision_encoder=make_vision(),
        language_model=make_language_model(),
        connector={"type": "qformer", **TINY},
        tokenizer=make_tokenizer(),
        image_processor=make_image_processor(),
    )
    assert model.config.num_image_tokens == processor.num_image_tokens == QUERIES
    ids = torch.tensor([[model.config.image_token_id] * QUERIES + [5, 6, 7]])
    model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), labels=ids.clamp(max=200)).loss.backward()
    assert all(p.grad is not None for p in model.connector.parameters())


# -- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"heads": 5}, {"cross_every": 0}, {"num_queries": 0}, {"vocab_size": 9}])
def test_wrong_settings_are_named(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        build_connector({"type": "qformer", **TINY, **bad}, VISION_DIM, TEXT_DIM)


def test_wrong_text_is_named() -> None:
    features, _ = inputs()
    connector = ours("instructblip")
    with pytest.raises(ValueError, match="instruction"):
        connector(features)
    with pytest.raises(DataError, match=r"13 tokens.*12 positions"):
        connector(features, torch.zeros(2, POSITIONS + 1, dtype=torch.long))
    with pytest.raises(ValueError, match="no text branch"):
        QFormer(WIDTH, 1, 4, 64, VISION_DIM)(None, None, torch.zeros(1, 2, dtype=torch.long))


def test_queries_start_as_published() -> None:
    connector = QFormerConnector(VISION_DIM, TEXT_DIM, num_queries=64, width=256, layers=1, heads=4)
    assert connector.query.std().item() == pytest.approx(0.02, rel=0.05)
    assert connector.qformer.layers[0].attention.key.weight.std().item() == pytest.approx(0.02, rel=0.05)
