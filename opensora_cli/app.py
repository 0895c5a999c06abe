"""The Typer app, and the single place that turns an error into a message, a hint and an exit code."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from opensora_cli import bench, caption, download, launch, options, sample, split, train
from opensora_cli.console import console
from opensora_core import __version__
from opensora_core.errors import OsoraError

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Terminated(BaseException):
    """SIGTERM: everything on the stack cleans up, as it does for Ctrl-C."""


app = typer.Typer(
    name="osora",
    help="From a prompt to a video, and from videos to a model that makes them.",
    epilog="Begin with: [cyan]osora sample --prompt 'a red ball rolling to the right over green grass'[/]",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(value: bool) -> None:
    if value:
        console.text(f"osora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            help="Print the version.",
            callback=_print_version,
            is_eager=True,
            expose_value=False,
        ),
    ] = False,
) -> None:
    pass


app.command("sample", epilog=sample.EXAMPLES)(sample.sample)
app.command("download", epilog=download.EXAMPLES)(download.download)
app.command("split", epilog=split.EXAMPLES)(split.split)
app.command("caption", epilog=caption.EXAMPLES)(caption.caption)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("bench", epilog=bench.EXAMPLES)(bench.bench)


def run(words: Sequence[str]) -> int:
    """Run one command.

    Args:
        words: what was typed after `osora`.

    Returns:
        The exit code: 0 done, 1 failure, 2 usage or malformed input, 130 SIGINT, 143 SIGTERM.
    """
    # read here and not by typer, because how to report a word that typer cannot parse depends on them
    console.configure(as_json="--json" in words, debug="--debug" in words)
    signal.signal(signal.SIGTERM, _terminate)
    launch.end_if_held(_terminate)
    try:
        spelled = options.spelled_out(words, train.BARE) if words[:1] == ["train"] else list(words)
        code = app(args=spelled, prog_name="osora", standalone_mode=False)
    except OsoraError as error:
        console.fail(error.message, error.hint, error.exit_code)
        return error.exit_code
    except typer.TyperException as error:
        if not words:  # `osora` alone: its help has been shown
            return error.exit_code
        verb = next((word for word in words if not word.startswith("-")), "")
        known = {command.name for command in app.registered_commands}
        hint = f"'osora {verb} --help' lists its flags" if verb in known else "'osora --help' lists the commands"
        console.fail(error.format_message(), hint, error.exit_code)
        return error.exit_code
    except Terminated:
        _say_stopped("terminated", TERMINATED)
        return TERMINATED
    except Exception as error:  # a bug of ours: say so, and never with a wall of text
        message = f"internal error, {type(error).__name__}: {error}"
        console.fail(message, "run it again with --debug, and report what that prints")
        return 1
    if code == INTERRUPTED:
        _say_stopped("interrupted", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _say_stopped(word: str, code: int) -> None:
    if launch.is_watched():  # one of many, whose launcher says it once for all
        console.failure = word, ()
    else:
        console.fail(word, exit_code=code)


def _terminate(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # cleaning up takes a moment, and is not to be cut short
    raise Terminated
