"""Which parameters learn: how each part is tuned, and a table that says so."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from rich.table import Table

from mllm.config import Part, TrainSection, TuneSection
from mllm.errors import ConfigError
from mllm.model.adapters import (
    dequantise,
    ia3_layers,
    inject,
    insert,
    inserted_parameters,
    is_adapter,
    linear_names,
    merge_adapters,
)
from mllm.model.added_tokens import embedding_names
from mllm.model.checkpoint import origin_of, part_of
from mllm.model.language_model import weights_in
from mllm.model.parted import PartedModel

# What PEFT's adapters are, in its own terms; and which tunings put modules of ours into a part.
PEFT_KINDS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "use_dora": False, "use_rslora": False},
    "qlora": {"peft_type": "LORA", "use_dora": False, "use_rslora": False},
    "dora": {"peft_type": "LORA", "use_dora": True, "use_rslora": False},
    "rslora": {"peft_type": "LORA", "use_dora": False, "use_rslora": True},
    "ia3": {"peft_type": "IA3"},
}
INSERTED = ("adapter", "prefix", "prompt")


@dataclass(frozen=True)
class PartReport:
    """One line of the table: how a part is tuned and how much of it learns."""

    part: str
    tuning: str
    trainable: int
    total: int
    unused: int


def apply_tuning(model: PartedModel, tune: TuneSection) -> list[PartReport]:
    """Put in each part what its tuning needs, and set `requires_grad`.

    A checkpoint that carries PEFT's adapters keeps training those of a part that is tuned in the same way
    with the same settings; others are merged into their weights first.

    Returns:
        One report a part.

    Raises:
        ConfigError: a part cannot be tuned so or is not there, or nothing would be trained, or nothing of a
            part that is not frozen.
    """
    parts = [part for part, _ in model.named_parts()]
    if absent := sorted(tune.model_fields_set & set(get_args(Part)) - set(parts)):
        raise ConfigError(f"tune.{absent[0]}: the model has no such part, but {', '.join(parts)}; remove it")
    for part, _ in list(model.named_parts()):
        _clear(model, part, tune)
        _fill(model, part, tune)
    model.connect()  # again: layers have been replaced
    for part, module in model.named_parts():
        tuning = getattr(tune, part)
        ours = set(inserted_parameters(module)) if tuning in INSERTED else set()
        if tuning != "frozen" and part == "language_model" and getattr(model.config, "added_tokens", ()):
            ours |= embedding_names(module)  # type: ignore[arg-type]  # or the new tokens would stay what they were made as
        for name, parameter in module.named_parameters():
            learns = name in ours or (tuning in PEFT_KINDS and is_adapter(name))
            parameter.requires_grad_(tuning == "full" or learns)
    _override(model, tune.overrides)
    unused = _freeze_unreachable(model)
    for place, how in tune.overrides.items():
        if how == "full" and not any(p.requires_grad for _, p in _under(model, place)):
            raise ConfigError(f"tune.overrides: the loss does not reach {place!r}; leave it out")
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("nothing is trained: every part is 'frozen' in the section 'tune'")
    reports = [_report(model, part, getattr(tune, part), unused[part]) for part, _ in model.named_parts()]
    for report in reports:
        if report.tuning != "frozen" and not report.trainable:
            other = ", or move model.vision_feature_layer" if report.part == "vision_encoder" else ""
            raise ConfigError(
                f"tune.{report.part} is {report.tuning!r}, but no such parameter of it takes part in "
                f"the loss; freeze it{other}"
            )
    return reports


def _clear(model: PartedModel, part: str, tune: TuneSection) -> None:
    """Merge the adapters of an earlier stage that are not trained on, or say that it cannot be done."""
    origin, tuning, module = origin_of(model), getattr(tune, part), getattr(model, part)
    inserted = _inserted(model).get(part)
    if inserted is not None and tuning != "frozen" and inserted != _spec(tuning, tune):
        raise ConfigError(
            f"tune.{part} is {tuning!r}, but an earlier stage gave it {inserted}, which cannot be merged "
            f"into weights; tune it as {inserted['type']!r} with the same settings, or freeze it"
        )
    in_4_bit = part in origin.base and origin.base[part].quantization is not None
    if in_4_bit and tuning != "qlora":
        setattr(model, part, dequantise(module))
        del origin.base[part]  # rounded weights are no longer those of the base
    elif part in origin.adapters and not _continues(model, part, tune):
        origin.changed |= {f"{part}.{name}" for name in merge_adapters(module)}
    else:
        return
    origin.adapters.pop(part, None)


def _continues(model: PartedModel, part: str, tune: TuneSection) -> bool:
    adapter, tuning = origin_of(model).adapters[part], getattr(tune, part)
    if tuning not in PEFT_KINDS or not adapter.items() >= _settings(tuning, tune).items():
        return False
    layers = {f"{part}.{name}" for name in _layers(model, part, tune)}
    return tuning == "ia3" or set(adapter["target_modules"]) == layers


def _layers(model: PartedModel, part: str, tune: TuneSection) -> list[str]:
    """The linear layers that an adapter of a part goes to."""
    layers = list(linear_names(getattr(model, part), model.get_output_embeddings()))
    chosen = tune.lora.target_modules
    if getattr(tune, part) == "ia3" or chosen is None:
        return layers
    # As PEFT: by the last component of the name.
    layers = [name for name in layers if name.rpartition(".")[2] in chosen]
    if missing := set(chosen) - {name.rpartition(".")[2] for name in layers}:
        raise ConfigError(f"tune.lora.target_modules: {part} has no linear layer called {min(missing)!r}")
    return layers


def _fill(model: PartedModel, part: str, tune: TuneSection) -> None:
    """Put into a part what its tuning trains, unless an earlier stage has left it there."""
    origin, tuning, module = origin_of(model), getattr(tune, part), getattr(model, part)
    if tuning in PEFT_KINDS and part not in origin.adapters:
        if tuning == "qlora" and not (part in origin.base and origin.base[part].quantization):
            raise ConfigError(f"tune.{part} is 'qlora', but is not in 4 bit; compose with quantization='nf4'")
        layers = _layers(model, part, tune)
        layers, inner = ia3_layers(module, layers) if tuning == "ia3" else (layers, [])
        if not layers:
            raise ConfigError(f"tune.{part} is {tuning!r}, but it has no linear layer to adapt; use 'full'")
        origin.adapters[part] = inject(module, part, _settings(tuning, tune), layers, inner)
    if tuning in INSERTED and part not in _inserted(model):
        if tuning != "adapter":
            _refuse_beside_soft_tokens(model, part, tuning)
        spec = _spec(tuning, tune)
        insert(module, part, spec)
        model.config.inserted = {**_inserted(model), part: spec}
        origin.changed |= {f"{part}.{name}" for name in inserted_parameters(module)}


def _refuse_beside_soft_tokens(model: PartedModel, part: str, tuning: str) -> None:
    if getattr(model, "fusion", None) is not None:
        raise ConfigError(
            f"tune.{part} is {tuning!r}, but the fusion addresses tokens by their place in the sequence, "
            "which learned tokens would move; use 'lora'"
        )
    if getattr(model.config, "prefix_attention", False):
        raise ConfigError(
            f"tune.{part} is {tuning!r}, but prefix attention makes its own mask, which does not count "
            "learned tokens; use 'lora'"
        )


def _inserted(model: PartedModel) -> dict[str, Any]:
    return getattr(model.config, "inserted", {})


def _settings(tuning: str, tune: TuneSection) -> dict[str, Any]:
    """The recipe's settings of an adapter under PEFT's names."""
    kind = PEFT_KINDS[tuning]
    if tuning == "ia3":
        return kind
    lora = tune.lora
    return {**kind, "r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "bias": "none"}


def _spec(tuning: str, tune: TuneSection) -> dict[str, Any]:
    """The recipe's settings of modules of ours, as `config.inserted` keeps them."""
    return {"type": tuning, **getattr(tune, tuning).model_dump()} if tuning in INSERTED else {}


