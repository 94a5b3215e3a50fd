"""A recipe's model with shapes and no values: built, tuned and run in seconds, whatever its size.

Floating point tensors are on the meta device. Integers and booleans (token ids, masks, positions) keep
their values, because models look at them: how many placeholders there are, whether a row is padded. So the
code that runs is the code that trains, and what it would keep for the backward pass can be counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer

from mllm.config import Checkpointing
from mllm.model.parted import PartedModel
from mllm.training.flops import attention_flops, linear_flops
from mllm.training.recompute import is_dear_product

_INTEGER = ("randint", "randperm")
_BY_ARGUMENTS = ("arange", "full", "scalar_tensor")  # integers if their arguments are
_PRODUCTS = (F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.addmm)
_IN_FLOAT32 = (F.layer_norm, F.softmax, F.log_softmax, F.cross_entropy, torch.softmax, Tensor.softmax)


@dataclass
class Trace:
    """What one forward pass keeps for the backward pass, and the arithmetic of both.

    Attributes:
        outside: bytes kept outside the layers that checkpointing recomputes, logits not counted.
        layers: bytes kept inside each of those layers, where they are not recomputed.
        inputs: bytes of their inputs, which are kept where they are.
        dear: bytes in them that selective checkpointing keeps: results of products and of attention.
        logits: bytes kept of tensors as wide as the vocabulary.
        scores: how many numbers the logits are.
        predicted: positions that have logits.
        forward: FLOPs of the forward pass by part; `head` is the language model's head and what else is
            computed at labels only, and what a part spends on attention, apart from its matrices, has the
            key `<part> attention`.
        backward: FLOPs of the backward pass by part.
        again: FLOPs of computing the layers a second time.
    """

    outside: int = 0
    layers: dict[int, int] = field(default_factory=dict)
    inputs: int = 0
    dear: int = 0
    logits: int = 0
    scores: int = 0
    predicted: int = 0
    forward: dict[str, int] = field(default_factory=dict)
    backward: dict[str, int] = field(default_factory=dict)
    again: int = 0

    def kept(self, checkpointing: Checkpointing) -> int:
        """Bytes of activations when the backward pass begins, logits not counted."""
        if not checkpointing:
            return self.outside + sum(self.layers.values())
        return self.outside + self.inputs + self.dear * (checkpointing == "selective")

    def recomputed(self) -> int:
        """Bytes of the largest layer when it is computed again."""
        return max(self.layers.values(), default=0)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Make and compute tensors without values."""
    with _IntegersAreReal(), _Functions(), torch.device("meta"):
        yield


def trace_forward(model: PartedModel, batch: Mapping[str, Tensor], autocast: torch.dtype | None) -> Trace:
    """One forward pass of a model made under `shapes_only`, in training mode.

    Args:
        model: the model.
        batch: what it takes; floating point tensors lose their values.
        autocast: what mixed precision computes products in; None: in the dtype of the weights.
    """
    vocab_size = getattr(getattr(model.config, "text_config", None), "vocab_size", -1)
    counter = _Counter(model, vocab_size)
    # The model says which of its layers would be recomputed; then they are not, to see what is inside.
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for recompute in (True, False):
        for layer in layers:
            layer.gradient_checkpointing = recompute
        model.train()
        if recompute:
            counter.recomputable = {id(layer) for layer in layers if layer.training}
    saved = torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda held: held.tensor)
    inputs = {name: x.to("meta") if x.is_floating_point() else x for name, x in batch.items()}
    mode = _Functions(counter, autocast)
    # Without effect on shapes; it is there for models that look whether it is on.
    seen = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None)
    with _IntegersAreReal(), mode, torch.device("meta"), counter.watching(model), saved, seen:
        output = model(**inputs)
    if counter.vocab_size > 0:
        counter.trace.scores = output.logits.numel()
        counter.trace.predicted = output.logits.shape[:-1].numel()
    loss = output.loss  # it alone holds the graph when the backward pass begins
    del output
    counter.count_kept()
    del loss
    return counter.trace


