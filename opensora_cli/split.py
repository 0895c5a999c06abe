"""`osora split`: raw videos in, clips and their manifest out."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import TaskID

from opensora_cli import options
from opensora_cli.console import RENDERERS, Console, console, duration, printable
from opensora_cli.options import OUTPUT, RUNTIME
from opensora_core.config import Config, FilterConfig, SplitConfig, iterate, with_settings
from opensora_core.errors import InputError, UsageError

FINDING = "Where to cut"
CLIPS = "What a clip is"
ENCODING = "How clips are written"
FILTERING = "Which clips are kept"

DETECTORS = ("auto", "content", "adaptive", "threshold", "histogram", "hash")
"""The names of `opensora_core.curation.DETECTORS`, which would import numpy and av; a test compares them."""

_DEFAULTS = SplitConfig()
_NAME_WIDTH = 32  # of a source beside its bar
_WAYS = {
    **dict.fromkeys(("fps", "short-side", "crop-black-bars"), ("exact",)),
    **dict.fromkeys(("codec", "codec-preset", "crf", "fast-decode"), ("exact", "smart")),
    "audio": ("exact", "smart", "copy"),
}
"""Flags, and the ways to cut that they say something to."""

EXAMPLES = """
[bold]Examples[/]

[cyan]osora split videos/ --dry-run[/]

[cyan]osora split videos/ --output data/ --preview[/]

[cyan]osora split 'raw/**/*.mkv' --cut smart --max-seconds 10 --output data/[/]

[cyan]find / -name '*.mp4' -print0 | osora split - --output data/[/]

[cyan]osora split videos/ --output data/ --filter --set filter.min_motion=0.3 --report[/]

[cyan]osora split data/ --only-filter --set filter.min_motion=0.5[/]