def _override(model: PartedModel, overrides: Mapping[str, str]) -> None:
    """Freeze or train single modules or parameters against what their part is declared."""
    known = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for place, tuning in overrides.items():
        if place not in known:
            near = difflib.get_close_matches(place, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"tune.overrides: the model has no {place!r}{hint}")
        for name, parameter in _under(model, place):
            if tuning == "full" and not parameter.is_floating_point():
                raise ConfigError(f"tune.overrides: {name} is in 4 bit and cannot be trained; leave it out")
            parameter.requires_grad_(tuning == "full")


def _under(model: PartedModel, place: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a module, or the one parameter of that name."""
    for name, parameter in model.named_parameters():
        if name == place or name.startswith(f"{place}."):
            yield name, parameter


def _freeze_unreachable(model: PartedModel) -> dict[str, int]:
    """Freeze what the loss cannot reach: layers behind the feature layer, pooling heads, unused branches.

    Found in the graph of one forward pass, because models name these parts differently. Left trainable they
    would make distributed training wait for gradients that never come.

    Returns:
        For each part, how many parameters were declared trainable and cannot be.
    """
    training = model.training
    model.eval()
    with torch.enable_grad():
        output = model(**model.probe_inputs())
    model.train(training)
    reached = _leaves(output.logits if output.loss is None else output.loss)
    unused = {part: 0 for part, _ in model.named_parts()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in reached:
            parameter.requires_grad_(False)
            unused[part_of(name)] += parameter.numel()
    return unused


def _leaves(output: torch.Tensor) -> set[int]:
    """Ids of the tensors that a backward pass from `output` would leave a gradient at, be it zero."""
    nodes, leaves = [output.grad_fn], set()
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where a gradient is accumulated
            leaves.add(id(node.variable))
        nodes += [before for before, _ in node.next_functions]
    return leaves


def upcast_trained(model: PartedModel, tune: TuneSection) -> None:
    """Train in float32 what is trained: a part tuned in full as a whole, else the adapters in it.

    Within a part tuned in full, layers that the loss does not reach are still computed, and most kernels
    refuse two dtypes in one layer norm.
    """
    for part, module in model.named_parts():
        if getattr(tune, part) == "full":
            module.float()
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def _report(model: PartedModel, part: str, tuning: str, unused: int) -> PartReport:
    parameters = list(getattr(model, part).parameters())
    return PartReport(
        part,
        tuning,
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(weights_in(p) for p in parameters),
        unused,
    )


def part_rates(reports: list[PartReport], options: TrainSection) -> dict[str, float]:
    """The learning rate of each part.

    Raises:
        ConfigError: one is given for a part that is not there or does not learn.
    """
    learning = [report.part for report in reports if report.trainable]
    if idle := sorted(set(options.learning_rates) - set(learning)):
        raise ConfigError(
            f"train.learning_rates.{idle[0]}: no such part is trained, but {', '.join(learning)}; remove it"
        )
    own: Mapping[str, float] = options.learning_rates  # type: ignore[assignment]
    return {report.part: own.get(report.part, options.learning_rate) for report in reports}


def tuning_table(reports: list[PartReport], rates: Mapping[str, float]) -> Table:
    """The table printed before the first step."""
    table = Table(title="What trains", title_justify="left")
    for column in ("part", "tuning"):
        table.add_column(column)
    for column in ("trainable", "of", "learning rate"):
        table.add_column(column, justify="right")
    for report in reports:
        rate = f"{rates[report.part]:g}" if report.trainable else "-"
        note = f" ({report.unused:,} the loss does not reach)" if report.unused else ""
        table.add_row(report.part, report.tuning + note, f"{report.trainable:,}", f"{report.total:,}", rate)
    return table
