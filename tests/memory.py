"""How many bytes of tensors a process holds at most while a block runs, where no device counts them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Counts memory as it is taken and given back; what views share, once.

    Args:
        leave_out: memory that is not of the matter, by `held()`.
    """

    def __init__(self, leave_out: Collection[int] = ()):
        super().__init__()
        self.now = self.peak = 0
        self.leave_out = leave_out
        self.known: dict[int, Any] = {}
        for tensor in tensors():
            self.note(tensor)

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place in self.known or place in self.leave_out:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self.known[place] = weakref.finalize(storage, self.gone, place, size)

    def gone(self, place: int, size: int) -> None:
        del self.known[place]
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self.note(leaf)
        return output


def tensors() -> list[torch.Tensor]:
    """All that there are."""
    gc.collect()
    found = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return [x for x in found if not x.is_meta and x.layout == torch.strided]


def held() -> set[int]:
    """Memory that is taken now."""
    return {tensor.untyped_storage()._cdata for tensor in tensors()}
