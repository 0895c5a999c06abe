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

SUITE_NAMES = {"world": "how well the model that ships follows its prompts"}
QUICK_PROMPTS = 24

EXAMPLES = """
[bold]Examples[/]

[cyan]osora bench world[/]

[cyan]osora bench world --model my-model --output world.json[/]
"""


def bench(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE",
            help="What to measure: world.",
            autocompletion=lambda: list(SUITE_NAMES.items()),
            show_default=False,
        ),
    ],
    *,
    model: options.ModelOpt = None,
    prompts: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts per split.", rich_help_panel=RUNTIME)] = 240,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Samples per prompt.", rich_help_panel=RUNTIME)] = 2,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            metavar="",
            help=f"A first look: {QUICK_PROMPTS} prompts, once.",
            rich_help_panel=RUNTIME,
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Also write the numbers as JSON.", rich_help_panel=OUTPUT),
    ] = None,
    config: options.ConfigOpt = None,
    set_: options.SetOpt = None,
    device: options.DeviceOpt = None,
    json: options.JsonOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Measure, in one command, what the documentation claims."""
    if suite not in SUITE_NAMES:
        raise UsageError(f"unknown suite '{suite}'", nearest(suite, SUITE_NAMES))
    preset, saved = options.base(None, model)
    flags = {"model.weights": model, "runtime.device": device}
    # larger batches than a user wants, unless one says otherwise: nobody waits for the first sample
    words = ["sampling.batch_size=16", *(set_ or [])]
    settings, _ = options.resolve(preset, config, words, flags, saved)
    if quick:
        prompts, seeds = min(prompts, QUICK_PROMPTS), 1

    from opensora_core.bench import SUITES, Measurement

    found: list[Any] = []

    def kept() -> Any:
        for event in SUITES[suite](settings, prompts=prompts, seeds=seeds):
            if isinstance(event, Measurement):
                found.append(event)
                if not console.as_json:
                    continue
            yield event

    console.follow(kept())
    if not console.as_json:
        rows = [(f"{item.case}: {item.metric}", f"{item.value:.3f}", item.unit, item.count) for item in found]
        console.table(f"bench {suite}", ("measured", "value", "unit", "of"), rows)
    if output is not None:
        from opensora_core.bench.machine import describe
        from opensora_core.files import write_bytes

        report = {"suite": suite, **describe(settings), "measurements": plain(found)}
        write_bytes(output, (json_format.dumps(report, indent=1) + "\n").encode())
