"""`osora train`: data in, weights out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from opensora_cli import launch, options
from opensora_cli.console import console
from opensora_cli.options import FROM_PRESET, OUTPUT, REPORT, RUNTIME
from opensora_core import presets
from opensora_core.config import Config
from opensora_core.errors import UsageError, nearest
from opensora_core.runs import is_recipe

DATA = "What it learns from"
TRAINING = "How it is trained"

BARE = {"--resume": "", "--dry-run": "check"}
"""Flags that may stand alone, and what they mean then."""

EXAMPLES = """
[bold]Examples[/]

[cyan]osora train --data clips/ --dry-run[/]

[cyan]osora train --stage 2 --data clips.jsonl --output runs/mine[/]

[cyan]osora train --resume runs/mine[/]

[cyan]osora sample --model runs/mine --prompt 'waves against a cliff'[/]

[cyan]osora train --preset tiny --data world[/]
"""


def train(
    *,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="[STAGE=]PATH",
            help="A manifest, a folder of clips, or 'world'. In a recipe it may be of one stage: 3=best.jsonl.",
            autocompletion=lambda: ["world"],
            show_default=FROM_PRESET,
            rich_help_panel=DATA,
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep what the encoders make of clips and captions here, and train from that.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    cache_only: Annotated[
        bool, typer.Option("--cache-only", metavar="", help="Fill the cache and stop.", rich_help_panel=DATA)
    ] = False,
    max_rejects: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Share of broken clips beyond which the run stops.",
            show_default="0.05",
            rich_help_panel=DATA,
        ),
    ] = None,
    stage: Annotated[
        int | None,
        typer.Option(
            metavar="1|2|3",
            help="Of the published training: images, videos, high quality. --preset chooses a size of it.",
            autocompletion=lambda: ["1", "2", "3"],
            show_default=False,
            rich_help_panel=TRAINING,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Stages one after the other: three-stages.",
            autocompletion=lambda: list(presets.RECIPES),
            show_default=False,
            rich_help_panel=TRAINING,
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH|hf:OWNER/REPO",
            help="Weights to start from, as --model of sample; '' for none.",
            autocompletion=options.model_names,
            show_default=FROM_PRESET,
            rich_help_panel=TRAINING,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Steps of the model.", show_default=FROM_PRESET, rich_help_panel=TRAINING),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Clips of a step.", show_default=FROM_PRESET, rich_help_panel=TRAINING),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(metavar="X", help="Learning rate of AdamW.", show_default=FROM_PRESET, rich_help_panel=TRAINING),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Train an adapter of this rank instead of the weights.",
            show_default="0",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Same seed, same run.", show_default=FROM_PRESET, rich_help_panel=TRAINING),
    ] = None,
    preset: options.PresetOpt = None,
    config: options.ConfigOpt = None,
    set_: options.SetOpt = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="The run: its settings, checkpoints and metrics.",
            show_default="runs/PRESET-TIME",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[PATH]",
            help="Go on with a run, a checkpoint of one or a recipe: the one named, in --output, or in this folder.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(metavar="N", help="Checkpoints to keep.", show_default=FROM_PRESET, rich_help_panel=OUTPUT),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Then write a model for 'osora sample --model' here, in a fraction of the bytes.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    dry_run: Annotated[
        str | None,
        typer.Option(
            "--dry-run",
            metavar="[=measure]",
            help="Examine data and settings and say what would be done; =measure also times a few steps.",
            show_default=False,
            rich_help_panel=REPORT,
        ),
    ] = None,
    write_manifest: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --dry-run: write the clips down as they were counted, as .jsonl, .csv or .parquet.",
            show_default=False,
            rich_help_panel=REPORT,
        ),
    ] = None,
    device: options.DeviceOpt = None,
    dtype: options.DTypeOpt = None,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile", metavar="", help="Compile the blocks first.", show_default=False, rich_help_panel=RUNTIME
        ),
    ] = None,
    gpus: options.GpusOpt = None,
    nodes: options.NodesOpt = None,
    hostfile: options.HostfileOpt = None,
    submit: options.SubmitOpt = False,
    max_restarts: options.MaxRestartsOpt = None,
    parallel: options.ParallelOpt = None,
    engine: options.EngineOpt = None,
    print_config: options.PrintConfigOpt = False,
    json: options.JsonOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Train or fine-tune a model on captioned clips, or go on with a run.

    A run can be stopped at any moment (Ctrl-C, SIGTERM, even kill -9) and goes
    on with --resume as if it had never been.
    """
    flags: dict[str, Any] = {
        "data.cache": None if cache is None else str(cache),
        "data.max_rejects": max_rejects,
        "train.init": init,
        "train.max_steps": steps,
        "train.batch_size": batch_size,
        "train.lr": lr,
        "train.lora_rank": lora_rank,
        "train.seed": seed,
        "train.keep_checkpoints": keep,
        "runtime.device": device,
        "runtime.dtype": dtype,
        "runtime.compile": compile_,
        "parallel.engine": engine,
        **options.parse_axes(parallel),
    }
    wish = launch.wished(gpus=gpus, nodes=nodes, hostfile=hostfile, submit=submit, max_restarts=max_restarts)
    _check_words(
        resume=resume, recipe=recipe, stage=stage, preset=preset, dry_run=dry_run, write_manifest=write_manifest
    )
    if recipe is not None and (cache_only or write_manifest is not None):
        raise UsageError(
            "--cache-only and --write-manifest are for one run, not for a recipe", "name a --stage instead"
        )
    if recipe is not None:
        _recipe(
            recipe,
            data or [],
            config=config,
            words=set_,
            flags=flags,
            output=output,
            dry_run=dry_run,
            export=export,
            print_config=print_config,
            wish=wish,
        )
        return
    if data is not None:
        if len(data) > 1:
            raise UsageError(f"--data is given {len(data)} times", "several are for the stages of a --recipe")
        flags["data.source"] = data[0]
    run = _resumed(resume, output) if resume is not None else output
    if run is not None and resume is not None and is_recipe(run):
        given = [data, config, set_, preset, export, *(None if value is None else True for value in flags.values())]
        _resume_recipe(run, wish, alone=not any(given))
        return
    saved = options.saved_settings(run) if run is not None and resume is not None else None
    name = preset or (None if saved else presets.STAGES[stage][0] if stage else options.DEFAULT_PRESET)
    settings, origins = options.resolve(name, config, set_, flags, saved)
    if print_config:
        options.print_config(settings, origins)
        return
    run = run or _new_run(str(name))
    home = Path(settings.data.cache) if cache_only and settings.data.cache else run
    if launch.launched_many(wish, home, settings, dry_run=dry_run is not None):
        return
    launch.as_rank(home)

    from opensora_core import training

    if dry_run is not None:
        console.follow(training.examine(settings, measure=dry_run == "measure", write_manifest=write_manifest))
    elif cache_only:
        console.follow(training.fill_cache(settings))
    else:
        _train(settings, run, resume=resume is not None, export=export)


