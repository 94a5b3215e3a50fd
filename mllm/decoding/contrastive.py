"""Visual contrastive decoding (VCD, arXiv 2311.16922): what the image says beyond a noised image.

Both branches are rows of one batch, [clean; noised], so that a step is one forward of 2B rows with
one KV cache. Where memory traffic of the weights rules, that costs little more than B rows.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllm.decoding.noise import NUM_STEPS, add_noise
from mllm.decoding.plain import Decoder, Greedy, Sample, check_sampling
from mllm.errors import ConfigError

Contrast = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Vcd(Decoder):
    """Contrast with the noised image; the defaults are the paper's, greedy unless `do_sample`.

    `alpha` is the weight of the contrast. `beta` is the plausibility cut: tokens less likely than
    beta times the likeliest, seen clean, are out (0: none, 1: all but the likeliest).
    `noise_step` 0..999 is how far the image is noised, `noise_seed` fixes the noise.
    `alpha=0` means no contrast and no cut: it decodes token for token as `greedy` or `sample` do.
    Rows without an image have two equal branches: for them only the cut is left.
    """

    name: ClassVar[str] = "vcd"
    refuses: ClassVar[Mapping[str, str]] = {
        "inputs_embeds": "the image in it can no longer be noised; pass input_ids and pixel_values",
        "past_key_values": "it holds the clean branch only; pass the whole prompt",
        "cache": "it holds the clean branch only; pass the whole prompt",
        "mm_encoder_outputs": "the image in it can no longer be noised; pass pixel_values",
        "guidance_scale": "it is a second contrast with a cache of its own",
        "prefill_chunk_size": "both branches are prefilled in one forward",
    }
    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    noise_seed: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        finite = math.isfinite(self.alpha)
        self.require(finite and self.alpha >= 0, "alpha", "it must be 0 (no contrast) or above")
        self.require(0 <= self.beta <= 1, "beta", "it must lie in 0..1")
        steps, whole = range(NUM_STEPS), isinstance(self.noise_step, int)
        self.require(whole and self.noise_step in steps, "noise_step", "it must be one of 0..999")
        check_sampling(self)
        for setting in ("temperature", "top_p", "top_k"):
            used = self.do_sample or getattr(self, setting) == getattr(Sample, setting)
            self.require(used, setting, "it has no effect without do_sample=true")

    @property
    def plain(self) -> Decoder:
        """How a token is chosen from the contrasted scores."""
        sample = Sample(self.temperature, self.top_p, self.top_k)
        return sample if self.do_sample else Greedy()

    def generate_kwargs(self, model: Any, inputs: dict[str, Any], streamer: Any) -> dict[str, Any]:
        """Both branches as one batch, and the search that contrasts them."""
        noise = partial(add_noise, step=self.noise_step, seed=self.noise_seed)
        search = partial(
            contrastive_search,
            contrast=partial(contrast, alpha=self.alpha, beta=self.beta),
            streamer=streamer,
        )
        # The streamer goes to the search alone: `generate` would show it the prompt of 2B rows, and
        # does not pass it on to a custom search.
        plain = self.plain.generate_kwargs(model, two_branches(inputs, noise), streamer=None)
        return {**plain, "custom_generate": search}


def contrast(clean: Tensor, noised: Tensor, alpha: float, beta: float) -> Tensor:
    """Return (1 + alpha) clean - alpha noised, -inf where clean < max(clean) + log(beta).

    The logits are [..., V]. The cut is on the raw clean logits, ahead of any warper, whose
    temperature would move it. `alpha=0` returns `clean` untouched, without the cut.
    """
    if alpha == 0:
        return clean
    log_beta = math.log(beta) if beta > 0 else -math.inf
    # Clamped to the lowest finite number, the cut also holds what the model itself ruled out:
    # (1 + alpha) * -inf - alpha * -inf would be NaN.
    lowest = torch.finfo(clean.dtype).min
    cutoff = (clean.amax(-1, keepdim=True) + log_beta).clamp_min(lowest)
    return ((1 + alpha) * clean - alpha * noised).masked_fill(clean < cutoff, -math.inf)


def two_branches(inputs: dict[str, Any], disturb: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return `inputs` with each tensor twice along its first axis, images disturbed in the second.

    Doubled ahead of `generate`, so that masks, position ids, vision features and cache are prepared
    for 2B rows by transformers itself, whatever the model. Without `pixel_values` both are equal.
    """
    pixels = inputs.get("pixel_values")
    if pixels is not None and pixels.ndim < 4:
        shape = list(pixels.shape)
        raise ConfigError(f"decode 'vcd': pixel_values must be [I, C, H, W], these are {shape}")
    doubled = {
        name: torch.cat([value, value]) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    for name in ("pixel_values", "pixel_values_high"):
        if inputs.get(name) is not None:
            doubled[name] = torch.cat([inputs[name], disturb(inputs[name])])
    return doubled


def contrastive_search(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    contrast: Contrast,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor:
    """Decode rows [clean; other] [2B, S] in step and return the B clean ones, [B, S + T].

    A `custom_generate` of transformers. Each step contrasts the raw logits of the branches, then
    applies `logits_processor` (processors, then warpers), chooses one token per pair and appends it
    to both. A finished row goes on with padding.

    `generate` keeps arguments that this signature names for itself: none of its own may be among
    them, or it would not see it.
    """
    rows = input_ids.shape[0] // 2
    pad, cached = generation_config.pad_token_id, model_kwargs["use_cache"]
    unfinished = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
    if streamer is not None:
        streamer.put(input_ids[:rows].cpu())

    prefill = True
    while unfinished.any():
        outputs = model(
            **model.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=1 if cached and not prefill else None,
                is_first_iteration=prefill,
                **model_kwargs,
            ),
            return_dict=True,
        )
        model_kwargs = model._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        prefill = False

        clean, other = outputs.logits[:, -1].float().to(input_ids.device).chunk(2)
        # Processors hold state for the 2B rows that `generate` knows of, so they are shown all.
        scores = logits_processor(input_ids, contrast(clean, other).repeat(2, 1))[:rows]
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if pad is not None:
            tokens = torch.where(unfinished, tokens, pad)

        input_ids = torch.cat([input_ids, tokens.repeat(2)[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids[:rows], None)
        if streamer is not None:
            streamer.put(tokens.cpu())

    if streamer is not None:
        streamer.end()
    return input_ids[:rows]
