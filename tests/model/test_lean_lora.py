"""The fused LoRA layer computes what PEFT's own does, and leaves to it what it does not know."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn

from mllm.model.adapters import inject
from mllm.model.lean_lora import LeanLora


def two_layers(**settings: Any) -> tuple[nn.Sequential, nn.Sequential]:
    """The same adapted layer as ours and as PEFT's."""
    torch.manual_seed(0)
    ours, theirs = nn.Sequential(nn.Linear(24, 40)), nn.Sequential(nn.Linear(24, 40))
    theirs.load_state_dict(ours.state_dict())
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "lora_dropout": 0.0, **settings}
    inject(ours, "part", settings, ["0"])
    plain = {key: value for key, value in settings.items() if key != "peft_type"}
    inject_adapter_in_model(LoraConfig(**plain, target_modules=["0"]), theirs)
    nn.init.normal_(ours[0].lora_B["default"].weight)
    theirs.load_state_dict(ours.state_dict())
    assert type(ours[0]) is LeanLora
    assert type(theirs[0]) is Linear
    return ours, theirs


def both(ours: nn.Module, theirs: nn.Module, inputs: torch.Tensor) -> None:
    results = []
    for layer in (ours, theirs):
        x = inputs.clone().requires_grad_()
        torch.manual_seed(1)
        output = layer(x)
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 7, 24)])
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}, {"use_dora": True}], ids=str
)
def test_like_peft(settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    ours, theirs = two_layers(**settings)
    if len(shape) == 1:
        shape = (1, *shape)
    both(ours, theirs, torch.randn(shape))


def test_merged_and_switched_off() -> None:
    ours, theirs = two_layers()
    x = torch.randn(3, 24)
    apart = ours(x)
    for layer in (ours, theirs):
        layer[0].merge()
    torch.testing.assert_close(ours(x), apart)
    torch.testing.assert_close(ours(x), theirs(x))
    for layer in (ours, theirs):
        layer[0].unmerge()
        layer[0].enable_adapters(False)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_frozen_weights_in_half_precision(autocast: bool) -> None:
    ours, theirs = two_layers()
    for layer in (ours, theirs):
        layer[0].base_layer.to(torch.bfloat16)
    x = torch.randn(2, 5, 24).to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, want = ours(x), theirs(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.float(), want.float(), rtol=0.02, atol=0.05)
