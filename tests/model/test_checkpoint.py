"""Every checkpoint reloads to the same model, bit for bit, or says in one line why it cannot."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_vision
from peft import PeftModel
from runs import TUNINGS, logits_of, make_world, run_config, tune
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import mllm
from mllm.config import TuneSection
from mllm.errors import CheckpointError
from mllm.model import MllmProcessor
from mllm.model.adapters import is_adapter, merge_adapters
from mllm.model.checkpoint import MANIFEST, finish_save, manifest_hash, save
from mllm.model.probe import check_probe, probe
from mllm.training.build import build
from mllm.training.train import train
from mllm.training.tuning import apply_tuning

STEPS = 3
# The feature layer is the last but one, and CLIP's final norm only feeds the pooled output.
UNREACHED = re.compile(r"vision_encoder\..*(layers\.2\.|post_layernorm)")
WEIGHTS, ADAPTER = "model.safetensors", "adapter/adapter_model.safetensors"


class LogitsAtSave(TrainerCallback):
    """What the model in memory computed at every save."""

    def __init__(self) -> None:
        self.logits: dict[int, torch.Tensor] = {}
        self.processor: Any = None

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.processor is None:
            self.processor = MllmProcessor.from_pretrained(Path(args.output_dir) / "checkpoint-1")
        self.logits[state.global_step] = logits_of(model, self.processor)


@dataclass(frozen=True)
class Run:
    name: str
    world: Path
    output: Path
    logits: dict[int, torch.Tensor]

    @property
    def parts(self) -> dict[str, str]:
        return dict(zip(("vision_encoder", "connector", "language_model"), TUNINGS[self.name], strict=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run_of(world: Path) -> Callable[[str], Run]:
    """A run of each tuning with a save at every step, made when it is first asked for."""
    made: dict[str, Run] = {}

    def get(name: str) -> Run:
        if name not in made:
            spy = LogitsAtSave()
            config = run_config(
                world, world / "runs" / name, TUNINGS[name], save_steps=1, max_steps=STEPS, learning_rate=1e-2
            )
            made[name] = Run(name, world, train(config, callbacks=[spy]), spy.logits)
        return made[name]

    return get


@pytest.fixture
def copy_of(run_of: Callable[[str], Run], tmp_path: Path) -> Callable[[str], Path]:
    """A run's final checkpoint, copied so that a test may spoil it."""

    def get(name: str) -> Path:
        source, target = run_of(name).output, tmp_path / name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint-*"))
        return target

    return get


def logits_at(path: Path, **kwargs: Any) -> torch.Tensor:
    return logits_of(*mllm.load(path, **kwargs))


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# -- every save reloads -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TUNINGS)
def test_every_checkpoint_reloads_bit_for_bit(run_of: Callable[[str], Run], name: str) -> None:
    run = run_of(name)
    assert sorted(run.logits) == [1, 2, 3]
    for step, logits in run.logits.items():
        assert torch.equal(logits_at(run.output / f"checkpoint-{step}"), logits), step
    assert torch.equal(logits_at(run.output), run.logits[STEPS])
    assert not torch.equal(run.logits[1], run.logits[2]), "the run did not train"


@pytest.mark.parametrize("name", ["all", "lora_llm_vision"])
def test_an_intermediate_checkpoint_is_a_run_stopped_there(
    run_of: Callable[[str], Run], world: Path, tmp_path: Path, name: str
) -> None:
    stopped = train(run_config(world, tmp_path / "x", TUNINGS[name], max_steps=2, learning_rate=1e-2))
    assert torch.equal(logits_at(stopped), logits_at(run_of(name).output / "checkpoint-2"))


@pytest.mark.parametrize("name", TUNINGS)
def test_only_what_differs_from_the_bases_is_in_the_file(run_of: Callable[[str], Run], name: str) -> None:
    run = run_of(name)
    saved = load_file(run.output / WEIGHTS)
    model, _ = build(run_config(run.world, run.output, TUNINGS[name]).model)
    reachable = {
        part: {n for n, _ in model.named_parameters() if n.startswith(part) and not UNREACHED.match(n)}
        for part in run.parts
    }
    want = {n for part, tuning in run.parts.items() if tuning == "full" for n in reachable[part]}
    want |= reachable["connector"]  # it has no base model
    assert set(saved) == want
    manifest = json.loads((run.output / MANIFEST).read_text())
    # The language model is saved whole when it is tuned in full; a vision encoder keeps unreached layers.
    assert set(manifest["base"]) == {"vision_encoder"} | (
        {"language_model"} if run.parts["language_model"] != "full" else set()
    )
    lora = {part for part, tuning in run.parts.items() if tuning == "lora"}
    assert {n.split(".")[0] for n in manifest["adapter"]} == lora
    assert (run.output / "adapter").is_dir() == bool(lora)


