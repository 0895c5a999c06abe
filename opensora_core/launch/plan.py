"""What is to be started, and where: the processes of one command, as command lines.

Every way ends in the same line on each machine: torchrun with the static rendezvous (`--master-addr --master-port
--node-rank`), which is the one that meets again reliably, around the command that was typed. What is added is `env`
with what the processes must know; of the rest of the environment only names on a list travel through ssh, as a command
line can be read by everybody on a machine.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from opensora_core.errors import ResourceError, UsageError
from opensora_core.files import write_bytes
from opensora_core.launch.hosts import address_of, expand, free_port, is_loopback, own_address, read_hostfile

Way = Literal["torchrun", "srun", "sbatch", "ssh", "colossalai", "by hand"]

LOGS_VARIABLE = "OSORA_LOGS"
TERMINAL_VARIABLE = "OSORA_TERMINAL"
ATTEMPT_VARIABLE = "OSORA_ATTEMPT"
TRAVELS = re.compile(
    r"NCCL_\w+|GLOO_\w+|TORCH_\w+|TORCHINDUCTOR_\w+|PYTORCH_\w+|OMP_\w+|PYTHONPATH|LD_LIBRARY_PATH|HF_HOME|HF_HUB_OFFLINE"
)
STAYS = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
NEEDED_HERE = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TMPDIR", "SSH_AUTH_SOCK", "VIRTUAL_ENV")
FIRST_PORT, NUM_PORTS = 20000, 10000  # below those that systems hand out by themselves
SHUTDOWN_SECONDS = 120  # that a checkpoint may take when the run is asked to stop

LIFELINE = "exec 3<&0; { cat <&3; kill $$; } >/dev/null 2>&1 & exec 3<&-; "
"""Ends a command on another machine when the connection does: nothing else would tell it.

The connection ends in turn when nobody speaks into it any more, so what waits here must not hold its other end.
"""


@dataclass(frozen=True)
class Wish:
    """What was asked for.

    Attributes:
        gpus: processes on each machine; None is one, or with several machines one for each of their GPUs.
        nodes: machines; None is this one, or those of the host file.
        hostfile: that names them.
        submit: hand the whole to Slurm's queue.
        max_restarts: how often a failed job is started again.
    """

    gpus: int | None = None
    nodes: int | None = None
    hostfile: Path | None = None
    submit: bool = False
    max_restarts: int = 0

    @property
    def is_many(self) -> bool:
        """Whether anything has to be started at all."""
        is_alone = self.gpus in (None, 1) and self.nodes is None and self.hostfile is None
        return not is_alone or self.submit or self.max_restarts > 0


@dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
        node: the machine that it is about.
        words: as it is started from here.
        environment: what is set for it.
        lifeline: whether it ends when its stdin is closed.
    """

    node: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    lifeline: bool = False

    @property
    def line(self) -> str:
        """As one would type it."""
        return shlex.join([*_env(self.environment), *self.words])


@dataclass(frozen=True)
class LaunchPlan:
    """What is started.

    Attributes:
        way: by which.
        end_point: where the processes meet; empty where Slurm decides that later.
        nodes: machines.
        processes: on each of them; 0 is one for each GPU that it has.
        commands: one for each machine, or one for all of them.
        script: the text of the file for sbatch.
        clean_environment: whether the commands may see only what travels.
    """

    way: Way
    end_point: str
    nodes: int
    processes: int
    commands: tuple[Command, ...]
    script: str = ""
    clean_environment: bool = False


def plan(
    wish: Wish,
    words: Sequence[str],
    *,
    logs: Path,
    engine: Literal["torch", "colossalai"] = "torch",
    attempt: int = 0,
    environment: Mapping[str, str] = os.environ,
) -> LaunchPlan:
    """Decide how processes are started.

    Args:
        wish: what was asked for.
        words: what each process is to run, after `osora`.
        logs: absolute folder for what they say.
        engine: that trains.
        attempt: how often they were started before; each start meets elsewhere, at a store that knows nothing.
        environment: in which Slurm, and `MASTER_ADDR` and `MASTER_PORT`, are looked for.

    Raises:
        UsageError: what was asked for contradicts itself or its surroundings.
        InputError: a host file or a list of nodes that cannot be read.
    """
    _check(wish)
    ours = {LOGS_VARIABLE: str(logs), ATTEMPT_VARIABLE: str(attempt)}
    job = _Job(wish, tuple(words), ours, environment, attempt)
    if wish.submit:
        return job.sbatch(logs)
    if wish.hostfile is not None:
        return job.colossalai(wish.hostfile) if engine == "colossalai" else job.ssh(wish.hostfile)
    if wish.nodes is not None and "SLURM_JOB_ID" in environment:
        return job.srun()
    return job.here() if wish.nodes in (None, 1) else job.by_hand()


