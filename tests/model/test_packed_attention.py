"""Attention over packs as a GPU computes it, as far as a machine without one can tell."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import make_model
from runs import make_rows
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from mllm.data.packing import PackingCollator
from mllm.model import packed_attention
from mllm.training.recompute import checkpoint_selectively
from mllm.training.steps import model_inputs

BOUNDS = torch.tensor([0, 4, 5, 12], dtype=torch.int32)


def states(heads: int, groups: int, width: int = 16, **options: Any) -> list[Tensor]:
    """Queries, keys and values of a pack of `BOUNDS`."""
    torch.manual_seed(0)
    return [torch.randn(1, count, 12, width, **options) for count in (heads, groups, groups)]


def weights_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """What each token of a row [T, heads, width] takes from those before it: [heads, T, T]."""
    scores = torch.einsum("ihw,jhw->hij", q, k) * scale
    return scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf).softmax(-1)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Of one row [T, heads, width], from the definition."""
    return torch.einsum("hij,jhw->ihw", weights_of(q, k, scale), v)


def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[Tensor]:
    """Its gradients; autograd does not reach into an operator."""
    weights = weights_of(q, k, scale)
    of_weights = torch.einsum("ihw,jhw->hij", grad, v)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    return [
        torch.einsum("hij,jhw->ihw", of_scores, k),
        torch.einsum("hij,ihw->jhw", of_scores, q),
        torch.einsum("hij,ihw->jhw", weights, grad),
    ]