[cyan]osora train --data data/ --dry-run[/]
"""


def split(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Videos, folders (with all below them), globs, manifests; - reads a list from stdin.",
            show_default=False,
        ),
    ] = None,
    *,
    detector: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"What finds the cuts: {', '.join(DETECTORS)}.",
            autocompletion=lambda: list(DETECTORS),
            show_default=_DEFAULTS.detector,
            rich_help_panel=FINDING,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Of the detector; --set split.detector_options='NAME=X ...' reaches all that it has.",
            show_default="the detector's",
            rich_help_panel=FINDING,
        ),
    ] = None,
    fast: Annotated[
        bool | None,
        typer.Option(
            "--fast",
            metavar="",
            help="Look closely only around keyframes: several times faster, and misses some cuts.",
            show_default=False,
            rich_help_panel=FINDING,
        ),
    ] = None,
    boundaries: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Scenes from elsewhere (PySceneDetect, TransNetV2): a file of one video, or a folder of files.",
            show_default=False,
            rich_help_panel=FINDING,
        ),
    ] = None,
    min_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Shortest clip; shorter scenes are left out.",
            show_default=f"{_DEFAULTS.min_seconds:g}",
            rich_help_panel=CLIPS,
        ),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Longest clip; longer scenes become several, none of it is lost. 0: no limit.",
            show_default=f"{_DEFAULTS.max_seconds:g}",
            rich_help_panel=CLIPS,
        ),
    ] = None,
    trim: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Frames to drop on both sides of a cut or transition.",
            show_default=f"{_DEFAULTS.trim}",
            rich_help_panel=CLIPS,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Frames per second of clips.", show_default="the source's", rich_help_panel=CLIPS
        ),
    ] = None,
    short_side: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Pixels of the shorter side, never enlarged. 0: the source's.",
            show_default=f"{_DEFAULTS.short_side}",
            rich_help_panel=CLIPS,
        ),
    ] = None,
    crop_black_bars: Annotated[
        bool | None,
        typer.Option(
            "--crop-black-bars",
            metavar="",
            help="Cut off bars that are black throughout.",
            show_default=False,
            rich_help_panel=CLIPS,
        ),
    ] = None,
    audio: Annotated[
        bool | None,
        typer.Option("--audio/--no-audio", help="Keep the sound.", show_default="audio", rich_help_panel=CLIPS),
    ] = None,
    cut: Annotated[
        Literal["exact", "copy", "smart", "none"] | None,
        typer.Option(
            help="Encode anew; copy from keyframe on; copy, and encode the ends; or only list ranges of the sources.",
            show_default=_DEFAULTS.cut,
            rich_help_panel=ENCODING,
        ),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="libx264, libx265, h264_nvenc, ...; auto takes a hardware encoder if there is one.",
            autocompletion=lambda: ["libx264", "libx265", "h264_nvenc", "hevc_nvenc", "h264_videotoolbox", "auto"],
            show_default=_DEFAULTS.codec,
            rich_help_panel=ENCODING,
        ),
    ] = None,
    codec_preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Speed against size, from ultrafast to veryslow.",
            autocompletion=lambda: ["ultrafast", "veryfast", "faster", "fast", "medium", "slow"],
            show_default=_DEFAULTS.codec_preset,
            rich_help_panel=ENCODING,
        ),
    ] = None,
    crf: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Quality: 18 looks like the source, 23 is half the size.",
            show_default=f"{_DEFAULTS.crf}",
            rich_help_panel=ENCODING,
        ),
    ] = None,
    fast_decode: Annotated[
        bool | None,
        typer.Option(
            "--fast-decode",
            metavar="",
            help="Clips that training reads faster and that are larger.",
            show_default=False,
            rich_help_panel=ENCODING,
        ),
    ] = None,
    filter_: Annotated[
        bool | None,
        typer.Option(
            "--filter/--no-filter",
            help="Measure clips and leave out those beyond a limit; --set filter.min_motion=0.3 and others. "
            "A folder stays as it is filtered; --no-filter brings all clips back.",
            show_default="as the folder is",
            rich_help_panel=FILTERING,
        ),
    ] = None,
    only_filter: Annotated[
        bool,
        typer.Option(
            "--only-filter",
            metavar="",
            help="INPUT is a manifest or its folder: judge its clips, and those refused before, without splitting.",
            rich_help_panel=FILTERING,
        ),
    ] = False,
    why: Annotated[
        str | None,
        typer.Option(
            metavar="CLIP",
            help="Print the scores of a clip of the manifest INPUT, or of a file, with what each limit says.",
            show_default=False,
            rich_help_panel=FILTERING,
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            metavar="",
            help="Write a page with the spread of each score and clips on both sides of each limit.",
            rich_help_panel=FILTERING,
        ),
    ] = False,
    config: options.ConfigOpt = None,
    set_: options.SetOpt = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Clips and manifest; see docs/split.md.",
            show_default="split",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    redo: Annotated[
        bool,
        typer.Option("--redo", metavar="", help="Split again what is finished.", rich_help_panel=OUTPUT),
    ] = False,
    preview: Annotated[
        bool,
        typer.Option(
            "--preview",
            metavar="",
            help="Write a page with the cuts and clips of every source.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    stats: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Write the scores of every frame: a .csv or .parquet, or a folder with a CSV for each.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Processes.", show_default="one per core", rich_help_panel=RUNTIME),
    ] = None,
    engine: options.CrewOpt = None,
    ray_address: options.RayAddressOpt = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Split only this part of the sources, I from 0; all parts may write one folder at the same time.",
            show_default=False,
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    dry_run: options.DryRunOpt = False,
    print_config: options.PrintConfigOpt = False,
    json: options.JsonOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Split videos into clips for captioning and training.

    Every source and every frame is accounted for. A run that was stopped goes
    on when it is repeated, and ends with the same bytes.
    """
    flags: dict[str, Any] = {
        "split.detector": detector,
        "split.fast": fast,
        "split.min_seconds": min_seconds,
        "split.max_seconds": max_seconds,
        "split.trim": trim,
        "split.fps": fps,
        "split.short_side": short_side,
        "split.crop_black_bars": crop_black_bars,
        "split.audio": audio,
        "split.cut": cut,
        "split.codec": codec,
        "split.codec_preset": codec_preset,
        "split.crf": crf,
        "split.fast_decode": fast_decode,
        "split.workers": workers,
        "split.engine": engine,
        "split.ray_address": ray_address,
    }
    settings, origins = options.resolve(None, config, set_, flags)
    if threshold is not None:
        flags["split.detector_options"] = f"{settings.split.detector_options} threshold={threshold!r}".strip()
        settings, origins = options.resolve(None, config, set_, flags)
    if print_config:
        options.print_config(settings, origins)
        return
    if why is not None or only_filter:
        others = {"boundaries": boundaries, "stats": stats, "preview": preview, "redo": redo, "shard": shard}
        if why is not None:
            others |= {"output": output, "report": report, "dry-run": dry_run, "only-filter": only_filter}
        own = {name.removeprefix("split.").replace("_", "-"): value for name, value in flags.items()}
        own = {**own, "threshold": threshold, "detector-options": None, "workers": workers if why else None}
        _refuse("--why" if why is not None else "--only-filter", {**own, **others})
        limits = _filter_of(filter_, settings, origins, report=False)
        _filter_only(limits, inputs or [], output, why=why, report=report, dry_run=dry_run, workers=workers)
        return
    _require_use(settings.split.cut, {name: flags[f"split.{name.replace('-', '_')}"] for name in _WAYS})
    if not inputs:
        raise UsageError("there is nothing to split", "osora split videos/, or - for a list on stdin")
    words = [word for word in inputs if word != "-"]
    listed = read_list() if len(words) < len(inputs) else []

    limits = _filter_of(filter_, settings, origins, report=report)
    if limits is not None and workers is not None and origins.get("filter.workers") == "default":
        limits = with_settings(limits, {"workers": workers})

    from opensora_core import curation

    request = curation.Request(
        inputs=words,
        listed=listed,
        output=output or Path("split"),
        shard=None if shard is None else parse_shard(shard),
        boundaries=boundaries,
        stats=stats,
        preview=preview,
        redo=redo,
        filter=limits,
        report=report,
    )
    console.follow(curation.examine(settings.split, request) if dry_run else curation.split(settings.split, request))