class _IntegersAreReal(TorchDispatchMode):
    """Integers stay on the CPU; where one meets a float, the result has a shape only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        makes = "device" in kwargs or name.startswith("new_") or name.endswith("_like")
        if makes and not _dtype(name, tensors, args, kwargs).is_floating_point:
            kwargs["device"] = torch.device("cpu")
        if len({tensor.is_meta for tensor in tensors}) == 2:
            if name == "index":  # how many rows a mask takes is known
                args = (args[0], [_rows_of(index) for index in args[1]])
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


def _dtype(name: str, tensors: list[Tensor], args: Any, kwargs: Mapping[str, Any]) -> torch.dtype:
    """The dtype of what a function makes."""
    if kwargs.get("dtype") is not None:
        return kwargs["dtype"]
    if tensors:
        return tensors[0].dtype
    whole = all(not isinstance(argument, float) for argument in args)
    integer = name in _INTEGER or (name in _BY_ARGUMENTS and whole)
    return torch.int64 if integer else torch.get_default_dtype()


def _rows_of(index: Tensor | None) -> Tensor | None:
    if index is None or index.dtype != torch.bool or index.dim() != 1:
        return index
    return index.nonzero().squeeze(1)


class _Held:
    """A saved tensor, alive as long as the graph that saved it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class _Counter:
    """Notes what is kept and what is computed, and in which part and layer."""

    def __init__(self, model: PartedModel, vocab_size: int):
        self.trace, self.vocab_size = Trace(), vocab_size
        self.recomputable: set[int] = set()
        self.places: list[tuple[str, int | None]] = [("", None)]  # part, layer that can be recomputed
        own = [*model.parameters(), *model.buffers()]
        self.seen = {id_of(tensor): tensor for tensor in own}  # held, or their memory would be used again
        self.inputs: dict[int, Tensor] = {}  # of layers
        self.held: list[tuple[ref[_Held], int | None]] = []

    @contextmanager
    def watching(self, model: PartedModel) -> Iterator[None]:
        """Follow the calls of the model's parts, and of their layers that can be recomputed."""
        handles = []
        watched: list[tuple[str, Any, Any]] = [(part, module, module) for part, module in model.named_parts()]
        for part, module in model.named_parts():
            watched += [
                (part, module, x) for x in module.modules() if isinstance(x, GradientCheckpointingLayer)
            ]
        if (at_labels := getattr(model, "label_feed_forward", None)) is not None:
            watched.append(("head", at_labels.module, at_labels.module))
        for part, owner, module in watched:
            enter = partial(self._enter, part, module is not owner)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(lambda *_: self.places.pop() and None))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, part: str, is_layer: bool, module: nn.Module, args: Any, kwargs: Any) -> None:
        layer = self.places[-1][1]
        if layer is None and is_layer and id(module) in self.recomputable:
            layer = id(module)
            self.trace.layers.setdefault(layer, 0)
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and id_of(tensor) not in self.seen:
                    self.inputs[id_of(tensor)] = tensor
        self.places.append((part, layer))

    def keep(self, tensor: Tensor) -> _Held:
        """Note a tensor that autograd saves."""
        held = _Held(tensor)
        self.held.append((ref(held), self.places[-1][1]))
        return held

    def count_kept(self) -> None:
        """Count what autograd still holds; layers that the loss does not come from are let go."""
        for alive, layer in self.held:
            held = alive()
            if held is None or id_of(held.tensor) in self.seen:
                continue
            tensor, trace = held.tensor, self.trace
            self.seen[id_of(tensor)] = tensor
            size = tensor.untyped_storage().nbytes()
            if tensor.is_meta and tensor.dim() and tensor.shape[-1] == self.vocab_size:
                trace.logits += size
            elif layer is None:
                trace.outside += size
                self.inputs.pop(id_of(tensor), None)
            else:
                trace.layers[layer] += size
        self.trace.inputs = sum(tensor.untyped_storage().nbytes() for tensor in self.inputs.values())

    def keep_dear(self, *results: Tensor) -> None:
        """Note what selective checkpointing keeps, if it is in a layer with a backward pass."""
        if self.places[-1][1] is not None and results[0].requires_grad:
            self.trace.dear += sum(tensor.nbytes for tensor in results)

    def compute(self, forward: int, backward: int, kind: str = "") -> None:
        """Count arithmetic."""
        part, layer = self.places[-1]
        key = "head" if kind == "head" else part + kind
        for counts, flops in ((self.trace.forward, forward), (self.trace.backward, backward)):
            counts[key] = counts.get(key, 0) + flops
        if layer is not None and backward:
            self.trace.again += forward