def test_the_manifest_tells_of_the_run(run_of: Callable[[str], Run]) -> None:
    manifest = json.loads((run_of("lora_llm").output / "checkpoint-2" / MANIFEST).read_text())
    assert manifest["stage"] == "instruct"
    assert manifest["step"] == 2
    assert manifest["tune"]["language_model"] == "lora"
    assert manifest["data"]["rows"] == 16
    assert len(manifest["data"]["files"][0]["sha256"]) == 64
    assert manifest["recipe"]["train"]["max_steps"] == 3
    assert set(manifest["versions"]) == {"mllm", "torch", "transformers", "peft"}
    assert manifest["base"]["vision_encoder"]["fingerprint"].startswith("sha256:")


@pytest.mark.parametrize("name", ["my-lora-llava", "x", "a path/with spaces/[brackets]", "mllm-qlora.mpt"])
def test_a_directory_may_have_any_name(copy_of: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    for tuning in ("connector", "lora_llm_vision"):
        source = copy_of(tuning)
        want = logits_at(source)
        target = tmp_path / "renamed" / tuning / name
        target.parent.mkdir(parents=True)
        source.rename(target)
        model, processor = mllm.load(target)
        assert torch.equal(logits_of(model, processor), want)
        save(model, processor, target)  # and it can be written to
        assert torch.equal(logits_at(target), want)


@pytest.mark.parametrize("text", ["gpt2", "opt"])
def test_tied_embeddings_stay_tied(tmp_path: Path, text: str) -> None:
    world = make_world(tmp_path, text=text)
    for name in ("connector", "all"):
        spy = LogitsAtSave()
        output = train(run_config(world, tmp_path / name, TUNINGS[name], save_steps=1), callbacks=[spy])
        model, processor = mllm.load(output)
        assert torch.equal(logits_of(model, processor), spy.logits[STEPS])
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert head is embedding
        names = load_file(output / WEIGHTS)
        assert sum(tensor.shape == head.shape for tensor in names.values()) == (name == "all")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("connector", "bfloat16"), ("lora_all", "bfloat16"), ("all", "bfloat16"), ("llm", "float32")],
)
def test_mixed_precision_comes_back_as_it_was(world: Path, tmp_path: Path, name: str, dtype: str) -> None:
    """Frozen in bfloat16, trained in float32: neither the rounding nor the memory may change at a reload."""
    parts = {"vision_encoder": str(world / "vision"), "language_model": str(world / "language")}
    config = run_config(
        world, tmp_path / "run", TUNINGS[name], {**parts, "dtype": dtype}, save_steps=1, bf16=True
    )
    dtypes: dict[str, torch.dtype] = {}

    class Spy(LogitsAtSave):
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            dtypes.update({name: p.dtype for name, p in model.named_parameters()})
            self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}

    spy = Spy()
    model, _ = mllm.load(train(config, callbacks=[spy]))
    low = {part for part, tuning in tune(*TUNINGS[name]).items() if tuning in ("frozen", "lora")}
    for tensor_name, found in dtypes.items():
        if UNREACHED.match(tensor_name):
            continue
        frozen = tensor_name.split(".")[0] in low and not is_adapter(tensor_name)
        assert found == (getattr(torch, dtype) if frozen else torch.float32), tensor_name
    assert {name: p.dtype for name, p in model.named_parameters()} == dtypes
    for tensor_name, parameter in model.named_parameters():
        assert UNREACHED.match(tensor_name) or torch.equal(parameter, spy.tensors[tensor_name]), tensor_name


