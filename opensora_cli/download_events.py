"""How the events of `osora download` look."""

from __future__ import annotations

from typing import Any

from rich.progress import TaskID

from opensora_cli.console import RENDERERS, Console, duration, printable
from opensora_core.files import readable

_NAME_WIDTH = 40  # of a file beside its bar


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
        of = f"/{readable(state.total_bytes)}" if state.total_bytes else ""
        screen.draw_worker(
            number,
            state.name,
            width=_NAME_WIDTH,
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
