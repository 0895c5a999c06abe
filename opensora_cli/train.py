"""`osora train`: data in, weights out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from opensora_cli import options
from opensora_cli.console import console
from opensora_cli.options import FROM_PRESET, OUTPUT

TRAINING = "How it is trained"

EXAMPLES = """
[bold]Examples[/]

[cyan]osora train --preset tiny --data world[/]

[cyan]osora train --resume --export my-model[/]

[cyan]osora sample --model my-model --prompt 'a red ball rolling to the right over green grass'[/]
"""


def train(
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="The run: its settings, checkpoints, metrics and weights.",
            show_default="runs/PRESET",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Then write a model for 'osora sample --model' here, in half the bytes.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What to learn from; 'world' makes its clips as it goes.",
            autocompletion=lambda: ["world"],
            rich_help_panel=TRAINING,
        ),
    ] = "world",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar="",
            help="Go on with the run in --output, with the settings that it was started with.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
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
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Same seed, same run.", show_default=FROM_PRESET, rich_help_panel=TRAINING),
    ] = None,
    preset: options.PresetOpt = None,
    config: options.ConfigOpt = None,
    set_: options.SetOpt = None,
    device: options.DeviceOpt = None,
    print_config: options.PrintConfigOpt = False,
    json: options.JsonOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Train a model from nothing, or go on with a run.

    A run can be stopped at any moment (Ctrl-C, SIGTERM, even kill -9) and goes
    on with --resume as if it had never been.
    """
    flags: dict[str, Any] = {
        "train.max_steps": steps,
        "train.batch_size": batch_size,
        "train.lr": lr,
        "train.seed": seed,
        "runtime.device": device,
    }
    output = output or Path("runs") / (preset or options.DEFAULT_PRESET)
    saved = options.saved_settings(output) if resume and preset is None else None
    base = preset if saved else preset or options.DEFAULT_PRESET
    settings, origins = options.resolve(base, config, set_, flags, saved)
    if print_config:
        options.print_config(settings, origins)
        return

    from opensora_core import training

    if export is not None:
        training.check_export(export)
    console.follow(training.train(settings, output=output, data=data, resume=resume))
    if export is not None:
        training.export(output, export)
    console.notice(f"the model is ready: osora sample --model {export or output} --prompt 'a red ball'")