def test_load_casts_on_request(run_of: Callable[[str], Run]) -> None:
    model, processor = mllm.load(run_of("lora_llm").output, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    full = logits_at(run_of("lora_llm").output)
    assert (logits_of(model, processor) - full).abs().mean() < 0.1 * full.std()


def test_a_second_save_replaces_the_first_wholly(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    """Adapters of the model that was there before must not be loaded into the one that comes after."""
    target = tmp_path / "checkpoint"
    for name in ("lora_all", "all", "connector", "lora_llm"):
        model, processor = mllm.load(run_of(name).output)
        save(model, processor, target)
        assert torch.equal(logits_at(target), logits_of(model, processor))
        assert (target / "adapter").exists() == name.startswith("lora")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


# -- what is wrong is named -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), [("all", WEIGHTS), ("connector", WEIGHTS), ("lora_all", ADAPTER)])
def test_a_missing_tensor_is_named(copy_of: Callable[[str], Path], name: str, file: str) -> None:
    path = copy_of(name)
    whole = (path / file).read_bytes()
    for tensor in sorted(load_file(path / file))[::6]:
        edit(path / file, lambda tensors, tensor=tensor: tensors.pop(tensor))  # type: ignore[misc]
        with pytest.raises(CheckpointError) as error:
            mllm.load(path)
        assert f"{tensor.removeprefix('base_model.model.')!r} is missing" in str(error.value)
        assert "\n" not in str(error.value)
        (path / file).write_bytes(whole)
    mllm.load(path)


@pytest.mark.parametrize(("name", "file"), [("connector", WEIGHTS), ("lora_llm", ADAPTER)])
def test_an_extra_a_misshapen_and_a_renamed_tensor_are_named(
    copy_of: Callable[[str], Path], name: str, file: str
) -> None:
    path = copy_of(name)
    whole = (path / file).read_bytes()
    first = sorted(load_file(path / file))[0]
    shown = first.removeprefix("base_model.model.")

    def extra(tensors: dict[str, torch.Tensor]) -> None:
        tensors["connector.extra"] = torch.zeros(1)

    def misshapen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first] = tensors[first][:-1].clone()

    def other_dtype(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first] = tensors[first].bfloat16()

    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first.replace("layers", "blocks")] = tensors.pop(first)

    for change, problem in (
        (extra, "'connector.extra' is not in the manifest"),
        (misshapen, f"{shown!r}.*'shape'.*the manifest says"),
        (other_dtype, f"{shown!r}.*bfloat16.*the manifest says"),
        (renamed, f"{shown!r} is missing"),
    ):
        edit(path / file, change)
        with pytest.raises(CheckpointError, match=problem):
            mllm.load(path)
        (path / file).write_bytes(whole)


