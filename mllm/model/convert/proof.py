"""Do two models compute the same, and do two processors prepare the same? Measured on real prompts.

Everything is compared in float32, one prompt at a time: padding and rounding would blur the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from mllm.data.schema import Message, image_part, text_part
from mllm.errors import CheckpointError
from mllm.model.parted import fixed_ids

TOLERANCE = 1e-5  # of logits, relative to the largest one, or to 1
# Everything that a published generation configuration may ask for beyond the likeliest token is undone.
GREEDY = {
    "max_new_tokens": 8,
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}


@dataclass(frozen=True)
class Observed:
    """What a model makes of one prompt: logits [S, V] and the ids of its answer."""

    logits: torch.Tensor
    answer: list[int]


@dataclass(frozen=True)
class Proof:
    """What was measured.

    Attributes:
        difference: largest difference of two logits, relative to the largest logit.
        answered: greedy tokens that both sides agree on, over all prompts.
        notes: how the processors differ, one sentence each.
    """

    difference: float
    answered: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line, and one for each note."""
        equal = f"logits differ by {self.difference:.1e} of their size"
        equal += f", {self.answered} greedy tokens agree" if self.answered else ""
        return "\n".join([equal, *(f"note: {note}" for note in self.notes)])


def questions() -> list[list[Message]]:
    """Two questions, about a long picture and about one that is smaller than any encoder's input."""
    asked = [("What is in the picture?", _picture(901, 333)), ("Describe what you see.", _picture(37, 101))]
    # Without the line break that LLaVA has behind an image: BLIP-2's prompts have none.
    return [[{"role": "user", "content": [image_part(picture), text_part(text)]}] for text, picture in asked]


def _picture(width: int, height: int) -> Image.Image:
    size = (width, height)
    fractal = Image.effect_mandelbrot(size, (-2.0, -1.0, 1.0, 1.0), 50)
    return Image.merge(
        "RGB", [fractal, Image.linear_gradient("L").resize(size), Image.radial_gradient("L").resize(size)]
    )


def prompts(processor: Any, text_config: Any) -> list[dict[str, torch.Tensor]]:
    """The questions as our model takes them; an encoder-decoder also gets the beginning of an answer."""
    batches = [dict(processor([messages])) for messages in questions()]
    if text_config.is_encoder_decoder:
        start = text_config.decoder_start_token_id
        begun = torch.cat([torch.tensor([start]), fixed_ids(text_config.vocab_size, start, 4)])
        batches = [{**batch, "decoder_input_ids": begun[None]} for batch in batches]
    return batches


@torch.no_grad()
def observe(model: Any, batches: Sequence[Mapping[str, torch.Tensor]], image_token_id: int) -> list[Observed]:
    """Run the prompts. The model is turned to float32 and to evaluation."""
    model.float().eval()
    seen = []
    for batch in batches:
        logits = model(**batch).logits[0]
        prompt = {name: tensor for name, tensor in batch.items() if name != "decoder_input_ids"}
        answer = model.generate(**prompt, **GREEDY, suppress_tokens=[image_token_id])[0].tolist()
        begins = 1 if "decoder_input_ids" in batch else batch["input_ids"].shape[1]
        seen.append(Observed(logits, answer[begins:]))
    return seen


def compare(before: Sequence[Observed], after: Sequence[Observed]) -> tuple[float, int, bool]:
    """(difference relative to the largest logit, greedy tokens compared, whether they are the same)."""
    differences, answered, same = [], 0, True
    for one, two in zip(before, after, strict=True):
        width = min(one.logits.shape[-1], two.logits.shape[-1])  # an export may have added a row
        a, b = one.logits[:, :width], two.logits[:, :width]
        differences.append((a - b).abs().max() / a.abs().max().clamp(min=1))
        # Two models may end an answer at different tokens; up to the first of them they must agree.
        length = min(len(one.answer), len(two.answer))
        same &= one.answer[:length] == two.answer[:length]
        answered += length
    return float(torch.stack(differences).max()), answered, same


def prove(before: Sequence[Observed], after: Sequence[Observed], what: str) -> Proof:
    """Compare two models' results on the same prompts.

    Raises:
        CheckpointError: they differ by more than `TOLERANCE`, or answer with other tokens.
    """
    difference, answered, same = compare(before, after)
    proof = Proof(difference, answered)
    if not (same and proof.difference <= TOLERANCE):  # also catches NaN
        answers = "the same" if same else "other"
        raise CheckpointError(
            f"{what}: the two sides do not compute the same: logits differ by {proof.difference:.2g} "
            f"of their size (allowed {TOLERANCE:.0e}), greedy tokens are {answers}; nothing was written"
        )
    return proof


def compare_inputs(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], image_token_id: int, step: float
) -> list[str]:
    """What two processors made of one question: sentences about what differs, empty where nothing does.

    Args:
        ours, theirs: batches under the same names.
        image_token_id: the placeholder.
        step: one grey level in normalised pixels, the most that rounding may move one.

    Raises:
        CheckpointError: pixels, or the number of placeholders, differ: the stock model would see another
            image than ours, or fail.
    """
    pixels, other = ours["pixel_values"], theirs["pixel_values"]
    if pixels.shape != other.shape:
        raise CheckpointError(
            f"the processors see different images, of {list(pixels.shape)} and {list(other.shape)}"
        )
    apart = float((pixels - other).abs().max())
    if apart > step:
        raise CheckpointError(f"the processors see different images, pixels are up to {apart:.2g} apart")
    counts = [int((batch["input_ids"] == image_token_id).sum()) for batch in (ours, theirs)]
    if counts[0] != counts[1]:
        raise CheckpointError(
            f"an image has {counts[0]} placeholders in our prompt, {counts[1]} in the other"
        )
    notes = ["pixels differ, by less than a grey level"] if apart else []
    return notes + [
        f"transformers' processor cuts the same prompt into other {name}"
        for name in ("input_ids", "instruction_ids")
        if name in ours and not torch.equal(ours[name], theirs[name])
    ]
