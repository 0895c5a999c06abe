"""`osora sample`: prompts in, videos out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from opensora_cli import launch, options
from opensora_cli.console import console
from opensora_cli.options import FROM_PRESET, OUTPUT, RUNTIME
from opensora_core.errors import InputError, UsageError

PROMPTS = "What to make"
DRAWING = "How it is drawn"

SAMPLERS = ("iddpm", "ddim", "dpm-solver", "dpm-solver++", "unipc", "euler", "heun")
"""The names of `opensora_core.diffusion.SAMPLERS`, which would import torch; a test compares them."""

EXAMPLES = """
[bold]Examples[/]

[cyan]osora sample --prompt 'a red ball rolling to the right over green grass'[/]

[cyan]osora sample --prompt 'a blue cube over snow' --num-samples 8 --sheet --output snow/[/]

[cyan]osora sample --prompt-file prompts.txt --preset 16x256x256 --device cuda --compile[/]

[cyan]osora sample --model opensora-v1-hq-16x512x512 --prompt 'waves at dusk' --dry-run[/]

[cyan]osora sample --prompt-file prompts.txt --preset 64x512x512 --gpus 8 --parallel cfg=2,sequence=4[/]
"""


def sample(
    *,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="What to show; for class models a class by name or number. Repeatable.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompt-file",
            metavar="FILE",
            help="One prompt a line; blank lines and # comments are skipped, - reads stdin.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            "--num-samples",
            "-n",
            metavar="N",
            help="Videos per prompt.",
            show_default=FROM_PRESET,
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Frames of a video; 1 makes images.", show_default=FROM_PRESET, rich_help_panel=PROMPTS
        ),
    ] = None,
    size_: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="HxW",
            help="Height and width in pixels.",
            show_default=FROM_PRESET,
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Frames per second of the file.", show_default=FROM_PRESET, rich_help_panel=PROMPTS
        ),
    ] = None,
    model: options.ModelOpt = None,
    lora: Annotated[
        str | None,
        typer.Option(
            "--lora",
            metavar="PATH",
            help="A LoRA for the model: its folder, or the run that trained it; --set model.lora_scale=X weighs it.",
            rich_help_panel=options.SETTINGS,
        ),
    ] = None,
    preset: options.PresetOpt = None,
    config: options.ConfigOpt = None,
    set_: options.SetOpt = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Evaluations of the sampler: more is slower and finer.",
            show_default=FROM_PRESET,
            rich_help_panel=DRAWING,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="How strictly to follow the prompt; 1 does not push.",
            show_default=FROM_PRESET,
            rich_help_panel=DRAWING,
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"The method: {', '.join(SAMPLERS)}.",
            autocompletion=lambda: list(SAMPLERS),
            show_default=FROM_PRESET,
            rich_help_panel=DRAWING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Same seed, same video, in whatever batch.",
            show_default=FROM_PRESET,
            rich_help_panel=DRAWING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Videos drawn at once: memory against time, never the result.",
            show_default=FROM_PRESET,
            rich_help_panel=DRAWING,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A file or a folder.",
            show_default="samples/",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    format_: Annotated[
        Literal["mp4", "gif", "webp", "png"] | None,
        typer.Option(
            "--format",
            help="Kind of file.",
            show_default="by --output, else mp4; png for images",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace files that are there.", rich_help_panel=OUTPUT)
    ] = False,
    sheet: Annotated[
        bool,
        typer.Option("--sheet", metavar="", help="Also one PNG with frames of all samples.", rich_help_panel=OUTPUT),
    ] = False,
    device: options.DeviceOpt = None,
    dtype: options.DTypeOpt = None,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile",
            metavar="",
            help="Compile the model first: worth it for many videos.",
            show_default=False,
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    offload: Annotated[
        bool | None,
        typer.Option(
            "--offload",
            metavar="",
            help="Keep on the device only the part that is computing.",
            show_default=False,
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    offline: options.OfflineOpt = None,
    gpus: options.GpusOpt = None,
    parallel: options.ParallelOpt = None,
    print_config: options.PrintConfigOpt = False,
    dry_run: options.DryRunOpt = False,
    json: options.JsonOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Make videos (or images) that follow prompts.

    Without --model and --preset the model that ships is used. It needs no
    network and no GPU, and knows a small world of moving, coloured shapes.
    """
    height, width = options.parse_size(size_)
    flags: dict[str, Any] = {
        "model.weights": model,
        "model.lora": lora,
        "video.num_frames": frames,
        "video.height": height,
        "video.width": width,
        "sampling.steps": steps,
        "sampling.guidance": guidance,
        "sampling.sampler": sampler,
        "sampling.seed": seed,
        "sampling.num_samples": num_samples,
        "sampling.batch_size": batch_size,
        "runtime.device": device,
        "runtime.dtype": dtype,
        "runtime.compile": compile_,
        "runtime.offload": offload,
        "runtime.offline": offline,
        **options.parse_axes(parallel),
    }
    wish = launch.wished(gpus=gpus, nodes=None, hostfile=None, submit=False, max_restarts=None)
    base, saved = options.base(preset, model)
    if saved is not None:  # how many trained a model says nothing about how many sample from it
        saved = {path: value for path, value in saved.items() if not path.startswith("parallel.")}
    settings, origins = options.resolve(base, config, set_, flags, saved)
    if fps is not None:
        flags["video.source_fps"] = fps * settings.video.frame_interval
        settings, origins = options.resolve(base, config, set_, flags, saved)
    if print_config:
        options.print_config(settings, origins)
        return
    if str(prompt_file) == "-" and (wish.is_many or launch.is_started()):
        raise UsageError("several processes cannot read prompts from one stdin", "--prompt-file takes a file")
    prompts = [*(prompt or []), *(read_prompts(prompt_file) if prompt_file else [])]
    if not prompts:
        raise InputError(
            f"{prompt_file} holds no prompt" if prompt_file else "there is no prompt",
            "say what to show: --prompt 'a red ball rolling to the right over green grass'",
        )

    from opensora_core import sampling

    processes = gpus if gpus is not None and wish.is_many else 0
    plan = sampling.plan(settings, prompts, output, format_, overwrite, processes=processes)
    folder = plan.requests[0].path.parent
    if launch.launched_many(wish, folder, settings, output=output or folder, dry_run=dry_run):
        return
    if not dry_run:
        launch.as_rank(folder)
        console.follow(sampling.sample(settings, plan, sheet=sheet))
    elif launch.is_first():
        console.show(plan)


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a UTF-8 file, one a line; `-` is stdin. Blank lines and lines that begin with # are skipped.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")  # not splitlines: U+2028 may be part of a prompt
    except OSError as error:
        raise InputError(
            f"cannot read prompts from {path}: {error.strerror}", "--prompt-file takes a text file"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}",
            f"convert it with: iconv -t utf-8 {path}",
        ) from None
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]