def id_of(tensor: Tensor) -> int:
    """Which memory a tensor lies in; views share it."""
    return tensor.untyped_storage()._cdata


class _Functions(TorchFunctionMode):
    """Attention as the fused kernels do it, mixed precision, and a count of the arithmetic."""

    def __init__(self, counter: _Counter | None = None, autocast: torch.dtype | None = None):
        super().__init__()
        self.counter, self.autocast = counter, autocast
        self.casts: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            # These go round the dispatcher.
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func is torch.equal:  # of values that are not there, none are known to be the same
            return not any(tensor.is_meta for tensor in args) and func(*args)
        fused = func is F.scaled_dot_product_attention
        if self.autocast is not None and (fused or func in (*_PRODUCTS, *_IN_FLOAT32)):
            to = torch.float32 if func in _IN_FLOAT32 else self.autocast
            args, kwargs = tree_map_only(Tensor, lambda tensor: self._cast(tensor, to), (args, kwargs))
        if fused:
            return self._attention(*args, **kwargs)
        output = func(*args, **kwargs)
        if self.counter is not None and func in _PRODUCTS:
            self._count(self.counter, func, args, output)
        return output

    def _cast(self, tensor: Tensor, to: torch.dtype) -> Tensor:
        if not tensor.is_meta or tensor.dtype in (to, torch.float64) or not tensor.is_floating_point():
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(to)
        if id(tensor) not in self.casts:  # autocast keeps the cast weights of one forward pass
            self.casts[id(tensor)] = tensor.to(to)
        return self.casts[id(tensor)]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        # Without a mask the kernels take causality as a flag; a mask they turn into numbers, and keep.
        bias = attn_mask
        if bias is not None and not bias.is_floating_point():
            bias = torch.empty(bias.shape, dtype=query.dtype, device="meta")
        output: Tensor = _Fused.apply(query, key, value, bias)
        if self.counter is not None:
            causal = query.shape[-2] == key.shape[-2] and (is_causal or attn_mask is not None)
            rows = query.numel() // (query.shape[-1] * query.shape[-2])  # B * H
            forward = rows * attention_flops(query.shape[-2], key.shape[-2], query.shape[-1], causal)
            learns = any(tensor.requires_grad for tensor in (query, key, value))
            self.counter.compute(forward, 2 * forward * learns, " attention")
            self.counter.keep_dear(output, output.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def _count(counter: _Counter, func: Any, args: Any, output: Tensor) -> None:
        inputs, weight = args[1:3] if func is torch.addmm else args[:2]
        products = output.numel() * (weight[0].numel() if func is F.conv2d else inputs.shape[-1])
        head = func is F.linear and weight.shape[0] == counter.vocab_size
        forward = linear_flops(products)
        backward = linear_flops(products, inputs.requires_grad, weight.requires_grad) - forward
        counter.compute(forward, backward, "head" if head else "")
        if func is F.conv2d or is_dear_product(inputs.shape[-1], output.shape[-1]):
            counter.keep_dear(output)


class _Fused(torch.autograd.Function):
    """The shapes of a fused attention kernel: scores are never kept, only their normaliser a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])  # [B, H, S, D]
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)  # [B, H, S]
        ctx.save_for_backward(query, key, value, output, normaliser, bias)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, _, bias = ctx.saved_tensors
        return query, key, value, bias if bias is not None and bias.requires_grad else None
