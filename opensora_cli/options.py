"""Options that several verbs share, and the way in which they become settings.

A flag whose default is None leaves the setting to the preset; `--set` reaches every setting, flag or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from opensora_cli.console import console
from opensora_core import presets
from opensora_core.config import Config, iterate, parse_settings, read_settings, to_dict, to_toml
from opensora_core.errors import UsageError, nearest

SETTINGS = "Model and settings"
RUNTIME = "Where it runs"
OUTPUT = "Output"
REPORT = "Reporting"
MANY = "Many processes"

DEFAULT_PRESET = "tiny"

NAME_PRESET = "say which they are, for example --preset 16x256x256"

FROM_PRESET = "preset"
"""What help shows as the default of a flag that the preset decides."""


def model_names() -> list[tuple[str, str]]:
    """Names that `--model` knows, each with what it is."""
    from opensora_core import assets

    return [(name, asset.about) for name, asset in assets.ASSETS.items() if asset.kind == "model"]


ModelOpt = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|PATH|hf:OWNER/REPO",
        help="Weights: a published name, a file or folder, or a repository.",
        autocompletion=model_names,
        show_default="bundled",
        rich_help_panel=SETTINGS,
    ),
]
PresetOpt = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="Named settings to start from.",
        autocompletion=lambda: [(name, item.about) for name, item in presets.PRESETS.items()],
        show_default="tiny, or the model's",
        rich_help_panel=SETTINGS,
    ),
]
ConfigOpt = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="TOML or JSON settings; --print-config writes them.", rich_help_panel=SETTINGS
    ),
]
SetOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change any setting by its dotted path, e.g. vae.tiling=true. Repeatable.",
        rich_help_panel=SETTINGS,
    ),
]
PrintConfigOpt = Annotated[
    bool,
    typer.Option(
        "--print-config",
        metavar="",
        help="Print every setting with where it came from, and stop.",
        rich_help_panel=REPORT,
    ),
]
DeviceOpt = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:N]|mps",
        help="Where to compute; auto takes the first accelerator.",
        autocompletion=lambda: ["auto", "cpu", "cuda", "mps"],
        show_default="auto",
        rich_help_panel=RUNTIME,
    ),
]
DTypeOpt = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"] | None,
    typer.Option(
        "--dtype",
        help="Precision of the arithmetic; auto suits the device.",
        show_default="auto",
        rich_help_panel=RUNTIME,
    ),
]
OfflineOpt = Annotated[
    bool | None,
    typer.Option(
        "--offline",
        metavar="",
        help="Never reach the network; use what is on this machine.",
        show_default=False,
        rich_help_panel=RUNTIME,
    ),
]
GpusOpt = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        metavar="N",
        help="Processes on each machine, one for each GPU; with --device cpu on its cores.",
        show_default="1",
        rich_help_panel=MANY,
    ),
]
NodesOpt = Annotated[
    int | None,
    typer.Option(
        "--nodes",
        metavar="M",
        help="Machines: of the Slurm allocation, of --hostfile, or for commands to start by hand.",
        show_default="1",
        rich_help_panel=MANY,
    ),
]
HostfileOpt = Annotated[
    Path | None,
    typer.Option("--hostfile", metavar="FILE", help="Machines to start it on, one a line.", rich_help_panel=MANY),
]
SubmitOpt = Annotated[
    bool,
    typer.Option(
        "--submit", metavar="", help="Hand it to Slurm's queue; --dry-run prints the file.", rich_help_panel=MANY
    ),
]
MaxRestartsOpt = Annotated[
    int | None,
    typer.Option(
        "--max-restarts",
        metavar="N",
        help="Times that a job which failed goes on from its last checkpoint.",
        show_default="0",
        rich_help_panel=MANY,
    ),
]
ParallelOpt = Annotated[
    str | None,
    typer.Option(
        "--parallel",
        metavar="AXIS=N,...",
        help="How the processes share the work: data, sequence, cfg; e.g. cfg=2,sequence=4.",
        autocompletion=lambda: ["sequence=2", "data=2", "cfg=2"],
        show_default=FROM_PRESET,
        rich_help_panel=MANY,
    ),
]
EngineOpt = Annotated[
    Literal["torch", "colossalai"] | None,
    typer.Option("--engine", help="What shares the work of training.", show_default="torch", rich_help_panel=MANY),
]
CrewOpt = Annotated[
    Literal["local", "ray"] | None,
    typer.Option(
        "--engine",
        help="Processes of this machine, or workers of a Ray cluster.",
        show_default="local",
        rich_help_panel=RUNTIME,
    ),
]
RayAddressOpt = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="HOST:PORT|auto",
        help="Of a cluster that runs already.",
        show_default="one of this machine's own",
        rich_help_panel=RUNTIME,
    ),
]
DryRunOpt = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        metavar="",
        help="Check everything and say what would be done, without doing it.",
        rich_help_panel=REPORT,
    ),
]
# These two hold for the whole run, whichever verb: `app.run` reads them before anything can go wrong.
JsonOpt = Annotated[
    bool,
    typer.Option(
        "--json",
        metavar="",
        help="One JSON object a line on stdout, and nothing else there.",
        expose_value=False,
        rich_help_panel=REPORT,
    ),
]
DebugOpt = Annotated[
    bool,
    typer.Option(
        "--debug",
        metavar="",
        help="Show the traceback of an error.",
        expose_value=False,
        rich_help_panel=REPORT,
    ),
]


def base(preset: str | None, model: str | None) -> tuple[str | None, Mapping[str, Any] | None]:
    """Where the settings of a run with a model start: a preset's name, or what was saved with the model.

    Raises:
        UsageError: an unknown model, or one that says nothing about its settings.
    """
    from opensora_core import assets

    if preset is not None or model is None:
        return preset or DEFAULT_PRESET, None
    found = assets.find(model, kind="model")
    if model in assets.ASSETS:
        return assets.ASSETS[model].preset, None
    if found is None:
        raise UsageError(f"{model} is not on this machine yet, so its settings are unknown", NAME_PRESET)
    if saved := saved_settings(found.path if found.path.is_dir() else found.path.parent):
        return None, saved
    raise UsageError(f"{model} does not say which settings it was trained with", NAME_PRESET)


def spelled_out(words: Sequence[str], bare: Mapping[str, str]) -> list[str]:
    """Give flags that may stand alone the value that they mean then, which typer wants to see.

    Args:
        words: what was typed.
        bare: flag -> its value where none is given. A value is written `--flag=value`, or for flags whose bare value is
            empty also `--flag value`.
    """
    spelled = []
    for index, word in enumerate(words):
        follows = words[index + 1 : index + 2]
        is_bare = word in bare and (bare[word] or not follows or follows[0].startswith("-"))
        spelled.append(f"{word}={bare[word]}" if is_bare else word)
    return spelled


def saved_settings(folder: Path) -> Mapping[str, Any] | None:
    """The settings saved in the folder of a run or a model; None where there are none of ours."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    settings = read_settings(path)
    known = dict(iterate(Config()))
    return settings if settings.keys() & known else None  # diffusers' folders hold a config.json of their own