def _filter_of(
    asked: bool | None, settings: Config, origins: Mapping[str, str], *, report: bool
) -> FilterConfig | None:
    """What clips are filtered with; None leaves a folder as it is. A setting of a filter asks for it."""
    if asked is False:
        return _without_limits(settings).filter
    return settings.filter if asked or _is_set(origins) or report else None


def _is_set(origins: Mapping[str, str]) -> bool:
    return any(path.startswith("filter.") and origin != "default" for path, origin in origins.items())


def _without_limits(settings: Config) -> Config:
    limits = [name for name, _ in iterate(settings.filter) if name.startswith(("min_", "max_"))]
    return with_settings(settings, {f"filter.{name}": 0.0 for name in limits})


def _filter_only(
    limits: FilterConfig | None,
    inputs: list[str],
    output: Path | None,
    *,
    why: str | None,
    report: bool,
    dry_run: bool,
    workers: int | None,
) -> None:
    """Filter the clips of a manifest, or tell about one of them.

    Raises:
        UsageError: not one manifest.
    """
    if len(inputs) != 1 and not (why is not None and not inputs):
        raise UsageError(
            f"a single manifest is filtered, and there are {len(inputs)}", "osora split data/ --only-filter"
        )

    from opensora_core.curation import filters

    if workers is not None:
        folder = output or (Path(inputs[0]) if Path(inputs[0]).is_dir() else Path(inputs[0]).parent)
        limits = with_settings(limits or filters.saved_settings(folder) or FilterConfig(), {"workers": workers})
    if why is not None:
        console.follow(filters.why(Path(inputs[0]) if inputs else None, why, limits))
    elif dry_run:
        console.follow(filters.examine(Path(inputs[0]), limits, output))
    else:
        console.follow(filters.apply(Path(inputs[0]), limits, output, report=report))


