"""The head at the labels alone: the loss and every gradient of the head at all positions."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TEXT_CONFIGS, make_model
from runs import make_rows

from mllm.data.collator import Collator
from mllm.data.tokens import IGNORE
from mllm.model.label_head import head_only_at, labelled_places, next_labels


def batch_of(processor: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in Collator(processor)(make_rows(5)).items() if isinstance(v, torch.Tensor)}


def losses(model: Any, batch: dict[str, Any], items: Any = None) -> tuple[Any, dict[str, torch.Tensor]]:
    """With `items`, divided by them from the logits of all positions."""
    model.zero_grad()
    output = model(**batch)
    if items is not None:
        labels = batch["labels"] if model.config.is_encoder_decoder else next_labels(batch["labels"])
        sums = F.cross_entropy(output.logits.transpose(1, 2), labels, reduction="sum", ignore_index=IGNORE)
        output.loss = sums / items
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("items", [None, 50])
@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_loss_and_gradients_are_those_of_all_positions(text: str, items: int | None) -> None:
    model, processor = make_model(text=text)
    batch: dict[str, Any] = batch_of(processor)
    model.eval()
    want, want_grads = losses(model, batch, items)
    model.training = items is None  # nothing below it drops out; a count asks for the same
    if items:
        batch["num_items_in_batch"] = torch.tensor(items)
    got, got_grads = losses(model, batch)
    labels = batch["labels"] if model.config.is_encoder_decoder else next_labels(batch["labels"])
    labelled = int((labels != IGNORE).sum())
    assert want.logits.shape[:2] == batch["labels"].shape
    assert got.logits.shape == (1, labelled, want.logits.shape[-1])
    torch.testing.assert_close(got.logits[0], want.logits[labels != IGNORE], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
    assert got_grads.keys() == want_grads.keys()
    largest = max(grad.abs().max().item() for grad in want_grads.values())  # T5's are in the hundreds
    for name, grad in want_grads.items():
        torch.testing.assert_close(got_grads[name], grad, rtol=1e-4, atol=1e-6 * max(1.0, largest))


def test_the_head_is_called_where_nothing_is_labelled() -> None:
    """Every rank must call it, or those that do wait."""
    model, processor = make_model()
    batch = batch_of(processor)
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    output = model.train()(**batch, num_items_in_batch=torch.tensor(1))
    output.loss.backward()
    assert calls == [1]
    assert output.loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_hook_does_not_stay() -> None:
    head = torch.nn.Linear(4, 6)
    hidden = torch.randn(2, 3, 4)
    places = labelled_places(torch.tensor([[IGNORE, 1, IGNORE], [2, IGNORE, IGNORE]]))
    assert places.tolist() == [1, 3]
    want = head(hidden).flatten(0, 1)[places]
    with head_only_at(head, places):
        torch.testing.assert_close(head(hidden)[0], want)
    with pytest.raises(ZeroDivisionError), head_only_at(head, places):
        raise ZeroDivisionError
    assert head(hidden).shape == (2, 3, 6)
