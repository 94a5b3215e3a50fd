"""VCD on every kind of encoder and language model that the project is tried with."""

from __future__ import annotations

import pytest
from conftest import TEXT_CONFIGS, VISION_CONFIGS, make_model, mixed_conversations

from mllm.decoding import generate


@pytest.mark.parametrize("text", TEXT_CONFIGS)
@pytest.mark.parametrize("vision", VISION_CONFIGS)
def test_batches_cache_and_alpha_zero(vision: str, text: str) -> None:
    model, processor = make_model(vision=vision, text=text)
    conversations = mixed_conversations()
    batch = processor(conversations)
    contrasted = generate(model, batch, "vcd", max_new_tokens=6)
    assert contrasted.equal(generate(model, batch, "vcd", max_new_tokens=6, use_cache=False))
    for row, messages in zip(contrasted, conversations, strict=True):
        single = generate(model, processor([messages]), "vcd", max_new_tokens=6)[0]
        assert row[: len(single)].equal(single)
    assert generate(model, batch, "vcd,alpha=0", max_new_tokens=6).equal(
        generate(model, batch, "greedy", max_new_tokens=6)
    )
    drawn = generate(model, batch, "vcd,alpha=0,do_sample=true", max_new_tokens=6, seed=3)
    assert drawn.equal(generate(model, batch, "sample", max_new_tokens=6, seed=3))