def _refuse(verb: str, given: Mapping[str, Any]) -> None:
    """Refuse flags that say nothing to those who are not splitting."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise UsageError(f"--{name} says nothing to {verb}, which splits nothing", f"leave --{name} out")


def _require_use(cut: str, given: dict[str, Any]) -> None:
    """Refuse flags that would do nothing."""
    for name, value in given.items():
        is_off = value is None or value is False or (value == 0 and name in ("fps", "short-side"))
        if not is_off and cut not in _WAYS[name]:
            raise UsageError(
                f"--{name} says nothing to --cut {cut}", f"--cut {' or '.join(_WAYS[name])}, or leave --{name} out"
            )


def read_list() -> list[str]:
    """Names on stdin: one a line, or parted by NUL bytes as `find -print0` does. They may be any bytes.

    Raises:
        InputError: there are none.
    """
    content = sys.stdin.buffer.read()
    parts = content.split(b"\0" if b"\0" in content else b"\n")
    names = [os.fsdecode(part.removesuffix(b"\r") if b"\0" not in content else part) for part in parts]
    if not (names := [name for name in names if name]):
        raise InputError("there is no name on stdin", "for example: ls videos/*.mp4 | osora split -")
    return names


def parse_shard(word: str) -> tuple[int, int]:
    """The two numbers of `I/N`.

    Raises:
        UsageError: not two numbers around a slash.
    """
    number, _, count = word.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise UsageError(f"--shard {word!r} is not I/N", "--shard 0/4 is the first of four")
    return int(number), int(count)


# how its events look ---------------------------------------------------------------------------------------------


def _show_progress(screen: Console, event: Any) -> None:
    """A bar for the whole job, and one for what each process does."""
    screen.draw("splitting")
    if (progress := screen.progress) is None:  # no terminal
        return
    speed = f", {event.speed:.1f}x realtime" if event.speed else ""
    left = "" if event.seconds_left is None else f"  {duration(event.seconds_left)} left"
    progress.update(
        TaskID(0),
        description=f"{event.done}/{event.total} sources{speed}",
        completed=event.done_seconds,
        total=max(event.total_seconds, 1e-9),
        count=f"{duration(event.done_seconds)}/{duration(event.total_seconds)}{left}",
    )
    for number, state in enumerate(event.workers, 1):
        name = Path(state.source).name if state.source else ""
        screen.draw_worker(number, name, width=_NAME_WIDTH, completed=state.fraction, count=state.phase or "waiting")


def _show_source(screen: Console, event: Any) -> None:
    """Only what is not as it should be."""
    if event.reason:
        label = "" if event.status == "ok" else f"{event.status}: "
        screen.above(label, f"{printable(event.source)}: {event.reason}", "yellow")


def _show_done(screen: Console, event: Any) -> None:
    screen.stop_progress()
    rows: list[tuple[object, ...]] = [(f"sources: {status}", count, "") for status, count in event.sources.items()]
    if event.skipped:
        rows.append(("of them finished before", event.skipped, ""))
    rows.append(("clips", event.num_clips, f"{duration(event.clip_seconds)} of {duration(event.source_seconds)}"))
    rows += [(f"left out: {reason}", count, duration(seconds)) for reason, (count, seconds) in event.left_out.items()]
    speed = f", {event.speed:.1f}x realtime" if event.speed else ""
    screen.table(f"split in {duration(event.seconds)}{speed}", ("what", "how many", "length"), rows)
    for label, path in (("preview", event.preview), ("manifest", event.manifest)):
        if path is not None:
            screen.text(f"{label}: {printable(path)}")


def _show_plan(screen: Console, event: Any) -> None:
    screen.stop_progress()
    for message in event.notices:
        screen.notice(message)
    rows = [
        (
            item.source,
            "" if item.seconds is None else duration(item.seconds),
            f"{item.width}x{item.height}" if item.width else "",
            f"{item.fps:.4g}" if item.fps else "",
            item.reason or f"{'clips' if item.num_clips is None else f'{item.num_clips} or more'} of {item.codec}",
        )
        for item in event.sources
    ]
    screen.table("sources it would split", ("source", "length", "size", "fps", "clips"), rows)
    usable = [item for item in event.sources if not item.reason]
    length = duration(sum(item.seconds or 0.0 for item in usable))
    screen.text(f"{len(usable)} sources of {length}; {event.skipped} more are finished")
    screen.text(f"would write to {printable(event.output)}: {event.making}")


def _show_filter_progress(screen: Console, event: Any) -> None:
    screen.draw(f"measuring clips, {event.speed:.1f}/s", event.done, event.total, event.seconds_left)


def _show_refused(screen: Console, event: Any) -> None:
    """Refused clips are many and are counted in the end; broken ones are few and should not be."""
    if "unreadable" in event.filters:
        screen.above("left out: ", f"{printable(event.clip)}: {event.reason}", "yellow")


def _show_filter_plan(screen: Console, event: Any) -> None:
    screen.table(
        "limits", ("setting", "value"), [(f"filter.{name}", f"{value:g}") for name, value in event.limits.items()]
    )
    screen.text(f"{event.num_clips} clips, {event.num_missing} of them to be measured first")
    screen.text(f"would filter {printable(event.manifest)} into {printable(event.output)}")


def _show_filtered(screen: Console, event: Any) -> None:
    screen.stop_progress()
    rows: list[tuple[object, ...]] = [("kept", event.num_kept, duration(event.kept_seconds), "")]
    for name, (count, seconds) in event.refused.items():
        limit = f"{event.limits[name]:g}" if name in event.limits else ""
        rows.append((f"filter.{name}" if limit else name, count, duration(seconds), limit))
    title = f"{event.num_clips} clips filtered in {duration(event.seconds)}, {event.measured} of them measured"
    screen.table(title, ("what", "clips", "length", "limit"), rows)
    for label, path in (("report", event.report), ("manifest", event.manifest)):
        if path is not None:
            screen.text(f"{label}: {printable(path)}")


def _show_why(screen: Console, event: Any) -> None:
    rows = [
        (
            item.name,
            "none" if item.value is None else f"{item.value:.4g}",
            f"filter.{item.setting} = {item.limit:g}" if item.limit else f"filter.{item.setting} is off",
            "" if item.value is None or not item.limit else "passes" if item.is_kept else "REFUSED",
            item.note or f"{item.about} ({item.unit})",
        )
        for item in event.verdicts
    ]
    screen.table(event.clip, ("score", "value", "limit", "verdict", "what it is"), rows)
    screen.text("kept" if event.is_kept else f"refused: {printable(event.reason)}")


RENDERERS.update(
    {
        "FilterProgress": _show_filter_progress,
        "ClipRefused": _show_refused,
        "FilterPlan": _show_filter_plan,
        "FilterDone": _show_filtered,
        "ClipExplained": _show_why,
        "SplitProgress": _show_progress,
        "SourceSplit": _show_source,
        "SplitDone": _show_done,
        "SplitPlan": _show_plan,
    }
)
