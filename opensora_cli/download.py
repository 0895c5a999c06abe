"""`osora download`: weights by their names, and data by its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import TaskID

from opensora_cli import options
from opensora_cli.console import RENDERERS, Console, console, duration, printable
from opensora_cli.options import OUTPUT, RUNTIME
from opensora_core.config import DownloadConfig
from opensora_core.errors import UsageError
from opensora_core.files import readable, require_space

DATA = "data"
"""The first word where data is wanted, not weights."""

WEIGHTS_PANEL = "Weights"
DATA_PANEL = "Data"

_DEFAULTS = DownloadConfig()
_NAME_WIDTH = 40  # of a file beside its bar

EXAMPLES = """
[bold]Examples[/]

[cyan]osora download --list[/]

[cyan]osora download --all-for sample --preset 16x512x512 --dry-run[/]

[cyan]osora download opensora-v1-hq-16x512x512 --to /mnt/weights[/]

[cyan]osora download data urls.txt --output raw/[/]

[cyan]osora download data pexels --query 'ocean waves' --min-height 1080 --limit 500 --output raw/[/]
"""


def _words() -> list[tuple[str, str]]:
    """What may be named: weights, and `data`."""
    from opensora_core import assets

    named = [(name, asset.about) for name, asset in assets.ASSETS.items() if name != assets.BUNDLED]
    return [(DATA, "data: osora download data SOURCE"), *named]


def download(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME... | data SOURCE...",
            help="Weights by name or hf:OWNER/REPO; or the word data and a source, with its lists or archives.",
            autocompletion=_words,
            show_default=False,
        ),
    ] = None,
    *,
    all_for: Annotated[
        Literal["sample", "train"] | None,
        typer.Option(
            help="Everything that a run with these settings reads.", show_default=False, rich_help_panel=WEIGHTS_PANEL
        ),
    ] = None,
    list_: Annotated[
        bool,
        typer.Option(
            "--list",
            metavar="",
            help="Name, size, licence, and where it is, of the weights named or all.",
            rich_help_panel=WEIGHTS_PANEL,
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            metavar="",
            help="Check what is here against its SHA-256, of the weights named or all.",
            rich_help_panel=WEIGHTS_PANEL,
        ),
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Bring them there; OSORA_WEIGHTS=FOLDER is how runs find them.",
            show_default="where runs look",
            rich_help_panel=WEIGHTS_PANEL,
        ),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FOLDER|URL",
            help="Bring them from a folder that --to filled or another cache, or from a mirror of the hub.",
            show_default="where they are published",
            rich_help_panel=WEIGHTS_PANEL,
        ),
    ] = None,
    preset: options.PresetOpt = None,
    metadata: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Of hd-vg-130m: the .jsonl or .csv that its authors give out.",
            show_default=False,
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option(
            metavar="WORDS",
            help="Of pexels: what to search for; PEXELS_API_KEY has the key.",
            show_default=False,
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    min_height: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of pexels: take the smallest file of so many lines or more.",
            show_default="the largest",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="Items at most.", show_default="all", rich_help_panel=DATA_PANEL),
    ] = None,
    config: options.ConfigOpt = None,
    set_: options.SetOpt = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Of data: files and manifest; see docs/download.md.",
            show_default="data/SOURCE",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Downloads at a time.", show_default=f"{_DEFAULTS.workers}", rich_help_panel=RUNTIME
        ),
    ] = None,
    max_rate: Annotated[
        float | None,
        typer.Option(
            metavar="MB/S",
            help="Megabytes a second of all downloads together.",
            show_default="no limit",
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    offline: options.OfflineOpt = None,
    dry_run: options.DryRunOpt = False,
    print_config: options.PrintConfigOpt = False,
    json: options.JsonOpt = False,
    debug: options.DebugOpt = False,
) -> None:
    """Get weights, or data to train on; what is here is not fetched again.

    A run that was stopped goes on when it is repeated. Sources of data are a
    list of links (.txt, .csv, .jsonl), hd-vg-130m, pexels, inter4k, ucf101,
    imagenet, hf:OWNER/DATASET and world.
    """
    flags: dict[str, Any] = {
        "download.workers": workers,
        "download.max_bytes_per_second": None if max_rate is None else max_rate * 1e6,
        "runtime.offline": offline,
    }
    settings, origins = options.resolve(preset or options.DEFAULT_PRESET, config, set_, flags)
    if print_config:
        options.print_config(settings, origins)
        return
    words = list(names or [])
    is_data = words[:1] == [DATA]
    own = {"--all-for": all_for, "--list": list_, "--verify": verify, "--to": to, "--from": from_}
    others = {
        "--metadata": metadata,
        "--query": query,
        "--min-height": min_height,
        "--limit": limit,
        "--output": output,
    }
    for flag, value in (own if is_data else others).items():
        if value not in (None, False):
            kind = "weights, not to data" if is_data else "data, not to weights"
            raise UsageError(f"{flag} belongs to {kind}", "osora download --help tells which is which")
    if is_data:
        if not words[1:]:
            raise UsageError("there is no source of data", "osora download data urls.txt --output raw/")
        if offline and words[1] != "world":
            raise UsageError("--offline leaves nothing to fetch", "leave it out, or: osora download data world")
        _data(settings.download, words[1:], metadata, query, min_height, limit, output, dry_run=dry_run)
        return

    from opensora_core import assets

    chosen = [(word, assets.ASSETS[word].kind if word in assets.ASSETS else "model") for word in words]
    if all_for is not None:
        chosen += assets.needed_words(settings, all_for)
    if list_ or verify:
        chosen = chosen or list(assets.known_words())
        if list_:
            console.show(assets.WeightsListed(assets.holdings(chosen)))
        if verify:
            present = [item for item in chosen if words or all_for or assets.find(item[0], kind=item[1])]
            console.follow(assets.verify_weights(present, to))
        return
    if not chosen:
        raise UsageError(
            "there is nothing to download",
            "osora download --list shows the weights, osora download data SOURCE is data",
        )
    request = assets.WeightsRequest(tuple(chosen), to, from_ or "")
    if dry_run:
        plan = assets.plan_weights(request)
        console.show(plan)
        require_space(plan.target, plan.missing_bytes)
        return
    console.follow(assets.fetch_weights(settings.download, request, offline=settings.runtime.offline))


def _data(  # noqa: PLR0917
    config: DownloadConfig,
    words: list[str],
    metadata: Path | None,
    query: str | None,
    min_height: int | None,
    limit: int | None,
    output: Path | None,
    *,
    dry_run: bool,
) -> None:
    from opensora_core.curation import download as core

    source = words[0]
    for flag, value, owner in (
        ("--metadata", metadata, "hd-vg-130m"),
        ("--query", query, "pexels"),
        ("--min-height", min_height, "pexels"),
    ):
        if value is not None and source != owner:
            raise UsageError(f"{flag} says nothing to {source}", f"it is for {owner}")
    if words[1:] and (source in ("pexels", "hd-vg-130m", "world") or source.startswith("hf:")):
        raise UsageError(f"{source} takes no further words: {' '.join(words[1:])}", "osora download --help")
    request = core.DataRequest(
        source=source,
        output=output or Path("data") / Path(source.removeprefix("hf:").partition("@")[0]).stem,
        inputs=tuple(words[1:]),
        metadata=metadata,
        query=query or "",
        min_height=min_height or 0,
        limit=limit,
    )
    console.follow(core.examine_data(config, request) if dry_run else core.download_data(config, request))


# how its events look ---------------------------------------------------------------------------------------------


def _show_progress(screen: Console, event: Any) -> None:
    """A bar for the whole job, and one for each file on its way."""
    screen.draw("downloading")
    if (progress := screen.progress) is None:  # no terminal
        return
    of = f"/{event.total}" if event.total else ""
    size = f"/{readable(event.total_bytes)}" if event.total_bytes else ""
    left = "" if event.seconds_left is None else f"  {duration(event.seconds_left)} left"
    progress.update(
        TaskID(0),
        description=f"{event.done}{of} files, {readable(event.bytes_per_second)}/s",
        completed=event.done_bytes,
        total=event.total_bytes or None,
        count=f"{readable(event.done_bytes)}{size}{left}",
    )
    for number, state in enumerate(event.workers, 1):
        if number == len(progress.tasks):
            progress.add_task("", total=1.0, count="")
        name = printable(state.name)
        name = name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 1]}…"
        of = f"/{readable(state.total_bytes)}" if state.total_bytes else ""
        progress.update(
            TaskID(number),
            description=name,
            completed=state.done_bytes,
            total=state.total_bytes or None if state.name else 1,
            count=f"{readable(state.done_bytes)}{of}" if state.name else "waiting",
        )


def _show_failed(screen: Console, event: Any) -> None:
    screen.above("left out: ", f"{printable(event.source)}: {event.reason}", "yellow")


def _show_done(screen: Console, event: Any) -> None:
    screen.stop_progress()
    rows = [
        ("new", event.num_new),
        ("here before", event.num_before),
        ("the same content as another", event.num_duplicates),
        ("could not be had", event.num_failed),
    ]
    title = f"{readable(event.num_bytes)} in {duration(event.seconds)}"
    screen.table(title, ("items", "how many"), [row for row in rows if row[1] or row[0] == "new"])
    if event.num_failed:
        screen.text(f"reasons: {printable(event.output / 'rejects.jsonl')}; the same command tries them again")
    screen.text(f"manifest: {printable(event.manifest)}, {event.num_rows} rows")


def _show_data_plan(screen: Console, event: Any) -> None:
    screen.stop_progress()
    count = (
        "as many items as the network says" if event.total is None else f"{event.total} items, {event.done} are here"
    )
    screen.text(f"would {event.doing}: {count}")
    screen.text(f"would write to {printable(event.output)}: {readable(event.free_bytes)} free")


def _size(item: Any) -> str:
    if item.size_bytes is None:
        return "unknown"
    return readable(item.size_bytes) if item.path else f"about {readable(item.size_bytes)}"


def _show_listed(screen: Console, event: Any) -> None:
    rows = [
        (item.name, item.kind, _size(item), item.licence, str(item.path) if item.path else f"not here: {item.source}")
        for item in event.items
    ]
    screen.table("weights", ("name", "part", "size", "licence", "where"), rows)


def _show_plan(screen: Console, event: Any) -> None:
    rows = [(item.name, _size(item), str(item.path) if item.path else f"from {item.source}") for item in event.items]
    screen.table("weights it would bring", ("name", "size", "where"), rows)
    missing = [item for item in event.items if item.path is None]
    size = readable(event.missing_bytes) + (" and unknown sizes" if any(i.size_bytes is None for i in missing) else "")
    screen.text(
        f"missing: {len(missing)} of {len(event.items)}, about {size}; {readable(event.free_bytes)} free in "
        f"{printable(event.target)}"
    )


def _show_ready(screen: Console, event: Any) -> None:
    screen.stop_progress()
    how = "brought" if event.is_new else "here already"
    screen.text(f"{event.name}: {how}, {readable(event.size_bytes)}, {printable(event.path)}")


def _show_verified(screen: Console, event: Any) -> None:
    screen.text(f"{event.name}: {event.status}, {printable(event.reason)}")


RENDERERS.update(
    {
        "DownloadProgress": _show_progress,
        "ItemFailed": _show_failed,
        "DataDone": _show_done,
        "DataPlan": _show_data_plan,
        "WeightsListed": _show_listed,
        "WeightsPlan": _show_plan,
        "WeightsReady": _show_ready,
        "WeightsVerified": _show_verified,
    }
)
