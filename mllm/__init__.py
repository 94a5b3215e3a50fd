"""mllm: train, probe and serve multimodal LLMs.

`import mllm` registers the model with transformers' Auto classes. The command line is the one exception:
it imports torch only when a command needs it, so that `mllm --help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["MllmConfig", "MllmForConditionalGeneration", "MllmProcessor", "load"]

if TYPE_CHECKING:
    from mllm.model import MllmConfig, MllmForConditionalGeneration, MllmProcessor, load


def __getattr__(name: str) -> Any:
    if name in __all__:
        import mllm.model

        return getattr(mllm.model, name)
    raise AttributeError(f"module 'mllm' has no attribute {name!r}")


if Path(sys.argv[0] if sys.argv else "").stem != "mllm":
    import mllm.model  # noqa: F401  (registers with the Auto classes)