def _train(settings: Config, run: Path, *, resume: bool, export: Path | None) -> None:
    """Train one model, and say what it is good for."""
    from opensora_core import training

    if export is not None:
        training.check_export(export)
    console.follow(training.train(settings, output=run, resume=resume))
    if not launch.is_first():
        return
    if export is not None:
        training.export(run, export)
    console.notice(f"the model is ready: osora sample --model {export or run} --prompt {_example(settings)}")


def _resume_recipe(run: Path, wish: launch.Wish, *, alone: bool) -> None:
    """Go on with a recipe; `alone` says that nothing else was asked for."""
    from opensora_core import training

    if not alone:
        raise UsageError(
            "a recipe goes on with the settings that it began with", f"osora train --resume {run}, and nothing else"
        )
    if wish.is_many and launch.launched_many(wish, run, training.read_recipe(run)[0].config):
        return
    launch.as_rank(run)
    console.follow(training.train_recipe([], output=run, resume=True))


def _check_words(
    *,
    resume: str | None,
    recipe: str | None,
    stage: int | None,
    preset: str | None,
    dry_run: str | None,
    write_manifest: Path | None,
) -> None:
    """Refuse flags that contradict each other."""
    if dry_run not in (None, "check", "measure"):
        raise UsageError(f"--dry-run={dry_run} is unknown", "--dry-run, or --dry-run=measure")
    if write_manifest is not None and dry_run is None:
        raise UsageError("--write-manifest is for --dry-run, which counts the clips", "add --dry-run")
    if recipe is not None:
        if recipe not in presets.RECIPES:
            raise UsageError(f"unknown recipe '{recipe}'", nearest(recipe, presets.RECIPES))
        if stage is not None or preset is not None:
            raise UsageError("a recipe has its own stages", "leave out --stage and --preset")
        if resume is not None:
            raise UsageError("a recipe that is resumed is known already", "osora train --resume FOLDER")
    if stage is not None:
        if stage not in presets.STAGES:
            raise UsageError(f"there is no stage {stage}", "--stage 1, 2 or 3")
        if preset is not None and preset not in presets.STAGES[stage]:
            raise UsageError(
                f"the preset '{preset}' is none of stage {stage}", f"--preset {' or '.join(presets.STAGES[stage])}"
            )