@pytest.mark.parametrize(("name", "file"), [("connector", WEIGHTS), ("all", WEIGHTS), ("lora_all", ADAPTER)])
def test_changed_values_are_noticed(copy_of: Callable[[str], Path], name: str, file: str) -> None:
    """A zeroed adapter, or a single number, of any tensor."""
    path = copy_of(name)
    whole = (path / file).read_bytes()

    def zeroed(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.zero_()

    edit(path / file, zeroed)
    with pytest.raises(CheckpointError, match="changed"):
        mllm.load(path)
    (path / file).write_bytes(whole)
    for tensor in sorted(load_file(path / file))[::9]:
        edit(path / file, lambda tensors, tensor=tensor: tensors[tensor].view(-1)[0].add_(1e-3))  # type: ignore[misc]
        with pytest.raises(CheckpointError, match="changed"):
            mllm.load(path)
        (path / file).write_bytes(whole)


def test_a_changed_adapter_configuration_fails_the_probe(copy_of: Callable[[str], Path]) -> None:
    path = copy_of("lora_all")
    edit_json(path / "adapter" / "adapter_config.json", lambda c: c.update(lora_alpha=0))
    with pytest.raises(CheckpointError, match="does not compute what the saved one did"):
        mllm.load(path)


def test_a_changed_model_configuration_fails_the_probe(copy_of: Callable[[str], Path]) -> None:
    path = copy_of("connector")
    edit_json(path / "config.json", lambda c: c.update(vision_feature_layer=-3))
    with pytest.raises(CheckpointError, match="does not compute what the saved one did"):
        mllm.load(path)


def test_the_probe_sees_every_part(run_of: Callable[[str], Run], tmp_path: Path) -> None:
    """Values changed behind the manifest's back, as by a library that computes differently."""
    model, _ = mllm.load(run_of("lora_all").output)
    saved = probe(model)
    check_probe(model, saved, tmp_path)
    for part in ("vision_encoder", "connector", "language_model"):
        adapters = [p for name, p in model.named_parameters() if name.startswith(part) and "lora_B" in name]
        before = [p.detach().clone() for p in adapters]
        with torch.no_grad():
            for p in adapters:
                p.zero_()
        with pytest.raises(CheckpointError, match="does not compute"):
            check_probe(model, saved, tmp_path)
        with torch.no_grad():
            for p, values in zip(adapters, before, strict=True):
                p.copy_(values)
    check_probe(model, saved, tmp_path)
    with torch.no_grad():
        model.connector.layers[0].base_layer.bias[0] = float("nan")
    with pytest.raises(CheckpointError, match="does not compute"):
        check_probe(model, saved, tmp_path)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda p: (p / MANIFEST).unlink(), f"no {MANIFEST} here"),
        (lambda p: (p / MANIFEST).write_text("{"), f"{MANIFEST}: cannot be read"),
        (lambda p: edit_json(p / MANIFEST, lambda m: m.update(format=99)), "format 99, this version reads 1"),
        (
            lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-100]),
            f"{WEIGHTS}: cannot be read",
        ),
        (lambda p: (p / WEIGHTS).write_bytes(b""), f"{WEIGHTS}: cannot be read"),
        (lambda p: (p / WEIGHTS).unlink(), "tensor 'connector.* is missing"),
        (lambda p: (p / ADAPTER).unlink(), "adapter_model.safetensors: cannot be read"),
        (lambda p: (p / ADAPTER).write_bytes((p / ADAPTER).read_bytes()[:-9]), "cannot be read"),
        (lambda p: (p / "adapter" / "adapter_config.json").unlink(), "adapter_config.json'?: cannot be read"),
        (lambda p: shutil.rmtree(p), f"no {MANIFEST} here"),
    ],
)
def test_a_broken_directory_is_one_clear_line(
    copy_of: Callable[[str], Path], spoil: Callable[[Path], Any], problem: str
) -> None:
    path = copy_of("lora_llm")
    spoil(path)
    with pytest.raises(CheckpointError, match=problem) as error:
        mllm.load(path)
    assert "\n" not in str(error.value)


# -- base models ------------------------------------------------------------------------------------


@pytest.fixture
def spoilt_world(tmp_path: Path) -> tuple[Path, Path]:
    """A world of its own and a LoRA run on it."""
    world = make_world(tmp_path / "world")
    return world, train(run_config(world, tmp_path / "run", TUNINGS["lora_llm"], max_steps=1))


def test_a_changed_base_model_is_named(spoilt_world: tuple[Path, Path]) -> None:
    world, run = spoilt_world
    torch.manual_seed(99)
    make_vision().save_pretrained(world / "vision")
    with pytest.raises(CheckpointError, match=r"base model of vision_encoder at .* is not the one") as error:
        mllm.load(run)
    assert "base={'vision_encoder'" in str(error.value)


def test_the_probe_does_not_round_to_tf32(run_of: Callable[[str], Run]) -> None:
    """As a GPU's convolutions in float32 do by default, and a CPU that loads the checkpoint does not."""
    model, _ = mllm.load(run_of("llm").output)
    seen = []
    model.vision_encoder.register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32), with_kwargs=True
    )
    before = torch.backends.cudnn.allow_tf32
    probe(model)
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 is before is True


def test_a_base_model_that_computes_differently_fails_the_probe(spoilt_world: tuple[Path, Path]) -> None:
    world, run = spoilt_world
    edit_json(world / "language" / "config.json", lambda c: c.update(rms_norm_eps=0.5))
    with pytest.raises(CheckpointError, match="does not compute"):
        mllm.load(run)


def test_a_base_model_that_moved(spoilt_world: tuple[Path, Path], tmp_path: Path) -> None:
    world, run = spoilt_world
    want = logits_at(run)
    (world / "vision").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"vision_encoder.*load with base=\{'vision_encoder'") as error:
        mllm.load(run)
    assert "\n" not in str(error.value)
    base = {"vision_encoder": tmp_path / "elsewhere"}
    assert torch.equal(logits_at(run, base=base), want)
    model, processor = mllm.load(run, base=base)
    save(model, processor, tmp_path / "again")  # remembers the new place
    assert torch.equal(logits_at(tmp_path / "again"), want)
    with pytest.raises(CheckpointError, match="'connector' is saved whole"):
        mllm.load(run, base={"connector": tmp_path})


