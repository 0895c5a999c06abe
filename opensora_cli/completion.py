"""Writes the completion scripts of the shells from the commands themselves: `make completions`.

The scripts hold every verb, flag and known value, so that TAB answers at once and starts no Python. That makes them go
stale when a flag changes, which a test notices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main

from opensora_cli.app import app

NOTE = "# Completion of osora, written by `make completions` from the commands: do not edit."


@dataclass(frozen=True)
class Flag:
    """One flag of a verb, as a shell sees it."""

    words: tuple[str, ...]  # --prompt, -p
    about: str
    metavar: str  # empty for a switch
    values: tuple[tuple[str, str], ...]  # known values, each with what it is
    repeatable: bool

    @property
    def takes_path(self) -> bool:
        """Whether file names are worth offering."""
        return self.metavar in ("FILE", "FOLDER") or "PATH" in self.metavar.split("|")


@dataclass(frozen=True)
class Verb:
    """One command; the root has no name."""

    name: str
    about: str
    flags: tuple[Flag, ...]
    choices: tuple[tuple[str, str], ...] = ()  # known values of its one positional word, each with what it is


def verbs() -> list[Verb]:
    """The root and its commands, in the order in which help shows them."""
    root: Any = typer.main.get_command(app)
    return [_verb("", root), *(_verb(name, command) for name, command in root.commands.items())]


def _verb(name: str, command: Any) -> Verb:
    context = command.make_context(name or "osora", [], resilient_parsing=True)
    items = command.get_params(context)
    return Verb(
        name,
        _first_line(command.help),
        tuple(_flag(item, context) for item in items if item.param_type_name == "option"),
        tuple(value for item in items if item.param_type_name == "argument" for value in _values(item, context)),
    )


def _values(parameter: Any, context: Any) -> tuple[tuple[str, str], ...]:
    return tuple((item.value, item.help or "") for item in parameter.shell_complete(context, ""))


def _flag(option: Any, context: Any) -> Flag:
    takes_value = not option.is_flag
    return Flag(
        words=tuple(sorted((*option.opts, *option.secondary_opts), key=len, reverse=True)),
        about=_first_line(option.help),
        metavar=(option.metavar or option.name.upper()) if takes_value else "",
        values=_values(option, context) if takes_value else (),
        repeatable=option.multiple,
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(".")


def bash(commands: list[Verb]) -> str:
    """A script for bash: two case statements, one over what a flag takes, one over what may come next."""
    values, words = [], []
    for verb in commands:
        for flag in verb.flags:
            offered = _quote(" ".join(value for value, _ in flag.values))
            actions = [f'COMPREPLY=($(compgen -W {offered} -- "$current"))'] if flag.values else []
            if not flag.takes_path:  # otherwise readline adds file names, which it escapes as it should
                actions.append("compopt +o default")
            if flag.metavar:
                pattern = "|".join(f'"{verb.name} {word}"' for word in flag.words)
                values.append(f"        {pattern}) {'; '.join([*actions, 'return'])} ;;")
        names = (
            [other.name for other in commands if other.name] if not verb.name else [word for word, _ in verb.choices]
        )
        names += [word for flag in verb.flags for word in flag.words if word.startswith("--")]
        words.append(f"        {_quote(verb.name)}) words={_quote(' '.join(names))} ;;")
    return "\n".join(
        [
            NOTE,
            "_osora() {",
            '    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} verb="" words="" word',
            '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
            "        [[ $word == -* ]] || { verb=$word; break; }",
            "    done",
            "    COMPREPLY=()",
            '    case "$verb $previous" in',
            *values,
            "    esac",
            '    case "$verb" in',
            *words,
            "    esac",
            '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
            "}",
            "complete -o default -F _osora osora",
            "",
        ]
    )


def zsh(commands: list[Verb]) -> str:
    """A script for zsh, whether it lies in `$fpath` or is sourced."""
    root, *others = commands
    listed = " ".join(_quote(f"{verb.name}:{verb.about}") for verb in others)
    lines = [
        "#compdef osora",
        NOTE,
        "_osora() {",
        "  local state line",
        f"  local -a verbs=({listed})",
        "  typeset -A opt_args",
        "  _arguments -C \\",
        *(f"    {_zsh_spec(flag)} \\" for flag in root.flags),
        "    '1: :->verb' '*:: :->rest'",
        "  case $state in",
        "    verb) _describe command verbs ;;",
        "    rest)",
        "      case $line[1] in",
    ]
    for verb in others:
        specs = [_zsh_spec(flag) for flag in verb.flags]
        if verb.choices:
            specs.append(_quote(f"1:word:({' '.join(word for word, _ in verb.choices)})"))
        lines += [
            f"        {verb.name})",
            "          _arguments \\",
            " \\\n".join(f"            {spec}" for spec in specs),
            "          ;;",
        ]
    lines += [
        "      esac",
        "      ;;",
        "  esac",
        "}",
        'if [[ $funcstack[1] == _osora ]]; then _osora "$@"; else compdef _osora osora; fi',
        "",
    ]
    return "\n".join(lines)


def _zsh_spec(flag: Flag) -> str:
    about = flag.about.replace("[", "\\[").replace("]", "\\]")
    offered = " ".join(value for value, _ in flag.values)
    if flag.takes_path:
        action = f"{{compadd -- {offered}; _files}}" if offered else "_files"
    else:
        action = f"({offered})" if offered else " "
    metavar = flag.metavar.replace(":", "\\:")
    value = f":{metavar}:{action}" if flag.metavar else ""
    once = "*" if flag.repeatable else f"({' '.join(flag.words)})"
    return " ".join(_quote(f"{once}{word}[{about}]{value}") for word in flag.words)


def fish(commands: list[Verb]) -> str:
    """A script for fish: one line per flag."""
    lines = [NOTE, "complete -c osora -f"]
    for verb in commands:
        condition = f"__fish_seen_subcommand_from {verb.name}" if verb.name else "__fish_use_subcommand"
        if verb.name:
            lines.append(f"complete -c osora -n __fish_use_subcommand -a {verb.name} -d {_quote(verb.about)}")
        for word, about in verb.choices:
            lines.append(f"complete -c osora -n {_quote(condition)} -a {_quote(word)} -d {_quote(about)}")
        for flag in verb.flags:
            words = " ".join(f"-l {word[2:]}" if word.startswith("--") else f"-s {word[1:]}" for word in flag.words)
            takes = ("-r -F" if flag.takes_path else "-x") if flag.metavar else ""
            offered = " ".join(_quote(f"{value}\t{about}".rstrip()) for value, about in flag.values)
            known = f"-a {_double(offered)}" if offered else ""
            parts = ["complete -c osora -n", _quote(condition), words, takes, known, "-d", _quote(flag.about)]
            lines.append(" ".join(part for part in parts if part))
    return "\n".join([*lines, ""])


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _double(text: str) -> str:
    return '"' + "".join(f"\\{char}" if char in '\\"$`' else char for char in text) + '"'


SCRIPTS: dict[str, Callable[[list[Verb]], str]] = {"osora.bash": bash, "_osora": zsh, "osora.fish": fish}


def write(folder: Path) -> Iterable[Path]:
    """Write the scripts of all shells into a folder."""
    commands = verbs()
    for name, generate in SCRIPTS.items():
        path = folder / name
        path.write_text(generate(commands), encoding="utf-8")
        yield path


if __name__ == "__main__":
    list(write(Path(sys.argv[1])))