def resolve(
    preset: str | None,
    config_file: Path | None,
    words: list[str] | None,
    flags: Mapping[str, Any],
    saved: Mapping[str, Any] | None = None,
) -> tuple[Config, dict[str, str]]:
    """Resolve a verb's settings from what was typed; see `opensora_core.presets.resolve`."""
    return presets.resolve(preset, config_file, parse_settings(words or []), flags, saved)


def print_config(config: Config, origins: Mapping[str, str]) -> None:
    """Print the resolved settings, each with its origin; the text is a file for `--config`."""
    if console.as_json:
        console.line("config", {"settings": to_dict(config), "origins": dict(origins)})
    else:
        console.text(to_toml(config, origins))


AXES = ("data", "sequence", "cfg")


def parse_axes(word: str | None) -> dict[str, int]:
    """Settings of the axes in `--parallel cfg=2,sequence=4`.

    Raises:
        UsageError: an unknown axis, one that is named twice, or a size that is not a positive integer.
    """
    sizes: dict[str, int] = {}
    for part in word.split(",") if word is not None else ():
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise UsageError(f"--parallel {word!r}: there is no axis '{axis}'", nearest(axis, AXES))
        if not size.isdecimal() or not int(size) or f"parallel.{axis}" in sizes:
            raise UsageError(f"--parallel {word!r} does not give {axis} one size", "write --parallel cfg=2,sequence=4")
        sizes[f"parallel.{axis}"] = int(size)
    return sizes


def parse_size(word: str | None) -> tuple[int, int] | tuple[None, None]:
    """Height and width of `HxW`.

    Raises:
        UsageError: not two positive integers around an x.
    """
    if word is None:
        return None, None
    height, _, width = word.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise UsageError(f"--size {word!r} is not HEIGHTxWIDTH", "write --size 256x256, height first")
    return int(height), int(width)
