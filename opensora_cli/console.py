"""The only room that prints: events, results, notices and errors, as words on a screen or as one JSON object a line.

For a reader, results go to stdout, everything about how they come about (progress, notices, errors) to stderr. With
`--json` every event is a line on stdout and nothing else is, so that a program can follow a run as it happens.
"""

from __future__ import annotations

import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console as Screen
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from opensora_core.files import readable

PIPE_WIDTH = 120  # of a table that no terminal limits
MIN_COLUMN = 16  # what is left of a long prompt in a narrow terminal


def printable(value: object) -> str:
    """Text that is safe on a terminal: escape sequences, line breaks and lone surrogates become visible."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in str(value))


def plain(value: Any) -> Any:
    """An event, setting or result as values that JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def _shortened(text: str, width: int) -> str:
    text = printable(text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def duration(seconds: float) -> str:
    """Seconds as a reader says them: `8.4 s`, `3:07`, `2:00:41`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class Console:
    """Renders whatever the core yields. Events are known by the name of their class: their modules import torch."""

    def __init__(self) -> None:
        self._log: Screen | None = None
        self.configure()

    def configure(self, *, as_json: bool = False, debug: bool = False) -> None:
        """Start afresh, for a reader or for a program."""
        self.as_json = as_json
        self.debug = debug
        self._out = self._screen(stderr=False)
        self._err = self._screen(stderr=True)
        self.progress: Progress | None = None
        self._saved: list[Any] = []
        self._pages: list[tuple[str, Path]] = []
        self.failure: tuple[str, tuple[int, ...]] = ("", ())

    def keep(self, path: Path) -> None:
        """Write all that is said from now on into a file as well, plainly."""
        self._log = Screen(
            file=path.open("a", encoding="utf-8"), width=PIPE_WIDTH, color_system=None, markup=False, highlight=False
        )

    @staticmethod
    def _screen(*, stderr: bool) -> Screen:
        screen = Screen(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=False)
        if not screen.is_terminal:
            screen.width = max(screen.width, PIPE_WIDTH)
        return screen

    # what commands say -------------------------------------------------------------------------------------------

    def follow(self, events: Iterator[Any]) -> None:
        """Show each event as it happens; on the way out, whatever happens, the core cleans up before we speak."""
        try:
            for event in events:
                self.show(event)
        finally:
            if isinstance(events, Generator):
                events.close()
            self.stop_progress()

    def show(self, event: Any) -> None:
        """Show one event."""
        name = type(event).__name__
        if self.as_json:
            self.line(_snake(name), plain(event))
        else:
            RENDERERS.get(name, Console._show_any)(self, event)

    def line(self, name: str, values: Mapping[str, Any]) -> None:
        """Write one JSON object on stdout, now."""
        line = json.dumps({"event": name, **values}, allow_nan=False) + "\n"
        sys.stdout.write(line)
        sys.stdout.flush()
        if self._log is not None:
            self._log.file.write(line)
            self._log.file.flush()

    def text(self, text: str) -> None:
        """Write a result as it is, unwrapped and uncoloured, so that it can be redirected into a file."""
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Write a table of results; in a narrow place the last column is shortened, then the first one folded."""
        cells = [[printable(cell) for cell in row] for row in rows]
        taken = sum(max((len(row[index]) for row in cells), default=0) + 2 for index in range(len(columns) - 1))
        room = max(self._out.width - taken - 2, MIN_COLUMN)
        table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
        for index, column in enumerate(columns):
            is_first = index == 0
            table.add_column(column, style="cyan" if is_first else "", overflow="fold", no_wrap=not is_first)
        for *others, last in cells:
            table.add_row(*others, last if len(last) <= room else f"{last[: room - 1]}…")
        self._out.print(table)
        if self._log is not None:
            self._log.print(table)

    def notice(self, message: str) -> None:
        """Say something that the reader should know, without stopping."""
        if self.as_json:
            self.line("notice", {"message": message})
        else:
            self.above("note: ", message, "yellow")

    def fail(self, message: str, hint: str = "", exit_code: int = 1) -> None:
        """Say why the command ends, and what to do next."""
        self.stop_progress()
        self.failure = message, getattr(sys.exc_info()[1], "ranks", ())
        if self.as_json:
            self.line("error", {"message": message, "hint": hint, "exit_code": exit_code})
        else:
            self.above("error: ", message, "bold red")
            if hint:
                self.above(" hint: ", hint, "green")
        if self.debug and sys.exc_info()[0] is not None:
            traceback.print_exc()

    # how events look ---------------------------------------------------------------------------------------------

    def above(self, label: str, message: str, style: str) -> None:
        """Print a labelled line on stderr, above the progress line if there is one."""
        body = "\n".join(printable(line) for line in message.splitlines())
        screen = self.progress.console if self.progress else self._err
        text = Text.assemble((label, style), body)
        screen.print(text, soft_wrap=True)
        if self._log is not None:
            self._log.print(text, soft_wrap=True)

    def stop_progress(self) -> None:
        """Take the progress line away, if there is one."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def draw_worker(self, number: int, name: str, *, width: int, **state: Any) -> None:
        """Move the line of one of several workers, numbered from 1, below that of the whole.

        Args:
            number: of the worker.
            name: of what it does, cut at `width` characters.
            width: see there.
            state: `completed`, `total` and `count` of the line.
        """
        assert self.progress is not None
        if number == len(self.progress.tasks):
            self.progress.add_task("", total=1.0, count="")
        self.progress.update(TaskID(number), description=_shortened(name, width), **state)

    def draw(self, label: str, step: int = 0, total: int | None = None, seconds_left: float | None = None) -> None:
        """Move the progress line; off a terminal it would be noise, so nothing is drawn there."""
        if not self._err.is_terminal:
            return
        if self.progress is None:
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=20))
            counts = TextColumn("{task.fields[count]}", style="cyan", markup=False)
            self.progress = Progress(*columns, counts, console=self._err, transient=True)
            self.progress.add_task("", total=None, count="")
            self.progress.start()
        room = max(self._err.width - 48, 16)  # columns that the bar and the counts leave
        left = "" if seconds_left is None else f"  {duration(seconds_left)} left"
        count = "" if total is None else f"{step}/{total}{left}"
        self.progress.update(TaskID(0), description=_shortened(label, room), completed=step, total=total, count=count)

    def _show_notice(self, event: Any) -> None:
        self.notice(event.message)

    def _show_plan(self, event: Any) -> None:
        for message in event.notices:
            self.notice(message)
        weights = [
            (
                part.name,
                part.kind,
                "size unknown" if part.size_bytes is None else readable(part.size_bytes),
                "to be downloaded" if part.path is None else part.path,
            )
            for part in event.weights
        ]
        self.table("weights it would use", ("name", "part", "size", "place"), weights)
        requests = [(item.path, item.seed, item.prompt) for item in event.requests]
        self.table("files it would write", ("file", "seed", "prompt"), requests)

    def _show_loading(self, event: Any) -> None:
        self.draw(f"loading {event.part} {event.detail}".rstrip())

    def _show_progress(self, event: Any) -> None:
        self.draw(event.prompt, event.step, event.total, event.seconds_left)

    def _show_saved(self, event: Any) -> None:
        self._saved.append(event)

    def _show_working(self, event: Any) -> None:
        self.draw(event.task, event.step, event.total, event.seconds_left)

    def _show_train_progress(self, event: Any) -> None:
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in event.metrics.items())
        facts = [metrics, f"lr {event.lr:.2e}", f"{event.clips_per_second:.1f} clips/s"]
        if event.tokens_per_second:
            facts.append(f"{event.tokens_per_second:.3g} tokens/s")
        if event.mfu is not None:
            facts.append(f"MFU {event.mfu:.0%}")
        facts += [
            f"data wait {event.data_wait:.0%}",
            readable(event.peak_bytes),
            f"{duration(event.seconds_left)} left",
        ]
        self.above(f"{event.part} {event.step}/{event.total}  ", "  ".join(facts), "cyan")
        self.draw(f"training {event.part}", event.step, event.total, event.seconds_left)

    def _show_checkpoint_saved(self, event: Any) -> None:
        self.above("checkpoint: ", str(event.path), "cyan")

    def _show_rejected(self, event: Any) -> None:
        self.above("left out: ", f"{event.clip}: {event.reason} ({event.share:.1%} so far)", "yellow")

    def _show_validated(self, event: Any) -> None:
        bins = " ".join(f"{value:.3f}" for value in event.ema_bins)
        words = f"loss {event.loss:.4f}, averaged weights {event.ema_loss:.4f}; by timestep {bins}"
        self.above(f"validation {event.step}: ", words, "green")

    def _show_sampled(self, event: Any) -> None:
        self.above(f"samples {event.step}: ", str(event.sheet), "green")

    def _show_stage(self, event: Any) -> None:
        self.stop_progress()
        self.above(f"stage {event.number} of {event.total}: ", f"{event.name} in {event.folder}", "bold cyan")

    def _show_resumed(self, event: Any) -> None:
        for message in event.damaged:
            self.notice(f"passed over: {message}")
        self.above("resumed: ", f"{event.part} after step {event.step}", "cyan")

    def _show_checkup(self, event: Any) -> None:
        self.stop_progress()
        self.notice(f"{event.source} was read as: {event.format}")
        usable = f"{event.usable} of {event.clips} clips can be trained on"
        if rows := [(reason, count, event.examples[reason]) for reason, count in event.reasons.items()]:
            self.table(usable, ("left out", "clips", "example"), rows)
        elif event.clips:
            self.text(usable)
        buckets = [
            (plan.size, plan.clips, plan.batch_size, plan.tokens_per_batch, f"{plan.steps_per_epoch:.1f}")
            for plan in event.buckets
        ]
        self.table("batches", ("frames x height x width", "clips", "a batch", "tokens", "steps an epoch"), buckets)
        trained = "" if event.trained == event.parameters else f", {event.trained:,} of them trained"
        facts = [
            ("parameters", f"{event.parameters:,}{trained}"),
            ("arithmetic of a step", f"{event.teraflops:.3g} TFLOP" if event.teraflops >= 0.01 else "next to none"),
            ("epochs of the run", f"{event.epochs:.1f}"),
            *((f"memory: {name}", readable(size)) for name, size in event.memory.items()),
            ("a checkpoint on disk", readable(event.checkpoint_bytes)),
        ]
        if event.seconds_per_step is not None:
            facts += [("a step", duration(event.seconds_per_step)), ("the whole run", duration(event.seconds))]
        self.table("the run, memory estimated", ("what", "how much"), facts)

    def _show_launch_plan(self, event: Any) -> None:
        if event.script:
            self.text(event.script)
        else:
            for command in event.commands:
                self.text(f"# {command.node}\n{command.line}")
        where = f", which meet at {event.end_point}" if event.end_point else ""
        by_hand = "; nothing is started: run each line on its machine" if event.way == "by hand" else ""
        self.notice(f"{event.way}: {_crew(event)}{where}{by_hand}")

    def _show_started(self, event: Any) -> None:
        self.above(f"{event.way}: ", f"{_crew(event)}; what each says is in {event.logs}", "cyan")

    def _show_restarting(self, event: Any) -> None:
        self.above(f"restart {event.number} of {event.limit}: ", event.reason, "yellow")

    def _show_ended(self, event: Any) -> None:
        self.stop_progress()
        if event.told:
            return
        for line in event.tail if event.rank != 0 else ():  # what rank 0 said is on the screen already
            self.above("    ", line, "dim")
        self.fail(event.reason, f"the whole log is {event.log}" if event.log else "", event.code)

    def _show_fabric(self, event: Any) -> None:
        rates = f"all-reduce {event.all_reduce / 1e9:.2f} GB/s, all-to-all {event.all_to_all / 1e9:.2f} GB/s"
        hosts = f"{event.processes} processes on {event.hosts} machine{'' if event.hosts == 1 else 's'} agree"
        self.above("fabric: ", f"{hosts}; {rates}", "cyan")

    def _show_sheet(self, event: Any) -> None:
        self._pages.append(("contact sheet", event.path))

    def _show_gallery(self, event: Any) -> None:
        self._pages.append(("gallery", event.path))

    def _show_done(self, event: Any) -> None:
        self.stop_progress()
        rows = [(saved.path, saved.seed, duration(saved.seconds), saved.prompt) for saved in self._saved]
        count = f"{len(rows)} file{'' if len(rows) == 1 else 's'} in {duration(event.seconds)}"
        self.table(count, ("file", "seed", "time", "prompt"), rows)
        for label, path in self._pages:
            self._out.print(Text.assemble((f"{label}: ", "dim"), (printable(path), "cyan")), soft_wrap=True)

    def _show_any(self, event: Any) -> None:
        words = [f"{item.name} {_word(getattr(event, item.name))}" for item in fields(event)]
        self.above(f"{_snake(type(event).__name__)}: ", ", ".join(words), "cyan")


RENDERERS: dict[str, Callable[[Console, Any], None]] = {
    "Notice": Console._show_notice,
    "Plan": Console._show_plan,
    "Loading": Console._show_loading,
    "Progress": Console._show_progress,
    "Saved": Console._show_saved,
    "Sheet": Console._show_sheet,
    "Gallery": Console._show_gallery,
    "Working": Console._show_working,
    "TrainProgress": Console._show_train_progress,
    "CheckpointSaved": Console._show_checkpoint_saved,
    "Rejected": Console._show_rejected,
    "Validated": Console._show_validated,
    "Sampled": Console._show_sampled,
    "Stage": Console._show_stage,
    "Resumed": Console._show_resumed,
    "Checkup": Console._show_checkup,
    "LaunchPlan": Console._show_launch_plan,
    "Started": Console._show_started,
    "Restarting": Console._show_restarting,
    "Ended": Console._show_ended,
    "Fabric": Console._show_fabric,
    "Done": Console._show_done,
}

console = Console()


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _crew(event: Any) -> str:
    """How many processes are started where; 0 is one for each GPU."""
    each = {0: "a process for each GPU", 1: "1 process"}.get(event.processes, f"{event.processes} processes")
    return f"{each} on {f'each of {event.nodes} machines' if event.nodes > 1 else 'this machine'}"


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, str | int | Path) else json.dumps(plain(value))
