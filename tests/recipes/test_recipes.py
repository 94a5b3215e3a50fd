"""Every shipped recipe works: it builds, trains, generates, saves and loads, with tiny parts."""

from typing import Any

import pytest
import torch
from conftest import mixed_conversations
from tiny_recipes import TinyWorld
from transformers import TrainerCallback

import mllm
from mllm.config import load_recipe, shipped_recipes
from mllm.data.schema import user
from mllm.model import MllmForConditionalGeneration
from mllm.model.parted import PartedModel
from mllm.training.train import train

RECIPES = [name for name in shipped_recipes() if not name.startswith("quickstart/")]
SYSTEMS = {name.split("/")[0] for name in RECIPES}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("recipes") / "world")


class Watch(TrainerCallback):
    """Parameters before the first step and behind the last, and which of them got a gradient."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.declared = {name for name, p in model.named_parameters() if p.requires_grad}
        self.with_gradient: set[str] = set()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.with_gradient |= {name for name, grad in gradients.items() if grad.abs().max() > 0}

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.model = model
        self.changed = {
            name for name, p in model.named_parameters() if not torch.equal(p.detach(), self.before[name])
        }


def test_the_recipes_are_those_promised() -> None:
    assert (len(RECIPES), len(SYSTEMS)) == (34, 18)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_as_it_is(name: str) -> None:
    """The sizes that are published, before anything is made small."""
    config = load_recipe(name)
    assert config.train.output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_works(name: str, world: TinyWorld) -> None:
    config = world.shrink(name)
    watch = Watch()
    output = train(config, callbacks=[watch])
    world.trained.setdefault(f"runs/{name}", output)

    # Exactly what is declared changes; a declared parameter stays only where its gradient is exactly zero.
    assert watch.changed == watch.with_gradient
    assert watch.changed <= watch.declared
    for part, _ in watch.model.named_parts():
        tuned = {p for p in watch.declared if p.startswith(f"{part}.")}
        assert bool(tuned) == bool(tuned & watch.changed), part
        declared = getattr(config.tune, part) != "frozen" or any(
            place.split(".")[0] == part for place, how in config.tune.overrides.items() if how == "full"
        )
        assert bool(tuned) == declared, part

    loaded, processor = mllm.load(output)
    same_model(watch.model.eval(), loaded)
    if isinstance(loaded, MllmForConditionalGeneration):
        generates(loaded, processor)


def same_model(trained: PartedModel, loaded: PartedModel) -> None:
    with torch.no_grad():
        want, got = (model.probe_logits(**model.probe_inputs()) for model in (trained, loaded))
    # Relative to the largest: kernels round differently where a tensor's memory is aligned differently.
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    assert {name for name, _ in trained.named_parameters()} == {name for name, _ in loaded.named_parameters()}


def generates(model: MllmForConditionalGeneration, processor: Any) -> None:
    """Cached is uncached, and a batch is its rows one by one."""
    # Text alone is no prompt for a template that shows images only.
    conversations = [[user("hello", *_images(c))] for c in mixed_conversations() if _images(c)]
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    batch = processor(conversations)
    tokens = model.generate(**batch, **arguments)
    assert torch.equal(tokens, model.generate(**batch, **arguments, use_cache=False))
    for row, conversation in enumerate(conversations):
        single = model.generate(**processor([conversation]), **arguments)
        assert torch.equal(single[0, -5:], tokens[row, -5:]), row


def _images(conversation: Any) -> list[Any]:
    return [part["image"] for part in conversation[0]["content"] if part["type"] == "image"]