def test_a_relative_base_is_found_from_any_directory(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    parts = {"vision_encoder": "vision", "language_model": "language"}
    output = train(run_config(world, tmp_path / "run", TUNINGS["connector"], parts, max_steps=1))
    monkeypatch.chdir(tmp_path)
    mllm.load(output)


# -- adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora_llm", "lora_all"])
def test_the_adapter_folder_is_pefts(run_of: Callable[[str], Run], world: Path, name: str) -> None:
    run = run_of(name)
    ours, processor = mllm.load(run.output)
    want = logits_of(ours, processor)
    bare, _ = build(run_config(world, run.output, TUNINGS[name]).model)
    with torch.no_grad():
        own = bare.state_dict()
        for tensor_name, tensor in load_file(run.output / WEIGHTS).items():
            own[tensor_name].copy_(tensor)
    assert not torch.equal(logits_of(bare, processor), want)
    wrapped = PeftModel.from_pretrained(bare, run.output / "adapter")
    assert torch.equal(logits_of(wrapped, processor), want)
    torch.testing.assert_close(logits_of(wrapped.merge_and_unload(), processor), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lora_llm", "lora_all"])
def test_merged_is_unmerged(run_of: Callable[[str], Run], tmp_path: Path, name: str) -> None:
    model, processor = mllm.load(run_of(name).output)
    want = logits_of(model, processor)
    merge_adapters(model)
    assert not any(is_adapter(n) for n, _ in model.named_parameters())
    assert not hasattr(model, "peft_config")
    torch.testing.assert_close(logits_of(model, processor), want, atol=1e-5, rtol=1e-5)


def test_stage_two_from_a_lora_checkpoint(run_of: Callable[[str], Run], world: Path, tmp_path: Path) -> None:
    """Adapters of the stage before are merged, saved with the next stage, and its parent is named."""
    before = run_of("lora_llm_vision").output
    want = logits_at(before)
    section = {"init_from": str(before)}
    config = run_config(world, tmp_path / "next", TUNINGS["connector"], section, save_steps=1)
    model, processor = build(config.model)
    apply_tuning(model, config.tune)
    torch.testing.assert_close(logits_of(model, processor), want, atol=1e-5, rtol=1e-5)
    spy = LogitsAtSave()
    output = train(config, callbacks=[spy])
    for step, logits in spy.logits.items():
        assert torch.equal(logits_at(output / f"checkpoint-{step}"), logits)
    manifest = json.loads((output / MANIFEST).read_text())
    assert manifest["parent"] == {"path": str(before), "manifest": manifest_hash(before)}
    assert not manifest["adapter"]


@pytest.mark.parametrize("again", ["lora_llm_vision", "lora_llm", "llm", "all"])
def test_a_third_stage_reloads(run_of: Callable[[str], Run], world: Path, tmp_path: Path, again: str) -> None:
    section = {"init_from": str(run_of("lora_llm_vision").output)}
    spy = LogitsAtSave()
    config = run_config(world, tmp_path / "next", TUNINGS[again], section, save_steps=1, max_steps=2)
    output = train(config, callbacks=[spy])
    for step, logits in spy.logits.items():
        assert torch.equal(logits_at(output / f"checkpoint-{step}"), logits)
    section = {"init_from": str(output)}
    config = run_config(world, tmp_path / "last", TUNINGS["lora_all"], section, save_steps=1, max_steps=2)
    spy = LogitsAtSave()
    assert torch.equal(logits_at(train(config, callbacks=[spy])), spy.logits[2])


def test_the_same_lora_goes_on_and_another_one_starts_anew(run_of: Callable[[str], Run]) -> None:
    path = run_of("lora_llm_vision").output

    def adapters(**lora: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        model, processor = mllm.load(path)
        section = tune(*TUNINGS["lora_llm_vision"])
        section["lora"].update(lora)
        apply_tuning(model, TuneSection.model_validate(section))
        return {n: p for n, p in model.named_parameters() if is_adapter(n)}, logits_of(model, processor)

    kept, logits = adapters()
    assert all(p.abs().max() > 0 for n, p in kept.items() if "lora_B" in n and ".layers.2." not in n)
    fresh, fresh_logits = adapters(r=2)
    assert {p.shape[0] for n, p in fresh.items() if "lora_A" in n} == {2}
    assert all(p.abs().max() == 0 for n, p in fresh.items() if "lora_B" in n)
    torch.testing.assert_close(fresh_logits, logits, atol=1e-5, rtol=1e-5)


# -- writing is all or nothing ----------------------------------------------------------------------


def test_a_failing_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    model, processor = make_model()
    target = tmp_path / "checkpoint"
    save(model, processor, target)
    want = logits_at(target)
    with torch.no_grad():
        model.connector.layers[0].weight.add_(1)
    for path in (target, tmp_path / "new"):
        with pytest.raises(TypeError):
            save(model, processor, path, record={"not": object()})  # fails after all tensors are written
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]
    assert torch.equal(logits_at(target), want)


KILLED = """
    import os
    import signal
    import sys
    from collections import UserDict
    from pathlib import Path

    import torch

    torch.set_num_threads(1)

    import mllm
    from mllm.model.checkpoint import save

    folder = Path(sys.argv[1])
    model, processor = mllm.load(folder / "checkpoint-0")

    class Killer(UserDict):
        def keys(self):  # called when the manifest is put together: all tensors are written by then
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        with torch.no_grad():
            model.connector.layers[0].weight.add_(1)
        save(model, processor, folder / "checkpoint-0", record=Killer(step=1))
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
    sys.stdin.readline()
    for number in range(1, 10000):
        save(model, processor, folder / f"checkpoint-{number}")
        save(model, processor, folder / "again")
        if number == 1:
            print("saving", flush=True)
"""


def test_a_save_over_an_older_one_is_completed_after_a_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each file that is moved or removed: the old one, or none that loads until the new is complete."""
    model, processor = make_model()
    place = save(model, processor, tmp_path / "run")
    with torch.no_grad():
        model.connector.layers[0].weight.add_(1)
    want = logits_of(model, processor)
    cuts = 0
    for function in (Path.replace, Path.unlink):
        for at in range(30):
            left = [at]

            def cut(
                self: Path, *others: Any, left: list[int] = left, function: Any = function, **kw: Any
            ) -> Any:
                if self.parent.parent == tmp_path:
                    left[0] -= 1
                if left[0] == -1:
                    raise KeyboardInterrupt  # nothing tidies up behind it, as behind a kill
                return function(self, *others, **kw)

            with monkeypatch.context() as patch:
                patch.setattr(Path, function.__name__, cut)
                try:
                    save(model, processor, place)
                    break
                except KeyboardInterrupt:
                    cuts += 1
            if not (place / MANIFEST).exists():
                with pytest.raises(CheckpointError, match="a save was cut off"):
                    mllm.load(place)
            finish_save(place)
            assert torch.equal(logits_at(place), want)
            assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    assert cuts > 8


def test_kill_minus_nine_in_the_middle_of_saves(tmp_path: Path) -> None:
    """Just before the manifest, then anywhere: a new directory is there whole or not at all."""
    model, processor = make_model()
    save(model, processor, tmp_path / "checkpoint-0")
    want = logits_of(model, processor)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert int(process.stdout.readline()) == signal.SIGKILL
    assert len(list(tmp_path.glob(".checkpoint-0.tmp-*/model.safetensors"))) == 1
    assert torch.equal(logits_at(tmp_path / "checkpoint-0"), want)
    save(model, processor, tmp_path / "checkpoint-0")  # sweeps up what the killed process left
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-0"]

    process.stdin.write("go on\n")
    process.stdin.flush()
    assert process.stdout.readline() == "saving\n"
    time.sleep(random.uniform(0, 0.2))
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    written = list(tmp_path.glob("checkpoint-*"))
    assert len(written) > 1
    assert all((path / MANIFEST).is_file() for path in written)
    newest = max(written, key=lambda path: int(path.name.rpartition("-")[2]))
    complete = [path for path in (newest, tmp_path / "again") if (path / MANIFEST).is_file()]
    for path in complete:
        assert torch.equal(logits_at(path), want)