def _recipe(
    name: str,
    data: list[str],
    *,
    config: Path | None,
    words: list[str] | None,
    flags: dict[str, Any],
    output: Path | None,
    dry_run: str | None,
    export: Path | None,
    print_config: bool,
    wish: launch.Wish,
) -> None:
    """Resolve every stage of a recipe, and train them."""
    chapters: list[tuple[str, Config]] = []
    for preset in presets.RECIPES[name]:
        own = {**flags, "data.source": _data_of(data, preset)}
        if chapters:
            own["train.init"] = None  # what the stage before made
        settings, origins = options.resolve(preset, config, words, own)
        chapters.append((preset, settings))
        if print_config:
            options.print_config(settings, origins)
    if print_config:
        return
    run = output or _new_run(name)
    if launch.launched_many(wish, run, chapters[0][1], dry_run=dry_run is not None):
        return
    launch.as_rank(run)

    from opensora_core import training

    if dry_run is not None:
        for _, settings in chapters:
            console.follow(training.examine(settings, measure=dry_run == "measure"))
        return
    if export is not None:
        training.check_export(export)
    console.follow(training.train_recipe([training.Chapter(*chapter) for chapter in chapters], output=run))
    if not launch.is_first():
        return
    last = run / f"{len(chapters)}-{chapters[-1][0]}"
    if export is not None:
        training.export(last, export)
    console.notice(f"the model is ready: osora sample --model {export or last} --prompt '...'")


def _data_of(data: list[str], preset: str) -> str | None:
    """What a stage of a recipe learns from: its own data, or else what is given for all."""
    found = None
    for word in data:
        key, equals, path = word.partition("=")
        if not equals or not (key.isdecimal() or key in presets.PRESETS):
            found = found or word
    for word in data:
        key, equals, path = word.partition("=")
        if equals and key in (preset, str(presets.stage_of(preset))):
            found = path
    return found


def _resumed(word: str, output: Path | None) -> Path:
    """The folder that --resume means."""
    if word:
        return Path(word)
    if output is not None:
        return output
    here = Path()
    if options.saved_settings(here) is not None or is_recipe(here):
        return here
    found = sorted(Path("runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    hint = f"osora train --resume {found[0].parent}" if found else "osora train --resume runs/NAME"
    raise UsageError("this folder holds no run to resume", hint)


def _new_run(name: str) -> Path:
    """A folder for a new run that no other has.

    Raises:
        UsageError: this is one of many processes, each of which would find another one.
    """
    if launch.is_started():
        raise UsageError("processes that torchrun starts write to one folder", "name it by --output")
    run = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    numbered, number = run, 2
    while numbered.exists():
        numbered, number = run.with_name(f"{run.name}-{number}"), number + 1
    return numbered


def _example(settings: Config) -> str:
    """A prompt to try a model with."""
    return "'a red ball'" if settings.data.source == "world" else "'...'"
