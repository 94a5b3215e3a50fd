"""New tokens: words of their own in the prompt, learnt with any tuning of the language model, and saved."""

from pathlib import Path

import pytest
import torch
from conftest import make_model, mixed_conversations, save_parts
from runs import logits_of

import mllm
from mllm.config import TuneSection
from mllm.data.schema import assistant, user
from mllm.errors import ConfigError
from mllm.model import MllmForConditionalGeneration
from mllm.model.added_tokens import expand
from mllm.model.checkpoint import save
from mllm.training.tuning import apply_tuning

TOKENS = ["<p{-2..2}>", "<c{0..1}>"]


def test_patterns_are_ranges() -> None:
    assert expand(TOKENS) == ["<p-2>", "<p-1>", "<p0>", "<p1>", "<p2>", "<c0>", "<c1>"]
    for wrong in (["<c{3..1}>"], ["a", "a"], [""]):
        with pytest.raises(ConfigError, match=r"model\.added_tokens"):
            expand(wrong)


def test_an_added_token_is_one_id_in_questions_and_answers() -> None:
    _, processor = make_model(added_tokens=TOKENS)
    row = processor.encode([user("hello <c1>"), assistant("<p-2> fox <p2>")])
    for token, times in (("<c1>", 1), ("<p-2>", 1), ("<p2>", 1), ("<p0>", 0)):
        assert row.input_ids.count(processor.tokenizer.convert_tokens_to_ids(token)) == times
    assert processor.tokenizer.convert_tokens_to_ids("<p2>") in row.labels


@pytest.mark.parametrize("text", ["llama", "gpt2"])  # of its own head, and tied to the embedding
def test_the_model_grows_and_keeps_what_it_said(text: str) -> None:
    plain, processor = make_model(text=text)
    grown, _ = make_model(text=text, added_tokens=TOKENS)
    grown.connector.load_state_dict(plain.connector.state_dict())  # growing draws random numbers
    rows = plain.config.text_config.vocab_size
    assert grown.get_input_embeddings().weight.shape[0] == grown.config.text_config.vocab_size == rows + 7
    with torch.no_grad():
        batch = processor(mixed_conversations())
        old = plain(**batch).logits
        ids = batch["input_ids"].masked_fill(
            batch["input_ids"] == plain.config.image_token_id, grown.config.image_token_id
        )
        new = grown(**{**batch, "input_ids": ids}).logits
    torch.testing.assert_close(new[..., :rows], old, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tuning", ["lora", "full", "adapter"])
def test_new_rows_learn_and_are_saved(tuning: str, tmp_path: Path) -> None:
    parts = save_parts(tmp_path / "parts")
    model, processor = MllmForConditionalGeneration.from_components(**parts, added_tokens=TOKENS)
    apply_tuning(model, TuneSection.model_validate({"language_model": tuning}))
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    assert all(weight.requires_grad for weight in ends)
    with torch.no_grad():
        ends[0][-1] += 1
        ends[1][-1] += 1
    save(model.eval(), processor, tmp_path / "saved")
    loaded, loaded_processor = mllm.load(tmp_path / "saved")
    assert torch.equal(logits_of(model, processor), logits_of(loaded, loaded_processor))
    assert loaded_processor.tokenizer.convert_tokens_to_ids(
        "<c1>"
    ) == processor.tokenizer.convert_tokens_to_ids("<c1>")
