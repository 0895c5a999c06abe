"""`osora caption`: clips in, the same clips with words out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from opensora_cli import options
from opensora_cli.console import RENDERERS, Console, console, duration, printable
from opensora_cli.options import OUTPUT, RUNTIME
from opensora_core.config import CaptionConfig
from opensora_core.errors import UsageError
from opensora_core.files import readable

CAPTIONER = "What describes"
ASKING = "How it is asked"
FINISHING = "What becomes of captions"

_DEFAULTS = CaptionConfig()

EXAMPLES = """
[bold]Examples[/]

[cyan]osora caption data/ --dry-run[/]

[cyan]osora caption data/ --clean --camera --preview 50[/]

[cyan]osora caption data/ --model openai:llava --base-url http://localhost:8000/v1[/]

[cyan]osora caption ucf101/ --model labels --output ucf101/captions.jsonl[/]

[cyan]osora train --data data/captions.jsonl --dry-run[/]
"""


def caption(
    manifest: Annotated[
        Path,
        typer.Argument(
            metavar="MANIFEST",
            help="Clips: a manifest, the folder that split wrote, a folder of videos, or one video.",
            show_default=False,
        ),
    ],
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|PATH|hf:OWNER/REPO|openai:NAME",
            help="tiny, labels (class folders), sidecars (.txt, .json), a model of transformers, or one of a server.",
            autocompletion=lambda: ["tiny", "labels", "sidecars", "hf:", "openai:"],
            show_default="LLaVA-NeXT 7B",
            rich_help_panel=CAPTIONER,
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Of a server that speaks the OpenAI protocol; its key is OPENAI_API_KEY of the environment.",
            show_default="OpenAI's",
            rich_help_panel=CAPTIONER,
        ),
    ] = None,
    quantise: Annotated[
        Literal["none", "8bit", "4bit"] | None,
        typer.Option(help="Keep the weights in fewer bits.", show_default="none", rich_help_panel=CAPTIONER),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Frames of a clip that are shown; --set caption.at='20% 50% 80%' says which.",
            show_default="3",
            rich_help_panel=ASKING,
        ),
    ] = None,
    layout: Annotated[
        Literal["auto", "separate", "grid"] | None,
        typer.Option(
            help="Frames as pictures of their own, or in one; auto suits the model.",
            show_default=_DEFAULTS.layout,
            rich_help_panel=ASKING,
        ),
    ] = None,
    prompt: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What to ask.", show_default="ours", rich_help_panel=ASKING),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="0 takes the likeliest word; 1 draws as the model would.",
            show_default=f"{_DEFAULTS.temperature:g}",
            rich_help_panel=ASKING,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Longest caption.", show_default="220", rich_help_panel=ASKING),
    ] = None,
    clean: Annotated[
        bool | None,
        typer.Option(
            "--clean",
            metavar="",
            help="Take off 'The video shows', half sentences and repetitions.",
            show_default=False,
            rich_help_panel=FINISHING,
        ),
    ] = None,
    camera: Annotated[
        bool | None,
        typer.Option(
            "--camera",
            metavar="",
            help="Say how the camera moves, from optical flow, where the caption does not.",
            show_default=False,
            rich_help_panel=FINISHING,
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            metavar="CODE",
            help="Such as en: leave out captions that are clearly in another language.",
            show_default=False,
            rich_help_panel=FINISHING,
        ),
    ] = None,
    config: options.ConfigOpt = None,
    set_: options.SetOpt = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="JSON lines, which train reads.",
            show_default="captions.jsonl beside the manifest",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    redo: Annotated[
        bool,
        typer.Option(
            "--redo", metavar="", help="Describe all clips anew, also those with captions.", rich_help_panel=OUTPUT
        ),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed", metavar="", help="Describe those that got no caption before.", rich_help_panel=OUTPUT
        ),
    ] = False,
    preview: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Write a page with frames and captions of N clips.", rich_help_panel=OUTPUT
        ),
    ] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Clips described together.",
            show_default="8 on a GPU, 4 on a CPU",
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Processes, each with a GPU of its own.", show_default="1", rich_help_panel=RUNTIME
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Requests that a server gets at a time.",
            show_default=f"{_DEFAULTS.requests}",
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    engine: options.CrewOpt = None,
    ray_address: options.RayAddressOpt = None,
    device: options.DeviceOpt = None,
    dtype: options.DTypeOpt = None,
    offline: options.OfflineOpt = None,
    dry_run: options.DryRunOpt = False,
    print_config: options.PrintConfigOpt = False,
    json: options.JsonOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Describe clips in words, for training.

    A line is written as soon as a clip is described. A run that was stopped goes
    on when it is repeated; captions that are there already are kept.
    """
    flags: dict[str, Any] = {
        "caption.model": model,
        "caption.base_url": base_url,
        "caption.quantise": quantise,
        "caption.frames": frames,
        "caption.layout": layout,
        "caption.prompt": None if prompt is None else str(prompt),
        "caption.temperature": temperature,
        "caption.max_tokens": max_tokens,
        "caption.clean": clean,
        "caption.camera": camera,
        "caption.language": language,
        "caption.batch_size": batch_size,
        "caption.gpus": gpus,
        "caption.requests": requests,
        "caption.engine": engine,
        "caption.ray_address": ray_address,
        "runtime.device": device,
        "runtime.dtype": dtype,
        "runtime.offline": offline,
    }
    settings, origins = options.resolve(None, config, set_, flags)
    if print_config:
        options.print_config(settings, origins)
        return
    _require_use(settings.caption.model, {name.rpartition(".")[2]: value for name, value in flags.items()})

    from opensora_core.curation import captions

    request = captions.CaptionRequest(
        source=manifest, output=output, redo=redo, retry_failed=retry_failed, preview=preview
    )
    console.follow(captions.examine(settings, request) if dry_run else captions.caption(settings, request))


