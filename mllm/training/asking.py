"""A benchmark during training: every so many steps the model is asked a few questions.

What the questions are and how answers are scored is none of training's business: the function that does it
is handed in (`eval.during_training.Asker`, by the command line).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback

from mllm.config import EvalSection
from mllm.training.aside import aside


class Asks(Protocol):
    """Somebody who can ask a model the questions of a benchmark."""

    def check(self, section: EvalSection) -> None:
        """Raise `MllmError` where the questions or their images are not there."""

    def ask(
        self, model: Any, processor: Any, section: EvalSection, folder: Path, identity: Mapping[str, Any]
    ) -> Mapping[str, float]:
        """Numbers by name; `folder` gets the predictions, with `identity` as what the model is."""


class Asking(TrainerCallback):
    """Asks, and logs `eval/<task>/<number>`; predictions are kept under `output_dir/eval/step-N`.

    Every rank answers the same questions, because with ZeRO-3 no rank can compute without the others, and
    rank 0 keeps what it says.

    Args:
        section: the recipe's `eval`.
        asker: answers and scores.
        processor: the model's.
        log: the trainer's.
    """

    def __init__(
        self, section: EvalSection, asker: Asks, processor: Any, log: Callable[[dict[str, float]], None]
    ) -> None:
        self.section, self.asker, self.processor, self.log = section, asker, processor, log

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Ask at every multiple of `every`, and behind the last step."""
        last = state.global_step == state.max_steps
        if state.global_step % self.section.every and not last:
            return
        identity = {"run": str(args.output_dir), "step": state.global_step}
        with tempfile.TemporaryDirectory() as elsewhere, aside(model):
            folder = Path(args.output_dir) / "eval" / f"step-{state.global_step}"
            found = self.asker.ask(
                model,
                self.processor,
                self.section,
                folder if state.is_world_process_zero else Path(elsewhere),
                identity,
            )
        due = control.should_log
        self.log({f"eval/{self.section.task}/{name}": float(value) for name, value in found.items()})
        control.should_log = due  # a log counts as that of the step, whose loss would be left out
