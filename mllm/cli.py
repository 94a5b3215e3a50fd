"""The command line. A subcommand parses and calls, nothing more; heavy imports stand inside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.errors import ConfigError, MllmError

app = typer.Typer(
    name="mllm",
    help="Train, probe and serve multimodal LLMs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Turn data into training rows, and look at them.", no_args_is_help=True)
eval_app = typer.Typer(help="Ask a model benchmark questions; score its answers.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command; `main` reads --debug itself."""


Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, laid over the recipe", show_default=False)
]
RecipeName = Annotated[str, typer.Argument(help="a YAML file, or a shipped recipe: llava-1.5-7b/align")]
ModelDir = Annotated[Path, typer.Argument(help="checkpoint directory")]
Decode = Annotated[str, typer.Option(help="greedy, sample, vcd; with settings: vcd,alpha=1,noise_step=500")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
ImageRoot = Annotated[Path | None, typer.Option(help="folder that image paths start from")]


@app.command()
def train(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Train one stage.

    [bold]Examples[/]

      mllm train llava-1.5-7b/align data.path=captions.json data.image_root=images

      mllm train my_recipe.yaml train.learning_rate=1e-4 train.resume=true

      deepspeed --num_gpus 8 scripts/train.py llava-1.5-7b/instruct
    """
    from mllm.training.train import train as run

    typer.echo(run(recipe, overrides or []))


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes: one folder a published system, one file a stage.

    [bold]Example[/]

      mllm recipes
    """
    from rich.console import Console
    from rich.table import Table

    from mllm.config import shipped_recipes, summary_of

    summaries = {name: summary_of(name) for name in shipped_recipes()}
    if as_json:
        typer.echo(json.dumps(summaries, indent=1))
        return
    table = Table("recipe", "what it is", box=None, pad_edge=False)
    for name, summary in summaries.items():
        table.add_row(name, summary)
    Console(highlight=False).print(table)


@app.command()
def chat(
    model: ModelDir,
    image: Annotated[
        list[Path] | None, typer.Option(help="show this image; may be given several times")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="ask this, print the answer, leave")] = None,
    decode: Decode = "greedy",
    max_new_tokens: Annotated[int, typer.Option(help="longest answer")] = 256,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one")] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a model.

    [bold]Examples[/]

      mllm chat runs/instruct --image photo.jpg

      mllm chat runs/instruct --image photo.jpg --prompt "What is this?" --decode vcd
    """
    from rich.console import Console

    from mllm.chat.session import ChatSession
    from mllm.chat.terminal import chat_loop
    from mllm.decoding import describe, parse_decode

    decoder = parse_decode(decode)
    loaded, processor = _load(model, device)
    session = ChatSession(loaded, processor, decoder, max_new_tokens, seed)
    for path in image or []:
        session.add_image(str(path))
    if prompt is None:
        _warn_of_stage(model)
        chat_loop(session, Console(highlight=False))
        return
    answer = session.ask(prompt)
    images = [str(path) for path in image or []]
    record = {"prompt": prompt, "images": images, "answer": answer, "decode": describe(decoder), "seed": seed}
    typer.echo(json.dumps(record) if as_json else answer)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="where everything is written")] = Path("runs/quickstart"),
    fast: Annotated[bool, typer.Option(help="a few steps and questions, to see that it works")] = False,
    seed: Annotated[int, typer.Option(help="of the world, the training and the sampling")] = 0,
) -> None:
    """The whole story on a CPU, offline: data, both stages, POPE with and without VCD, a report.

    [bold]Examples[/]

      mllm quickstart

      mllm quickstart --fast --out /tmp/look
    """
    from mllm.quickstart.run import run

    typer.echo(run(out, fast=fast, seed=seed))


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="directory of published weights")],
    out: Annotated[Path, typer.Argument(help="checkpoint directory to write")],
    template: Annotated[str | None, typer.Option(help="chat template; default: the source's own")] = None,
    language_model: Annotated[str | None, typer.Option(help="LLaVA's layout: the base model")] = None,
    vision_encoder: Annotated[str | None, typer.Option(help="LLaVA's layout: the vision encoder")] = None,
) -> None:
    """Make a checkpoint of published weights: LLaVA, LLaVA-NeXT, BLIP-2, InstructBLIP.

    Reads directories of transformers, and LLaVA's own (`mm_projector.bin`, with LoRA adapters or without).
    The result is compared with the source; where they differ, nothing is written.

    [bold]Examples[/]

      mllm import llava-1.5-7b-hf runs/llava

      mllm import llava-v1.5-7b-lora runs/lora --language-model vicuna-7b-v1.5 --vision-encoder clip-l-336
    """
    from mllm.model.convert import import_weights

    typer.echo(import_weights(source, out, template, language_model, vision_encoder))
    typer.echo(out)


@app.command()
def export(
    checkpoint: ModelDir,
    out: Annotated[Path, typer.Argument(help="directory to write")],
) -> None:
    """Write a checkpoint as transformers' own LLaVA, LLaVA-NeXT, BLIP-2 or InstructBLIP.

    Adapters are merged. The result loads without mllm, so that vLLM and others serve it. It is compared with
    the checkpoint; where they differ, nothing is written.

    [bold]Example[/]

      mllm export runs/instruct llava-mine
    """
    from mllm.model.convert import export_stock

    typer.echo(export_stock(checkpoint, out))
    typer.echo(out)


# -- data -------------------------------------------------------------------------------------------


@data_app.command("convert")
def data_convert(
    source: Annotated[Path, typer.Argument(help="LLaVA JSON, COCO captions or boxes, ShareGPT or messages")],
    output: Annotated[Path, typer.Argument(help="JSONL file to write")],
    format: Annotated[
        str, typer.Option(help="llava, coco_captions, coco_boxes, sharegpt, messages or auto")
    ] = "auto",
    image_root: ImageRoot = None,
    check_images: Annotated[bool, typer.Option(help="every image file must exist")] = False,
    per: Annotated[str, typer.Option(help="COCO: one row per 'caption' or per 'image'")] = "caption",
    box_style: Annotated[
        str | None, typer.Option(help="coco_boxes: llava, minigpt_v2, cogvlm or visionllm")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="coco_boxes: what is asked about boxes")
    ] = "detection,refer,identify",
    seed: Annotated[int, typer.Option(help="coco_boxes: of the questions drawn")] = 0,
    on_error: Annotated[
        str, typer.Option(help="'error' stops at a bad row, 'skip' counts and leaves it")
    ] = "error",
    max_bad: Annotated[float, typer.Option(help="with skip: largest share of bad rows")] = 0.01,
    as_json: AsJson = False,
) -> None:
    """Turn a data set into mllm's JSONL.

    [bold]Examples[/]

      mllm data convert captions_train2017.json align.jsonl --image-root train2017 --check-images

      mllm data convert llava_v1_5_mix665k.json mix.jsonl --on-error skip

      mllm data convert instances_train2017.json boxes.jsonl --format coco_boxes --box-style minigpt_v2
    """
    from mllm.data.convert import convert
    from mllm.data.grounding import BoxTasks

    result = convert(
        source,
        output,
        format=format,
        image_root=image_root,
        check_images=check_images,
        per=per,
        boxes=None if box_style is None else BoxTasks(box_style, tuple(tasks.split(",")), seed),
        on_error=on_error,
        max_bad=max_bad,
    )
    _report(result, as_json, output)


@data_app.command("generate")
def data_generate(
    output: Annotated[Path, typer.Argument(help="JSONL file to write")],
    captions: Annotated[Path | None, typer.Option(help="COCO captions file")] = None,
    instances: Annotated[Path | None, typer.Option(help="COCO instances file")] = None,
    teacher: Annotated[str, typer.Option(help="who answers; 'template' needs no network")] = "template",
    kind: Annotated[
        list[str] | None, typer.Option(help="conversation, detail, reasoning; default: all three")
    ] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same file")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make instruction data from captions and boxes.

    [bold]Example[/]

      mllm data generate instruct.jsonl --captions captions.json --instances instances.json
    """
    from data_gen.contexts import read_coco
    from data_gen.generate import generate
    from data_gen.teachers import KINDS, TEACHERS

    if teacher not in TEACHERS:
        raise ConfigError(f"unknown teacher {teacher!r}; use {', '.join(TEACHERS)}")
    contexts = read_coco(captions, instances)
    summary = generate(contexts, TEACHERS[teacher](), kind or KINDS, output, seed)
    _report(summary, as_json, output)


@data_app.command("capfilt")
def data_capfilt(
    rows: Annotated[Path, typer.Argument(help="noisy image-caption pairs: any format of `convert`")],
    output: Annotated[Path, typer.Argument(help="JSONL file to write")],
    captioner: Annotated[Path, typer.Option(help="checkpoint that captions each image")],
    filter: Annotated[Path, typer.Option(help="checkpoint of pretrain_qformer; its ITM head scores")],
    image_root: ImageRoot = None,
    human: Annotated[Path | None, typer.Option(help="rows to keep as they are")] = None,
    threshold: Annotated[float, typer.Option(help="least score of a caption that is kept")] = 0.5,
    prompt: Annotated[str, typer.Option(help="said to the captioner with each image")] = "",
    batch_size: Annotated[int, typer.Option(help="images at a time")] = 16,
    seed: Annotated[int, typer.Option(help="of the captioner's sampling")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    as_json: AsJson = False,
) -> None:
    """Keep the captions, found and made, that fit their images (BLIP's CapFilt); continues where it stopped.

    [bold]Example[/]

      mllm data capfilt web.jsonl clean.jsonl --captioner runs/align --filter runs/qformer --image-root images
    """
    from mllm.data import capfilt as step
    from mllm.data.rows import open_rows
    from mllm.model.checkpoint import manifest_hash

    speaker, judge = _load(captioner, device), _load(filter, device)
    made_by = {"captioner": manifest_hash(captioner), "filter": manifest_hash(filter), "prompt": prompt}
    summary = step.capfilt(
        open_rows(rows, "auto", image_root),
        output,
        step.captioner(*speaker, prompt=prompt),
        step.matcher(*judge),
        made_by=made_by,
        human=open_rows(human) if human else None,
        threshold=threshold,
        batch_size=batch_size,
        seed=seed,
    )
    _report(summary, as_json, output)


@data_app.command("inspect")
def data_inspect(
    recipe: RecipeName,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("-n", "--rows", help="how many rows to show")] = 3,
    start: Annotated[int, typer.Option(help="first row")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show rows as the model will be trained on them: tokens trained, masked, image.

    [bold]Example[/]

      mllm data inspect quickstart/instruct -n 2
    """
    from rich.console import Console

    from mllm.config import load_recipe
    from mllm.data.inspect import legend, row_panel, spans_as_json
    from mllm.data.rows import open_rows
    from mllm.training.build import build_processor

    config = load_recipe(recipe, overrides or [])
    section = config.data
    if config.on_pairs:
        raise ConfigError(f"{recipe}: the stage {config.stage} has pairs and no conversations to show")
    processor = build_processor(config.model)
    console = Console(highlight=False)
    if not as_json:
        console.print(legend())
    for source in section.sources:
        data = open_rows(source.path, source.format or "auto", source.image_root)
        for row in data[start : start + rows]:
            if as_json:
                typer.echo(json.dumps(spans_as_json(processor, row, section.max_length)))
            else:
                console.print(row_panel(processor, row, section.max_length))


# -- eval -------------------------------------------------------------------------------------------


@eval_app.command("build")
def eval_build(
    instances: Annotated[Path, typer.Argument(help="COCO instances file")],
    out: Annotated[Path, typer.Argument(help="folder for pope_{random,popular,adversarial}.jsonl")],
    images: Annotated[int, typer.Option(help="how many images")] = 500,
    per_image: Annotated[int, typer.Option(help="questions an image, half yes, half no")] = 6,
    seed: Annotated[int, typer.Option(help="the same seed gives the same questions")] = 0,
) -> None:
    """Build POPE questions from annotations.

    [bold]Example[/]

      mllm eval build instances_val2017.json pope/
    """
    from eval.tasks.pope_build import write

    typer.echo(json.dumps(write(instances, out, images, per_image, seed), indent=1))


@eval_app.command("run")
def eval_run(
    model: ModelDir,
    questions: Annotated[Path, typer.Argument(help="POPE question file")],
    out: Annotated[Path, typer.Argument(help="predictions file (JSONL) to write")],
    image_root: Annotated[Path, typer.Option(help="folder of the images")],
    decode: Decode = "greedy",
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    batch_size: Annotated[int, typer.Option(help="questions at a time")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer")] = 128,
    prompt_style: Annotated[str, typer.Option(help="llava, vcd or plain")] = "llava",
    blank_images: Annotated[bool, typer.Option(help="show blank images: does the model look?")] = False,
    overwrite: Annotated[bool, typer.Option(help="replace a run with other settings")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Answer the questions; an interrupted run continues.

    [bold]Example[/]

      mllm eval run runs/instruct pope_random.jsonl greedy.jsonl --image-root val2014
    """
    from eval.run import run

    loaded, processor = _load(model, device)
    path = run(
        loaded,
        processor,
        questions,
        image_root,
        out,
        decode=decode,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        prompt_style=prompt_style,
        checkpoint=model,
        blank_images=blank_images,
        overwrite=overwrite,
    )
    typer.echo(path)


@eval_app.command("score")
def eval_score(
    predictions: Annotated[Path, typer.Argument(help="predictions: ours, LLaVA's, VCD's or POPE's format")],
    questions: Annotated[Path, typer.Argument(help="question file with the labels")],
    rule: Annotated[
        str, typer.Option(help="official (POPE and LLaVA) or vcd; both are reported")
    ] = "official",
    annotations: Annotated[Path | None, typer.Option(help="folder of coco_pope_{split}.json")] = None,
    match: Annotated[str, typer.Option(help="pair by 'id', by 'order', or 'auto'")] = "auto",
    answer_field: Annotated[str | None, typer.Option(help="field that holds the answer")] = None,
    out: Annotated[Path | None, typer.Option(help="write the result here as JSON")] = None,
    as_json: AsJson = False,
) -> None:
    """Score predictions; no model is needed.

    [bold]Example[/]

      mllm eval score greedy.jsonl pope_random.jsonl --json
    """
    from eval.score import score
    from eval.table import score_table
    from mllm.data.files import write_atomic

    result = score(
        predictions,
        questions,
        rule,
        annotations=annotations,
        match=match,  # type: ignore[arg-type]
        answer_field=answer_field,
    )
    if out is not None:
        write_atomic(out, json.dumps(result, indent=1) + "\n")
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        from rich.console import Console

        Console(highlight=False).print(score_table(result))


# -- shared -----------------------------------------------------------------------------------------


def _load(path: Path, device: str | None) -> tuple[Any, Any]:
    import torch

    from mllm.model import load

    return load(path, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _warn_of_stage(path: Path) -> None:
    from mllm.model.checkpoint import read_manifest

    if read_manifest(path).get("stage") == "align":
        typer.echo(
            "warning: this is a stage-1 checkpoint; it captions, it does not answer questions", err=True
        )


def _report(summary: Any, as_json: bool, output: Path) -> None:
    from dataclasses import asdict

    record = {**asdict(summary), "output": str(output)}
    if as_json:
        typer.echo(json.dumps(record, default=str))
        return
    for key, value in record.items():
        typer.echo(f"{key}: {dict(value) if isinstance(value, dict) else value}")


def main() -> None:
    """Run the command line; an error that the user can mend is one line, without a traceback."""
    debug = "--debug" in sys.argv
    _quiet_libraries()
    try:
        app(standalone_mode=False)
    except MllmError as error:
        if debug:
            raise
        sys.exit(f"error: {_one_line(error)}")
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        # Typer's own complaints (unknown option, missing argument) know how to show themselves.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        raise


def _one_line(error: MllmError) -> str:
    """The message; an error that comes out of a dataloader worker has a traceback in front of it."""
    lines = str(error).strip().splitlines()
    return (
        lines[-1].rpartition(f"{type(error).__name__}: ")[2] if lines[0].startswith("Caught ") else str(error)
    )


def _quiet_libraries() -> None:
    """Keep library chatter off the screen; set before anything heavy is imported."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # bitsandbytes says on import that an optional kernel package is absent.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
