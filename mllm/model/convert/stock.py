"""transformers' own directories of LLaVA, LLaVA-NeXT, BLIP-2 and InstructBLIP, in and out.

Both ways are the same four steps: describe the other side, rename the tensors, write into a temporary
directory, and load what was written by the ordinary way. Only when that computes what the source did does
the directory get its name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mllm.data.schema import images_of
from mllm.errors import CheckpointError, ConfigError
from mllm.model.checkpoint import assemble, assign, check_new, load, new_directory, save
from mllm.model.compose import set_generation_defaults
from mllm.model.convert.blip2 import Blip2, InstructBlip
from mllm.model.convert.family import Family, demand
from mllm.model.convert.llava import Llava, LlavaNext
from mllm.model.convert.merge import merge_model
from mllm.model.convert.proof import Proof, compare_inputs, observe, prompts, prove, questions
from mllm.model.modeling import MllmForConditionalGeneration
from mllm.model.parts import load_named
from mllm.model.processing import MllmProcessor

# By the class that `config.json` names.
FAMILIES: dict[str, Family] = {
    family.model.__name__: family for family in (Llava(), LlavaNext(), Blip2(), InstructBlip())
}
# Our names of inputs that transformers calls otherwise.
_INPUTS = {"instruction_ids": "qformer_input_ids", "instruction_mask": "qformer_attention_mask"}


def import_stock(source: str | Path, out: str | Path, template: str | None = None) -> Proof:
    """Turn a transformers directory into a checkpoint of ours.

    Args:
        source: the directory, with weights under old or new names.
        out: where to write; must not be there.
        template: chat template, see `mllm.data.templates`; default: the source's own.

    Raises:
        ConfigError: a setting that our model does not have.
        CheckpointError: the source is incomplete or foreign, or the result does not compute the same.
    """
    family = FAMILIES[architecture(source)]
    stock, processor = load_stock(family.model, family.processor, source)
    config, ours = family.read(stock.config, processor, template)
    if stock.config.image_token_id is None:  # BLIP-2's older directories name none
        stock.config.image_token_id = ours.image_token_id
    if stock.config.image_token_id != ours.image_token_id:
        raise CheckpointError(
            f"{source}: the placeholder is {stock.config.image_token_id} in config.json, in the tokenizer "
            f"{ours.image_token!r} at {ours.image_token_id}"
        )
    notes = _compare_processors(family, ours, processor, from_template=False)
    names = rename(stock.state_dict(), family.names(stock.config), family.model.__name__)
    weights = {names[name]: tensor for name, tensor in once(stock.state_dict())}
    batches = prompts(ours, config.text_config)
    _make_room(stock, ours.image_token_id)
    with new_directory(out) as folder:
        model = assemble(MllmForConditionalGeneration, config, {}, weights).eval()
        set_generation_defaults(model, ours)
        model.generation_config.eos_token_id = _ends(model, family.generator(stock))
        save(model, ours, folder, record={"imported": {"from": str(source), "class": family.model.__name__}})
        del model, weights
        before = observe(stock, [_theirs(batch) for batch in batches], ours.image_token_id)
        del stock
        written, _ = load(folder, dtype=torch.float32)
        proof = prove(before, observe(written, batches, ours.image_token_id), str(source))
    return replace(proof, notes=tuple(notes))


def export_stock(checkpoint: str | Path, out: str | Path) -> Proof:
    """Write a checkpoint of ours as a directory that transformers loads with no code of ours.

    Args:
        checkpoint: a checkpoint directory; adapters are merged into the weights.
        out: where to write; must not be there.

    Raises:
        ConfigError: the model has something that no stock class has; names it.
        CheckpointError: the result does not compute the same.
    """
    check_new(out)
    model, processor = load(checkpoint)
    if not isinstance(model, MllmForConditionalGeneration):
        raise ConfigError(f"{checkpoint} is a {type(model).__name__}, which has no class in transformers")
    merge_model(model)
    family = _family_for(model.config)
    config = family.write(model)
    batches = prompts(processor, model.config.text_config)
    with new_directory(out) as folder:
        stock = _build_stock(family, config, model)
        stock.save_pretrained(folder)
        family.write_processor(config, processor).save_pretrained(folder)
        del stock
        before = observe(model, batches, processor.image_token_id)
        del model
        written, their_processor = load_stock(family.model, family.processor, folder)
        after = observe(written, [_theirs(batch) for batch in batches], processor.image_token_id)
        proof = prove(before, after, str(checkpoint))
        notes = _compare_processors(family, processor, their_processor, from_template=True)
    return replace(proof, notes=tuple(notes))


def architecture(source: str | Path) -> str:
    """The class of a transformers directory, as its `config.json` says.

    Raises:
        CheckpointError: no such file.
    """
    try:
        config = dict(json.loads((Path(source) / "config.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: config.json cannot be read: {error}") from error
    return str((config.get("architectures") or ["none"])[0])


def rename(tensors: Iterable[str], pairs: Iterable[tuple[str, str]], what: str) -> dict[str, str]:
    """New names of tensors, of which the first prefix that fits is replaced.

    Raises:
        ConfigError: none fits.
    """
    pairs = list(pairs)
    names = {}
    for name in tensors:
        fitting = [(old, new) for old, new in pairs if name.startswith(old)]
        if not fitting:
            raise ConfigError(f"tensor {name!r} has no counterpart: {what} is not what it could become")
        old, new = fitting[0]
        names[name] = new + name.removeprefix(old)
    return names


def once(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tied tensors under the first of their names only."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield name, tensor


def _theirs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {_INPUTS.get(name, name): tensor for name, tensor in batch.items()}


def _ends(*models: PreTrainedModel) -> list[int]:
    """The tokens that end an answer of any of the models."""
    found: list[int] = []
    for model in models:
        ends: Any = model.generation_config.eos_token_id
        found += ends if isinstance(ends, list) else [ends] if ends is not None else []
    return list(dict.fromkeys(found))


def load_stock(model_class: Any, processor_class: Any, source: str | Path) -> tuple[Any, Any]:
    """Their model, in the dtype it was saved in, and their processor.

    Raises:
        CheckpointError: tensors are missing, superfluous or of another shape.
    """
    processor = load_named(processor_class, source, "processor")
    try:
        model, info = model_class.from_pretrained(
            source,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            local_files_only=True,
        )
    except (OSError, UnpicklingError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{source}: {str(error).strip().splitlines()[0]}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[kind])):
            raise CheckpointError(
                f"{source}: tensor {names[0]} is {kind.removesuffix('_keys')} for {model_class.__name__} "
                f"({len(names)} in all)"
            )
    return model.eval(), processor


def _family_for(config: Any) -> Family:
    """The family that a model of ours can become.

    Raises:
        ConfigError: none has such a connector, or what else the model has.
    """
    kind = config.connector["type"]
    exports: dict[str, Family] = {
        "mlp": LlavaNext() if config.tiling else Llava(),
        "qformer": Blip2(),
        "instruct_qformer": InstructBlip(),
    }
    if kind not in exports:
        raise ConfigError(f"connector {kind!r} has no class in transformers; {', '.join(exports)} have one")
    family = exports[kind]
    demand(
        f"{family.model.__name__} can be it",
        fusion=(config.fusion and config.fusion["type"], None),
        prefix_attention=(config.prefix_attention, False),
        inserted=(getattr(config, "inserted", {}), {}),
    )
    return family


def _build_stock(family: Family, config: PreTrainedConfig, model: Any) -> Any:
    """Their model with the tensors of ours."""
    back = [(ours, theirs) for theirs, ours in family.names(config)]
    names = rename(model.state_dict(), back, family.model.__name__)
    try:
        with no_init_weights():
            stock: Any = family.model._from_config(config)
        stock.tie_weights()  # skipped together with the initialisation
    except AttributeError as error:  # it looks for a tied head's embedding by Llama's name for it
        kind = config.get_text_config().model_type
        raise ConfigError(f"{family.model.__name__} cannot hold a language model of type {kind!r}") from error
    tensors = {names[name]: tensor for name, tensor in once(model.state_dict())}
    if odd := sorted(set(tensors) - set(stock.state_dict())):
        raise ConfigError(f"{family.model.__name__} has no tensor {odd[0]!r}, which this model needs")
    assign(stock, tensors, family.model.__name__, complete=True)
    stock.generation_config = deepcopy(model.generation_config)
    _make_room(stock, config.image_token_id)
    return stock.eval()


def _make_room(stock: Any, image_token_id: int) -> None:
    """A row for the placeholder, which theirs looks up before it is replaced, in the embedding and the head.

    New rows are the mean of the trained ones. The logit of a mean row is the mean of all logits: it is never
    the largest, so no answer changes.
    """
    size = stock.get_input_embeddings().num_embeddings
    if image_token_id < size:
        return
    stock.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in (stock.get_input_embeddings(), stock.get_output_embeddings()):
            for tensor in layer.parameters():
                tensor[size:] = tensor[:size].float().mean(0).to(tensor.dtype)


def _compare_processors(
    family: Family, ours: MllmProcessor, theirs: Any, *, from_template: bool
) -> list[str]:
    """What the two processors make of the same questions; `from_template`: by the chat template of theirs."""
    step = 1.001 / 255 / min(ours.image_processor.image_std)
    notes: Counter[str] = Counter()
    asked = questions()
    for messages in asked:
        text = ours.prompt_text(messages)
        if ours.piece_tokenizer.prefix_space:
            text = text.rstrip(" ")  # the tokenizer writes that space in front of the answer itself
        if from_template and theirs.chat_template:
            text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        batch = family.batch(theirs, text, images_of(messages)[0])
        notes.update(compare_inputs(ours([messages]), batch, ours.image_token_id, step))
    return [f"{note} ({count} of {len(asked)} prompts)" for note, count in notes.items()]