def _require_use(model: str, given: dict[str, Any]) -> None:
    """Refuse flags that would do nothing."""
    kind = model.partition(":")[0]
    idle: tuple[str, ...]
    if kind in ("labels", "sidecars"):
        idle = (
            *("base_url", "quantise", "frames", "layout", "prompt", "temperature", "max_tokens", "batch_size"),
            *("gpus", "requests", "device", "dtype"),
        )
    elif kind == "openai":
        idle = ("quantise", "batch_size", "gpus", "device", "dtype")
    else:
        idle = ("base_url", "requests")
    for name in idle:
        if given[name] is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} says nothing to --model {model}", f"leave {flag} out")


# how its events look ---------------------------------------------------------------------------------------------


def _show_loading(screen: Console, event: Any) -> None:
    size = f" {readable(event.done)} of {readable(event.total)}" if event.total else ""
    screen.draw(f"loading {event.what}{size}")


def _show_progress(screen: Console, event: Any) -> None:
    speed = f"{event.clips_per_second:.2f} clips/s, {event.tokens_per_second:.0f} tokens/s"
    screen.draw(f"{speed}  {event.text}", event.done, event.total, event.seconds_left)


def _show_rejected(screen: Console, event: Any) -> None:
    screen.above(f"{event.status}: ", f"{event.clip}: {event.reason}", "yellow")


def _show_done(screen: Console, event: Any) -> None:
    screen.stop_progress()
    rows: list[tuple[object, ...]] = [
        (what, count)
        for what, count in (
            ("described", event.captioned),
            ("described before", event.finished_before),
            ("had a caption", event.kept),
            ("left out by an earlier step", event.passed),
            *((f"no caption: {reason}", count) for reason, count in event.rejected.items()),
        )
        if count
    ]
    screen.table(f"captions in {duration(event.seconds)}", ("clips", "how many"), rows)
    if event.tokens_in or event.tokens_out:
        cost = f", at a cost of {event.cost:.2f}" if event.cost else ""
        screen.text(f"{event.tokens_in} tokens read, {event.tokens_out} written{cost}")
        screen.text(
            f"{event.clips_per_second:.2f} clips/s, {event.tokens_per_second:.0f} tokens/s; "
            f"{event.outside:.0%} of the time outside the model"
        )
    if event.kept and not event.captioned:
        screen.text("captions that the manifest has are kept; --redo describes their clips anew")
    if event.rejects and not event.captioned:
        screen.text("--retry-failed tries those without one again")
    for label, path in (("rejects", event.rejects), ("preview", event.preview), ("captions", event.output)):
        if path is not None:
            screen.text(f"{label}: {printable(path)}")


def _show_plan(screen: Console, event: Any) -> None:
    screen.stop_progress()
    for message in event.notices:
        screen.notice(message)
    rows: list[tuple[object, ...]] = [
        ("read as", event.source),
        ("captioner", event.captioner),
        ("clips", event.clips),
        ("to describe", event.todo),
        ("described before", event.finished),
        ("have a caption", event.kept),
        ("left out by an earlier step", event.passed),
        ("failed before, for --retry-failed", event.rejected),
    ]
    if event.tokens:
        rows.append(("tokens written, at most", event.tokens))
    if event.cost:
        rows.append(("cost of these, at most", f"{event.cost:.2f}"))
    screen.table("what it would do", ("what", "value"), [row for row in rows if row[1]])
    if event.prompt:
        screen.text(f"prompt: {event.prompt}")
    screen.text(f"would write to {printable(event.output)}")


RENDERERS.update(
    {
        "CaptionLoading": _show_loading,
        "CaptionProgress": _show_progress,
        "CaptionRejected": _show_rejected,
        "CaptionDone": _show_done,
        "CaptionPlan": _show_plan,
    }
)
