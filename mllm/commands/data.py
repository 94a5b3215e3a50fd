"""`mllm data convert | shard | generate | capfilt | inspect | check`."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from mllm.commands.options import AsJson, ImageRoot, Overrides, RecipeName, load_model, print_summary
from mllm.errors import ConfigError

app = typer.Typer(help="Turn data into training rows, and look at them.", no_args_is_help=True)


@app.command()
def convert(
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
        str | None, typer.Option(help="coco_boxes: some of detection,refer,identify; default: all")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="coco_boxes: of the questions drawn; default: 0")] = None,
    on_error: Annotated[
        str, typer.Option(help="'error' stops at a bad row, 'skip' counts and leaves it")
    ] = "error",
    max_bad: Annotated[
        float | None, typer.Option(help="with skip: largest share of bad rows; default: 0.01")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a data set into mllm's JSONL.

    [bold]Examples[/]

      mllm data convert captions_train2017.json align.jsonl --image-root train2017 --check-images

      mllm data convert llava_v1_5_mix665k.json mix.jsonl --on-error skip

      mllm data convert instances_train2017.json boxes.jsonl --format coco_boxes --box-style minigpt_v2
    """
    from mllm.data.convert import convert as run
    from mllm.data.grounding import TASKS, BoxTasks

    if box_style is None and (tasks is not None or seed is not None):
        raise ConfigError("--tasks and --seed are of --format coco_boxes with a --box-style; leave them out")
    if max_bad is not None and on_error != "skip":
        raise ConfigError("--max-bad is of --on-error skip; leave it out")
    asked = TASKS if tasks is None else tuple(task.strip() for task in tasks.split(","))
    result = run(
        source,
        output,
        format=format,
        image_root=image_root,
        check_images=check_images,
        per=per,
        boxes=None if box_style is None else BoxTasks(box_style, asked, seed or 0),
        on_error=on_error,
        max_bad=0.01 if max_bad is None else max_bad,
    )
    print_summary(result, as_json, output)


@app.command()
def shard(
    source: Annotated[Path, typer.Argument(help="rows in any format that training reads")],
    output: Annotated[Path, typer.Argument(help="folder of .tar shards to write; goes on where it stopped")],
    rows_per_shard: Annotated[int, typer.Option(min=1, help="rows of each shard")] = 10_000,
    format: Annotated[str, typer.Option(help="as for convert")] = "auto",
    image_root: ImageRoot = None,
    workers: Annotated[int, typer.Option(min=0, help="processes that write")] = 0,
    as_json: AsJson = False,
) -> None:
    """Pack rows and their images into a few large .tar files, which training reads as they are.

    [bold]Example[/]

      mllm data shard mix.jsonl mix-shards --image-root photos --workers 8
    """
    from mllm.data.shard_writer import write_shards

    result = write_shards(
        source,
        output,
        rows_per_shard=rows_per_shard,
        format=format,
        image_root=image_root,
        workers=workers,
    )
    print_summary(result, as_json, output)


@app.command()
def generate(
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
    from data_gen.generate import generate as run
    from data_gen.teachers import KINDS, TEACHERS

    if teacher not in TEACHERS:
        raise ConfigError(f"unknown teacher {teacher!r}; use {', '.join(TEACHERS)}")
    contexts = read_coco(captions, instances)
    summary = run(contexts, TEACHERS[teacher](), kind or KINDS, output, seed)
    print_summary(summary, as_json, output)


@app.command()
def capfilt(
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

    speaker, judge = load_model(captioner, device), load_model(filter, device, answers=False)
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
    print_summary(summary, as_json, output)


@app.command()
def inspect(
    recipe: RecipeName,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="how many rows to show")] = 3,
    start: Annotated[int, typer.Option(min=0, help="first row")] = 0,
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
    from mllm.training.streams import open_stream

    config = load_recipe(recipe, overrides or [])
    section = config.data
    if config.on_pairs:
        raise ConfigError(f"{recipe}: the stage {config.stage} has pairs and no conversations to show")
    processor = build_processor(config.model)
    console = Console(highlight=False)
    if not as_json:
        console.print(legend())
    for source in section.sources:
        if section.streaming:
            shown = list(islice(open_stream(section, config.train.seed).once(), start, start + rows))
        else:
            data = open_rows(source.path, source.format or "auto", source.image_root)
            if start >= len(data):
                raise ConfigError(f"--start is {start}, but {source.path} has {len(data)} rows")
            shown = data[start : start + rows]
        if not shown:
            raise ConfigError(f"--start is {start}, but {source.path} has not so many rows")
        for row in shown:
            if as_json:
                typer.echo(json.dumps(spans_as_json(processor, row, section.max_length)))
            else:
                console.print(row_panel(processor, row, section.max_length))


@app.command()
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="processes; default: the recipe's train.num_workers")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look at every row as training would, pictures included, and list all that is wrong.

    The exit code is 0 only if no row is bad. `mllm train --preflight` tries the model as well.

    [bold]Example[/]

      mllm data check quickstart/instruct --workers 2
    """
    from mllm.config import load_recipe
    from mllm.data.check import check_rows
    from mllm.training.preflight import open_data

    config = load_recipe(recipe, overrides or [])
    if config.data.streaming:
        raise ConfigError(f"{recipe}: a stream is not read ahead; add data.streaming=false to check it")
    rows, collator = open_data(config)
    train = config.train
    found = check_rows(
        rows,
        collator,
        workers=train.num_workers if workers is None else workers,
        keep=train.per_device_batch_size,
    )
    record = found.record()
    if as_json:
        typer.echo(json.dumps(record))
    else:
        for one in found.bad[:20]:
            typer.echo(f"{one['row']}: {one['fault']}")
        for key in ("rows", "pictures", "over", "dropped", "empty", "first_empty"):
            if record[key] != "":
                typer.echo(f"{key}: {record[key]}")
        typer.echo(f"longest row: {found.tokens} tokens")
        typer.echo(f"bad: {len(found.bad)}{' (--json lists all)' if len(found.bad) > 20 else ''}")
    raise typer.Exit(bool(found.bad))
