"""`osora download`: weights by their names, and data by its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from opensora_cli import (
    download_events,  # noqa: F401 - fills the table of renderers
    options,
)
from opensora_cli.console import console
from opensora_cli.options import OUTPUT, RUNTIME
from opensora_core.config import Config, DownloadConfig
from opensora_core.errors import UsageError, nearest
from opensora_core.files import require_space

DATA = "data"
"""The first word where data is wanted, not weights."""

WEIGHTS_PANEL = "Weights"
DATA_PANEL = "Data"

_DEFAULTS = DownloadConfig()

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
    if preset is not None and all_for is None:
        raise UsageError("--preset says nothing here", "it is for --all-for sample or --all-for train")
    if is_data:
        if not words[1:]:
            raise UsageError("there is no source of data", "osora download data urls.txt --output raw/")
        if settings.runtime.offline and words[1] != "world" and not dry_run:
            raise UsageError("--offline leaves nothing to fetch", "leave it out, or: osora download data world")
        _data(settings.download, words[1:], metadata, query, min_height, limit, output, dry_run=dry_run)
        return

    if all_for is not None or words or list_ or verify:
        _weights(settings, words, all_for, to, from_ or "", is_listed=list_, is_verified=verify, dry_run=dry_run)
        return
    raise UsageError(
        "there is nothing to download",
        "osora download --list shows the weights, osora download data SOURCE is data",
    )


def _weights(
    settings: Config,
    words: list[str],
    all_for: Literal["sample", "train"] | None,
    to: Path | None,
    source: str,
    *,
    is_listed: bool,
    is_verified: bool,
    dry_run: bool,
) -> None:
    from opensora_core import assets

    for word in words:
        if not (word in assets.ASSETS or word.startswith("hf:") or "/" in word or Path(word).exists()):
            raise UsageError(f"there are no weights '{word}'", nearest(word, [DATA, *assets.ASSETS]))
    chosen = [(word, assets.ASSETS[word].kind if word in assets.ASSETS else "model") for word in words]
    if all_for is not None:
        chosen += assets.needed_words(settings, all_for)
    if is_listed or is_verified:
        if source or dry_run:
            raise UsageError(
                f"{'--from' if source else '--dry-run'} says nothing to {'--list' if is_listed else '--verify'}",
                "leave it out: nothing is brought",
            )
        is_named = bool(chosen)
        held = assets.holdings(chosen or assets.known_words(), to)
        if is_listed:
            console.show(assets.WeightsListed(held))
        if is_verified:
            present = [(item.name, item.kind) for item in held if is_named or item.path is not None]
            console.follow(assets.verify_weights(present, to))
        return
    request = assets.WeightsRequest(tuple(chosen), to, source)
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