def _check(wish: Wish) -> None:
    for flag, value in (("--gpus", wish.gpus), ("--nodes", wish.nodes)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} {value} starts nothing", f"{flag} 1, or more")
    if wish.max_restarts < 0:
        raise UsageError(f"--max-restarts {wish.max_restarts} is less than none", "--max-restarts 0, or more")
    if wish.submit and wish.hostfile is not None:
        raise UsageError("--submit asks Slurm for machines, and --hostfile names them", "leave out one of the two")
    if wish.submit and (wish.gpus is None or wish.nodes is None):
        raise UsageError("--submit asks Slurm for machines and GPUs", "--submit --nodes 2 --gpus 8")


@dataclass(frozen=True)
class _Job:
    wish: Wish
    words: tuple[str, ...]
    ours: Mapping[str, str]
    environment: Mapping[str, str]
    attempt: int

    def here(self) -> LaunchPlan:
        gpus = self.wish.gpus or 1
        end_point = self._end_point("127.0.0.1")
        threads = self.environment.get("OMP_NUM_THREADS") or str(max((os.cpu_count() or 1) // gpus, 1))
        own = {
            **self.ours,
            "OMP_NUM_THREADS": threads,
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
        }
        command = Command("this machine", self._torchrun(1, "0", str(gpus), end_point), own)
        return LaunchPlan("torchrun", end_point, 1, gpus, (command,))

    def by_hand(self) -> LaunchPlan:
        if self.wish.max_restarts:
            raise UsageError(
                "--max-restarts needs somebody who starts the processes, and these commands are for you to start",
                "name the machines by --hostfile, or run it in an allocation of Slurm",
            )
        nodes = self.wish.nodes or 1
        end_point = self._end_point(self.environment.get("MASTER_ADDR") or own_address(), 29500)
        commands = tuple(
            Command(f"node {node}", self._torchrun(nodes, str(node), self._gpus, end_point), dict(self.ours))
            for node in range(nodes)
        )
        return LaunchPlan("by hand", end_point, nodes, self.wish.gpus or 0, commands)

    def ssh(self, hostfile: Path) -> LaunchPlan:
        hosts = self._hosts(hostfile)
        end_point = self._end_point(address_of(hosts[0]), FIRST_PORT + os.getpid() % NUM_PORTS)
        travels = {**travelling(self.environment), **self.ours, TERMINAL_VARIABLE: "0"}
        commands = []
        for node, host in enumerate(hosts):
            torchrun = self._torchrun(len(hosts), str(node), self._gpus, end_point)
            inner = self._apart(node, shlex.join([*_env(travels), *torchrun]))
            inner = f"cd {shlex.quote(str(Path.cwd()))} && {inner}"
            options = ("-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
            # the shell of a login may be any; what the lifeline is written in is sh
            words = ("ssh", *options, "--", host, f"exec sh -c {shlex.quote(LIFELINE + inner)}")
            commands.append(Command(host, words, lifeline=True))
        return LaunchPlan("ssh", end_point, len(hosts), self.wish.gpus or 0, tuple(commands))

    def colossalai(self, hostfile: Path) -> LaunchPlan:
        hosts = self._hosts(hostfile)
        if self.wish.gpus is None:
            raise UsageError("colossalai run wants to know how many processes a machine has", "add --gpus 8")
        end_point = self._end_point(address_of(hosts[0]), FIRST_PORT + os.getpid() % NUM_PORTS)
        address, _, port = end_point.rpartition(":")
        words = (
            *("colossalai", "run", "--nproc_per_node", str(self.wish.gpus), "--hostfile", str(hostfile)),
            *("--num_nodes", str(len(hosts)), "--master_addr", address, "--master_port", port),
            *("-m", "opensora_cli", "--", *map(shlex.quote, self.words)),  # it joins them by blanks, for a shell
        )
        command = Command(", ".join(hosts), words, self.ours)
        return LaunchPlan("colossalai", end_point, len(hosts), self.wish.gpus, (command,), clean_environment=True)

    def srun(self) -> LaunchPlan:
        listed = self.environment.get("SLURM_JOB_NODELIST") or self.environment.get("SLURM_NODELIST") or ""
        hosts, nodes = expand(listed), self.wish.nodes or 1
        if nodes > len(hosts):
            raise UsageError(
                f"--nodes {nodes} is more than the {len(hosts)} of Slurm's job {self.environment['SLURM_JOB_ID']}: "
                f"{listed}",
                f"--nodes {len(hosts)}, or salloc --nodes={nodes}",
            )
        chosen = hosts[:nodes]
        number = re.sub(r"\D", "", self.environment["SLURM_JOB_ID"]) or "0"
        end_point = self._end_point(chosen[0], FIRST_PORT + int(number) % NUM_PORTS)
        cores = self.environment.get("SLURM_CPUS_ON_NODE")
        torchrun = self._torchrun(nodes, "NODE", self._gpus, end_point)
        ours = {**self.ours, TERMINAL_VARIABLE: "0"}
        inner = shlex.join([*_env(ours), *torchrun]).replace("--node-rank=NODE", '--node-rank="$SLURM_PROCID"')
        words = (
            *("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"),
            *((f"--cpus-per-task={cores}",) if cores else ()),
            *((f"--nodelist={','.join(chosen)}",) if nodes < len(hosts) else ()),
            *("bash", "-c", self._apart('"$SLURM_PROCID"', inner)),
        )
        return LaunchPlan(
            "srun", end_point, nodes, self.wish.gpus or 0, (Command(", ".join(chosen), words),)
        )  # fmt: skip

    def sbatch(self, logs: Path) -> LaunchPlan:
        nodes, gpus = self.wish.nodes or 1, self.wish.gpus or 1
        flags = ["--nodes", str(nodes), "--gpus", str(gpus)]
        if self.wish.max_restarts:
            flags += ["--max-restarts", str(self.wish.max_restarts)]
        command = shlex.join([sys.executable, "-m", "opensora_cli", *self.words, *flags])
        on_cpu = {("--device", "cpu")} & set(itertools.pairwise(self.words)) or "--device=cpu" in self.words
        script = "\n".join(
            [
                "#!/bin/bash",
                "#SBATCH --job-name=osora",
                f"#SBATCH --nodes={nodes}",
                "#SBATCH --ntasks-per-node=1",
                *([] if on_cpu else [f"#SBATCH --gpus-per-node={gpus}"]),
                "#SBATCH --exclusive",
                f"#SBATCH --output={shlex.quote(f'{logs}/slurm-%j.log')}",
                "#SBATCH --open-mode=append",
                f"#SBATCH --signal=B:TERM@{SHUTDOWN_SECONDS}",
                f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
                f"exec {command}",
                "",
            ]
        )
        words = ("sbatch", str(logs / "job.sbatch"))
        return LaunchPlan("sbatch", "", nodes, gpus, (Command("Slurm", words),), script=script)

    def _apart(self, node: int | str, line: str) -> str:
        """A line for a shell: torchrun speaks into a log, and rank 0 gets the terminal, as the stdin handed on."""
        logs = shlex.quote(self.ours[LOGS_VARIABLE])
        return f"mkdir -p {logs} && exec {line} <&2 2>>{logs}/launcher-{node}.log"

    @property
    def _gpus(self) -> str:
        return "gpu" if self.wish.gpus is None else str(self.wish.gpus)

    def _torchrun(self, nodes: int, node: str, gpus: str, end_point: str) -> tuple[str, ...]:
        address, _, port = end_point.rpartition(":")
        return (
            *(sys.executable, "-m", "torch.distributed.run"),
            *(f"--nnodes={nodes}", f"--node-rank={node}", f"--nproc-per-node={gpus}"),
            *(f"--master-addr={address}", f"--master-port={port}", "-m", "opensora_cli", *self.words),
        )

    def _end_point(self, address: str, port: int | None = None) -> str:
        """Where this start meets: at `MASTER_PORT`, else at the port, else at a free one; a later start beside it."""
        given = self.environment.get("MASTER_PORT")
        if given and not (given.isdecimal() and 0 < int(given) + self.attempt < 2**16):
            raise UsageError(f"MASTER_PORT={given} is no port", "a number below 65536, or 'unset MASTER_PORT'")
        first = int(given) if given else port
        return f"{address}:{free_port() if first is None else first + self.attempt}"

    def _hosts(self, hostfile: Path) -> list[str]:
        hosts = read_hostfile(hostfile)
        nodes = self.wish.nodes or len(hosts)
        if nodes > len(hosts):
            raise UsageError(f"--nodes {nodes} is more than the {len(hosts)} of {hostfile}", f"--nodes {len(hosts)}")
        if nodes > 1 and is_loopback(address_of(hosts[0])):
            raise UsageError(
                f"{hosts[0]} is the first of {hostfile}, and to every machine that is itself",
                "name it as the others reach it",
            )
        return hosts[:nodes]


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment may go to another machine on a command line, where everybody can read it."""
    return {
        name: value for name, value in environment.items() if TRAVELS.fullmatch(name) and not STAYS.search(name)
    }  # fmt: skip


def require_tool(way: Way) -> None:
    """Check that what starts the processes is there.

    Raises:
        UsageError: it is not; it is named.
    """
    tool = {"srun": "srun", "sbatch": "sbatch", "ssh": "ssh", "colossalai": "colossalai"}.get(way)
    if tool is not None and shutil.which(tool) is None:
        hint = {
            "colossalai": "leave out --engine colossalai, or install its command: see docs/multi-node.md",
            "ssh": "install an ssh client, or leave out --hostfile for commands to start yourself",
        }.get(way, "run it where Slurm is, or leave out --submit; --dry-run shows what would be started")
        raise UsageError(f"{tool} is not on this machine", hint)


def submit(plan: LaunchPlan) -> str:
    """Write the file of a plan for sbatch and hand it over; returns what sbatch says.

    Raises:
        ResourceError: the file cannot be written, or Slurm does not take it.
    """
    command = plan.commands[0].words
    write_bytes(Path(command[-1]), plan.script.encode())
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = done.stderr.strip() or f"it ended with {done.returncode}"
        raise ResourceError(f"sbatch does not take {command[-1]}: {said}", "its flags are also read from SBATCH_*")
    return f"{done.stdout.strip()}; the file is {command[-1]}"


def _env(environment: Mapping[str, str]) -> list[str]:
    return ["env", *(f"{name}={value}" for name, value in environment.items())] if environment else []
