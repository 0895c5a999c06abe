"""The machines of a run: from Slurm's list of nodes, or from a file."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from opensora_core.errors import InputError

MAX_HOSTS = 65536
HOST = re.compile(r"(?:[A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9_\[:][\w.:%\]-]*")


def expand(nodes: str) -> list[str]:
    """The names in a list as Slurm writes it: `gpu[01-03,7],login` is gpu01 gpu02 gpu03 gpu7 login.

    Several brackets in a name (`rack[1-2]n[1-2]`) count like the digits of a number, the last one fastest.

    Raises:
        InputError: brackets or ranges that are none, or more than 65536 names.
    """
    names: list[str] = []
    for item in re.split(r",(?![^\[]*\])", nodes.strip()):
        parts = re.split(r"\[([^\[\]]*)\]", item.strip())
        if not item.strip() or any("[" in part or "]" in part for part in parts):
            raise InputError(f"{nodes!r} is not a list of nodes", "as in SLURM_JOB_NODELIST: gpu[01-04,7],login")
        found = [""]
        for index, part in enumerate(parts):
            choices = _ranges(part, nodes) if index % 2 else [part]
            if len(found) * len(choices) + len(names) > MAX_HOSTS:
                raise InputError(f"{nodes!r} lists more than {MAX_HOSTS} nodes")
            found = [name + choice for name in found for choice in choices]
        names += found
    return names


def _ranges(text: str, nodes: str) -> list[str]:
    found: list[str] = []
    for item in text.split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", item.strip())
        if bounds is None or int(bounds[2] or bounds[1]) - int(bounds[1]) not in range(MAX_HOSTS):
            raise InputError(f"{item!r} in {nodes!r} is not a range of nodes", "write it as 01-04")
        first, last = bounds[1], bounds[2] or bounds[1]
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def read_hostfile(path: Path) -> list[str]:
    """The machines that a file names, one a line, `name` or `user@name`; from `#` on a line is a comment.

    Raises:
        InputError: the file cannot be read, names none or one twice, or a line is no name of a machine.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the host file {path}: {error}") from None
    hosts: list[str] = []
    for number, line in enumerate(lines, 1):
        host = line.partition("#")[0].strip()
        if not host:
            continue
        if ":" in host:  # neither ssh nor torchrun wants the brackets of an IPv6 address
            host = host.replace("[", "").replace("]", "")
        if not HOST.fullmatch(host):  # above all none that ssh would take for an option
            raise InputError(f"line {number} of {path} is no name of a machine: {host!r}", "one name a line")
        if host in hosts:
            raise InputError(f"line {number} of {path} names {host} again", "one line for each machine")
        hosts.append(host)
    if not hosts:
        raise InputError(f"{path} names no machine", "one name a line")
    return hosts


def address_of(host: str) -> str:
    """The part of `user@name` that others can reach."""
    return host.rpartition("@")[2]


def is_loopback(address: str) -> bool:
    """Whether an address or name leads every machine to itself."""
    return address in ("localhost", "::1") or address.startswith("127.")


def own_address(towards: str = "192.0.2.1") -> str:
    """The address that this machine has for one that it sends to, or its name where there is no way.

    Args:
        towards: that one; the default is set aside for documentation, so that it stands for the way out.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])
