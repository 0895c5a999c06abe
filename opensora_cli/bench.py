"""`osora bench`: numbers that anyone can repeat."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer

from opensora_cli import options
from opensora_cli.console import console, plain
from opensora_cli.options import OUTPUT, RUNTIME
from opensora_core.errors import UsageError, nearest

SUITE_NAMES = {
    "world": "how well the model that ships follows its prompts",
    "train": "how fast a preset trains, and where its time and memory go",
    "data": "how fast training reads clips, against reading whole files",
    "split": "how well and how fast shots are found and cut out, against PySceneDetect",
    "scaling": "what several processes gain, or what a cluster would",
}
CLUSTER_NAMES = ["h100", "h200", "h800", "a100", "a100-25gbe"]
OWNERS = {"prompts": ("world",), "seeds": ("world",), "data": ("data", "split"), "plan": ("scaling",)}
"""Flags, and the suites that they are of."""

SOME_SUITES = "Of some suites"

EXAMPLES = """
[bold]Examples[/]

[cyan]osora bench world[/]

[cyan]osora bench world --model my-model --output world.json[/]

[cyan]osora bench train --preset 16x256x256 --set train.recompute=1[/]

[cyan]osora bench data --data clips/ --quick[/]

[cyan]osora bench split --quick[/]

[cyan]osora bench scaling --plan h100 --preset 64x512x512[/]
"""


def bench(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE",
            help=f"What to measure: {', '.join(SUITE_NAMES)}.",
            autocompletion=lambda: list(SUITE_NAMES.items()),
            show_default=False,
        ),
    ],
    *,
    model: options.ModelOpt = None,
    preset: options.PresetOpt = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", metavar="", help="A first look, in a minute or two.", rich_help_panel=RUNTIME),
    ] = False,
    prompts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="world: prompts per split.",
            show_default="240, or 24 with --quick",
            rich_help_panel=SOME_SUITES,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="world: samples per prompt.",
            show_default="2, or 1 with --quick",
            rich_help_panel=SOME_SUITES,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="data: a manifest or a folder of clips. split: a folder of videos with their labels.json.",
            show_default="what it makes",
            rich_help_panel=SOME_SUITES,
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="CLUSTER",
            help="scaling: tell how long a step takes on a cluster, by name or a TOML file; nothing is measured.",
            autocompletion=lambda: CLUSTER_NAMES,
            show_default=False,
            rich_help_panel=SOME_SUITES,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Also write the numbers as JSON.", rich_help_panel=OUTPUT),
    ] = None,
    config: options.ConfigOpt = None,
    set_: options.SetOpt = None,
    device: options.DeviceOpt = None,
    dtype: options.DTypeOpt = None,
    json: options.JsonOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Measure, in one command, what the documentation claims."""
    if suite not in SUITE_NAMES:
        raise UsageError(f"unknown suite '{suite}'", nearest(suite, SUITE_NAMES))
    words = {"prompts": prompts, "seeds": seeds, "data": data, "plan": plan}
    given = {name: value for name, value in words.items() if value}
    for name, value in given.items():
        if suite not in OWNERS[name]:
            raise UsageError(
                f"--{name} {value} says nothing to 'osora bench {suite}'",
                f"leave it out, or: osora bench {OWNERS[name][0]} --{name} {value}",
            )
    own = {"source" if name == "data" else name: value for name, value in given.items()}
    start, saved = options.base(preset, model)
    flags = {"model.weights": model, "runtime.device": device, "runtime.dtype": dtype}
    # larger batches than a user wants, unless one says otherwise: nobody waits for the first sample
    changes = ["sampling.batch_size=16", *(set_ or [])]
    settings, _ = options.resolve(start, config, changes, flags, saved)

    from opensora_core.bench import SUITES, Measurement, Notice

    found: list[Any] = []
    notices: list[str] = []

    def kept() -> Any:
        for event in SUITES[suite](settings, quick=quick, **own):
            if isinstance(event, Measurement):
                found.append(event)
                if not console.as_json:
                    continue
            elif isinstance(event, Notice):
                notices.append(event.message)
            yield event

    console.follow(kept())
    if not console.as_json:
        rows = [(f"{item.case}: {item.metric}", _number(item.value), item.unit, item.count) for item in found]
        console.table(f"bench {suite}", ("measured", "value", "unit", "of"), rows)
    if output is not None:
        from opensora_core.bench.machine import describe
        from opensora_core.files import write_bytes

        report = {"suite": suite, **describe(settings, suite), "notices": notices, "measurements": plain(found)}
        write_bytes(output, (json_format.dumps(report, indent=1) + "\n").encode())


def _number(value: float) -> str:
    """Three digits behind the point are enough for shares and seconds, and none for what is counted in thousands."""
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
