"""The one decode argument: text -> settings -> record, and what is refused."""

import json
from dataclasses import FrozenInstanceError

import pytest

from mllm.decoding import DECODERS, Greedy, Sample, Vcd, describe, parse_decode
from mllm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("greedy", Greedy()),
        ("sample", Sample(temperature=1.0, top_p=1.0, top_k=0)),
        ("sample, temperature = 0.7, top_k=50", Sample(temperature=0.7, top_k=50)),
        ("vcd", Vcd(1.0, 0.1, 500, 0, False)),
        ("vcd,alpha=0.5,do_sample=true,noise_seed=3", Vcd(0.5, noise_seed=3, do_sample=True)),
        ("vcd,do_sample=False,noise_step=0,beta=1", Vcd(beta=1.0, noise_step=0)),
    ],
)
def test_text_is_read(text, expected):
    assert parse_decode(text) == expected


def test_a_decoder_is_returned_as_it_is():
    decoder = Vcd(alpha=2.0)
    assert parse_decode(decoder) is decoder
    with pytest.raises(FrozenInstanceError):
        decoder.alpha = 3.0


@pytest.mark.parametrize("name", DECODERS)
def test_record_says_every_setting(name):
    decoder = DECODERS[name]()
    record = json.loads(json.dumps(describe(decoder)))
    assert record.pop("name") == name
    text = ",".join([name, *(f"{key}={value}" for key, value in record.items())])
    if not (name == "vcd" and record["do_sample"]):
        assert parse_decode(text) == decoder


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vdc", "nearest: vcd"),
        ("beam", "beams"),
        ("", "known: greedy, sample, vcd"),
        ("vcd,alpa=1", "nearest: alpha"),
        ("vcd,num_beams=4", "beams"),
        ("greedy,alpha=1", "unknown setting 'alpha'"),
        ("vcd,alpha=1,alpha=2", "twice"),
        ("vcd,alpha", "alpha='' must be a number"),
        ("vcd,alpha=much", "alpha='much' must be a number"),
        ("vcd,noise_step=1.5", "noise_step='1.5' must be a whole number"),
        ("vcd,do_sample=1", "true or false"),
    ],
)
def test_text_that_says_nothing_is_refused(text, says):
    with pytest.raises(ConfigError, match=says) as error:
        parse_decode(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("decoder", "values"),
    [
        (Vcd, {"alpha": -0.1}),
        (Vcd, {"alpha": float("nan")}),
        (Vcd, {"alpha": float("inf")}),
        (Vcd, {"beta": -0.1}),
        (Vcd, {"beta": 1.1}),
        (Vcd, {"noise_step": -1}),
        (Vcd, {"noise_step": 1000}),
        (Vcd, {"noise_step": 5.5}),
        (Vcd, {"temperature": 0.5}),
        (Vcd, {"top_p": 0.9}),
        (Vcd, {"top_k": 9}),
        (Vcd, {"temperature": 0.0, "do_sample": True}),
        (Sample, {"temperature": 0.0}),
        (Sample, {"temperature": float("inf")}),
        (Sample, {"top_p": 0.0}),
        (Sample, {"top_p": 1.5}),
        (Sample, {"top_k": -1}),
        (Sample, {"top_k": 2.5}),
    ],
)
def test_settings_out_of_range_are_refused(decoder, values):
    with pytest.raises(ConfigError, match=next(iter(values))) as error:
        decoder(**values)
    assert decoder.name in str(error.value)