def each_row(bounds: Tensor, *tensors: Tensor, heads: int) -> Iterator[list[Tensor]]:
    """The rows of tensors [S, heads or fewer, width], with all heads."""
    full = [x.repeat_interleave(heads // x.shape[1], 1) for x in tensors]
    for start, end in pairwise(bounds.tolist()):
        yield [x[start:end] for x in full]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Flash attention's two operators on the CPU, which has none; counts the calls of either."""
    calls = [0, 0]

    def forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, scale: float | None, **window: int) -> Any:
        bounds, _, longest, _, dropout, causal, _ = args
        assert (dropout, causal, window["window_size_right"]) == (0.0, True, 0)
        assert bounds.dtype == torch.int32
        assert longest == (bounds[1:] - bounds[:-1]).max()
        calls[0] += 1
        scale = scale or q.shape[-1] ** -0.5
        out = torch.cat([attention(*row, scale) for row in each_row(bounds, q, k, v, heads=q.shape[1])])
        return out, q.new_empty(q.shape[1], len(q)), *[q.new_empty(0)] * 3

    def backward(grad: Tensor, *args: Any, scale: float | None, **window: int) -> Any:
        q, k, v, _, _, bounds, *_ = args
        calls[1] += 1
        scale = scale or q.shape[-1] ** -0.5
        rows = each_row(bounds, grad, q, k, v, heads=q.shape[1])
        grads = zip(*(attention_backward(*row, scale) for row in rows), strict=True)
        whole = (torch.cat(parts) for parts in grads)  # [S, heads, width] each
        return tuple(g.unflatten(1, (x.shape[1], -1)).sum(2) for g, x in zip(whole, (q, k, v), strict=True))

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    monkeypatch.setattr(packed_attention, "runs_varlen", lambda query, value: True)
    yield calls
    library._destroy()


@pytest.mark.parametrize("longest", [None, 7])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
def test_variable_length_is_row_by_row(
    kernels: list[int], monkeypatch: pytest.MonkeyPatch, heads: int, groups: int, longest: int | None
) -> None:
    found = []
    for varlen_runs in (True, False):
        monkeypatch.setattr(packed_attention, "runs_varlen", lambda q, v, runs=varlen_runs: runs)
        inputs = states(heads, groups, requires_grad=True)
        module = nn.Module()
        module.num_key_value_groups = heads // groups  # type: ignore[assignment]
        output, _ = packed_attention.packed_attention(
            module, *inputs, None, cu_seq_lens_q=BOUNDS, max_length_q=longest, scaling=0.3
        )
        output.square().sum().backward()
        found.append([output, *(x.grad for x in inputs)])
    assert kernels == [1, 1]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_selective_checkpointing_keeps_it(kernels: list[int]) -> None:
    model, processor = make_model()
    model.language_model.set_attn_implementation("packed")
    batch = model_inputs(PackingCollator(processor)(make_rows(4)), torch.device("cpu"))
    model.train()
    found = []
    for select in (False, True):
        if select:
            checkpoint_selectively(model)
            model.train()
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    layers = model.config.text_config.num_hidden_layers
    assert kernels == [2 * layers, 2 * layers]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def older(query: Tensor, *args: Any, scale: float | None = None, window_size: Any = (-1, -1)) -> Tensor:
    """PyTorch 2.11's, which takes grouped heads and no word about them."""
    assert window_size == (-1, 0)
    return query


@pytest.mark.parametrize("known", [varlen.varlen_attn, older])
def test_on_a_gpu_in_half_precision(monkeypatch: pytest.MonkeyPatch, known: Any) -> None:
    """Tensors that have no numbers, but a device."""
    monkeypatch.setattr(varlen, "varlen_attn", known)
    monkeypatch.setattr(packed_attention, "_OPTIONS", packed_attention._varlen_options())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with FakeTensorMode() as mode, torch.no_grad():
        inputs = states(4, 2, device="cuda", dtype=torch.bfloat16)
        bounds = mode.from_tensor(BOUNDS)
        found, _ = packed_attention.packed_attention(
            nn.Module(), *inputs, None, cu_seq_lens_q=bounds, max_length_q=7, dropout=0.0
        )
    assert (found.shape, found.device.type, found.dtype) == ((1, 12, 4, 16), "cuda", torch.bfloat16)


@pytest.mark.parametrize(
    ("width", "dtype", "capability", "options"),
    [
        (12, torch.bfloat16, (9, 0), {"window_size"}),  # no eights
        (264, torch.bfloat16, (9, 0), {"window_size"}),
        (16, torch.float32, (9, 0), {"window_size"}),
        (16, torch.float16, (7, 5), {"window_size"}),  # Turing
        (16, torch.bfloat16, (9, 0), {"is_causal"}),  # PyTorch 2.10
        (16, torch.bfloat16, (9, 0), set()),  # and before
    ],
)
def test_what_its_kernels_do_not_know(
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    options: set[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(packed_attention, "_OPTIONS", frozenset(options))
    with FakeTensorMode():
        query, _, value = states(4, 4, width, device="cuda", dtype=dtype)
        assert not packed_attention.runs_varlen(query, value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(packed_attention, "_OPTIONS", frozenset({"window_size"}))
    with FakeTensorMode():
        query, _, value = states(4, 4, 80, device="cuda", dtype=torch.float16)
        assert packed_attention.runs_varlen(query, value)


def test_on_a_gpu_packs_of_all_lengths_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in one graph: nothing in it asks the device for a number."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    graphs = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=keep, dynamic=True, fullgraph=True)
    def attend(query: Tensor, key: Tensor, bounds: Tensor, longest: int) -> Tensor:
        options: Any = {"cu_seq_lens_q": bounds, "max_length_q": longest}
        return packed_attention.packed_attention(nn.Module(), query + 1, key, key, None, **options)[0]

    with FakeTensorMode(), torch.no_grad():
        for length in (10, 14, 23):
            query, key = (
                torch.empty(1, heads, length, 16, device="cuda", dtype=torch.bfloat16) for heads in (4, 2)
            )
            bounds = torch.tensor([0, 4, length], device="cuda", dtype=torch.int32)
            assert attend(query, key, bounds, length - 4).shape == (1, length, 4, 16)
    assert len(graphs) == 1
