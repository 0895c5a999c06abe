"""What would be started: as words, for every way of starting; the stand-ins for ssh and srun run them for real."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_core import launch
from opensora_core.errors import InputError, ResourceError, UsageError
from opensora_core.launch import Wish
from opensora_core.launch.hosts import expand, read_hostfile
from opensora_core.launch.plan import travelling

LOGS = Path("/runs/mine/logs")
TRAIN = ["train", "--data", "my clips/", "--output", "/runs/mine"]
SLURM = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "gpu[01-02,7],big", "SLURM_CPUS_ON_NODE": "64"}


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("login", ["login"]),
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("r[1-2]n[09-10]-ib", ["r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib"]),
        ("a,b[5]", ["a", "b5"]),
    ],
)
def test_slurms_list_of_nodes_is_expanded(nodes: str, names: list[str]) -> None:
    assert expand(nodes) == names


@pytest.mark.parametrize("nodes", ["", "a[1-", "a]", "a[2-1]", "a[x]", "a[]", "a,,b", "a[1-99999999]", "a[[1]]"])
def test_a_list_of_nodes_that_is_none_is_refused(nodes: str) -> None:
    with pytest.raises(InputError):
        expand(nodes)


def test_a_host_file_has_a_name_a_line(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# mine\nann@one  # the first\n\n10.0.0.2\n")
    assert read_hostfile(path) == ["ann@one", "10.0.0.2"]
    path.write_text("[fe80::1%eth0]\nann@[::2]\n")
    assert read_hostfile(path) == ["fe80::1%eth0", "ann@::2"], "as ssh and torchrun want them"
    path.write_text("localhost\ntwo\n")
    with pytest.raises(UsageError, match="that is itself"):
        launch.plan(Wish(gpus=1, hostfile=path), TRAIN, logs=LOGS, environment={})
    assert launch.plan(Wish(gpus=1, nodes=1, hostfile=path), TRAIN, logs=LOGS, environment={}).nodes == 1
    for text in ("", "-oProxyCommand=touch_me", "a b", "a\na\n", "a;b", "$(a)"):
        path.write_text(text)
        with pytest.raises(InputError):
            read_hostfile(path)


def test_here_all_processes_are_torchruns() -> None:
    plan = launch.plan(Wish(gpus=2), TRAIN, logs=LOGS, environment={})
    assert (plan.way, plan.nodes, plan.processes) == ("torchrun", 1, 2)
    words = plan.commands[0].words
    assert words[:3] == (sys.executable, "-m", "torch.distributed.run")
    assert {"--nnodes=1", "--node-rank=0", "--nproc-per-node=2", "--master-addr=127.0.0.1"} <= set(words)
    assert words[-7:] == ("-m", "opensora_cli", *TRAIN)
    assert int(plan.commands[0].environment["OMP_NUM_THREADS"]) == max((os.cpu_count() or 1) // 2, 1)
    assert shlex.split(plan.commands[0].line)[0] == "env"
    assert launch.plan(Wish(gpus=2), TRAIN, logs=LOGS, environment={"MASTER_PORT": "77"}).end_point == "127.0.0.1:77"
    with pytest.raises(UsageError, match="MASTER_PORT=x is no port"):
        launch.plan(Wish(gpus=2), TRAIN, logs=LOGS, environment={"MASTER_PORT": "x"})


def test_one_machine_is_this_one_unless_slurm_has_another() -> None:
    assert launch.plan(Wish(nodes=1), TRAIN, logs=LOGS, environment={}).way == "torchrun"
    assert launch.plan(Wish(nodes=1), TRAIN, logs=LOGS, environment=SLURM).way == "srun"


def test_by_hand_each_machine_has_its_command_and_all_the_same_end_point() -> None:
    plan = launch.plan(Wish(gpus=8, nodes=2), TRAIN, logs=LOGS, environment={"MASTER_ADDR": "one", "MASTER_PORT": "77"})
    assert plan.way == "by hand" and plan.end_point == "one:77"
    for node, command in enumerate(plan.commands):
        words = shlex.split(command.line)
        assert {"--nnodes=2", f"--node-rank={node}", "--master-addr=one", "--master-port=77"} <= set(words)
        assert "my clips/" in words and f"OSORA_LOGS={LOGS}" in words


def test_in_an_allocation_slurm_starts_one_torchrun_a_machine() -> None:
    plan = launch.plan(Wish(gpus=8, nodes=2), TRAIN, logs=LOGS, environment=SLURM)
    words = plan.commands[0].words
    assert plan.way == "srun" and plan.end_point == "gpu01:24242"
    assert {"--nodes=2", "--ntasks=2", "--cpus-per-task=64", "--nodelist=gpu01,gpu02"} <= set(words)
    assert '--node-rank="$SLURM_PROCID"' in words[-1] and "--master-addr=gpu01" in words[-1]
    again = launch.plan(Wish(gpus=8, nodes=2), TRAIN, logs=LOGS, attempt=1, environment=SLURM)
    assert again.end_point == "gpu01:24243", "each start has a store of its own"
    with pytest.raises(UsageError, match=r"more than the 4 of Slurm's job 4242"):
        launch.plan(Wish(gpus=8, nodes=5), TRAIN, logs=LOGS, environment=SLURM)


def test_sbatch_gets_a_file_that_bash_can_read(tmp_path: Path) -> None:
    plan = launch.plan(Wish(gpus=8, nodes=4, submit=True, max_restarts=3), TRAIN, logs=LOGS, environment=SLURM)
    assert plan.commands[0].words == ("sbatch", "/runs/mine/logs/job.sbatch")
    lines = plan.script.splitlines()
    assert lines[0] == "#!/bin/bash" and "#SBATCH --nodes=4" in lines and "#SBATCH --gpus-per-node=8" in lines
    words = shlex.split(lines[-1])
    assert words[words.index("train") :] == [*TRAIN, "--nodes", "4", "--gpus", "8", "--max-restarts", "3"]
    (tmp_path / "job").write_text(plan.script)
    subprocess.run(["bash", "-n", tmp_path / "job"], check=True)


def test_what_slurm_says_of_a_job_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = tmp_path / "sbatch"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    plan = launch.plan(Wish(gpus=8, nodes=4, submit=True), TRAIN, logs=tmp_path / "my logs", environment={})
    for script, words in [
        ("echo Submitted batch job 7", "Submitted batch job 7; the file is"),
        ("echo no >&2; exit 3", ""),
    ]:
        sbatch.write_text(f"#!/bin/sh\n{script}\n")
        sbatch.chmod(0o755)
        if words:
            assert launch.submit(plan).startswith(words)
        else:
            with pytest.raises(ResourceError, match=r"job\.sbatch: no"):
                launch.submit(plan)
    assert f"#SBATCH --output='{tmp_path}/my logs/slurm-%j.log'" in (tmp_path / "my logs" / "job.sbatch").read_text()


def test_ssh_carries_what_is_on_the_list_and_never_a_secret(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("ann@one\ntwo\n")
    secrets = {"HF_TOKEN": "s3cret", "NCCL_AUTH_TOKEN": "s3cret", "TORCH_API_KEY": "s3cret", "AWS_ACCESS": "s3cret"}
    environment = {"NCCL_IB_HCA": "mlx5 0", "PYTHONPATH": "/lib a", "HF_HOME": "/hf", **secrets}
    assert set(travelling(environment)) == {"NCCL_IB_HCA", "PYTHONPATH", "HF_HOME"}
    wish = Wish(gpus=2, hostfile=tmp_path / "hosts")
    plan = launch.plan(wish, TRAIN, logs=LOGS, environment=environment)
    assert plan.way == "ssh" and plan.nodes == 2 and plan.end_point.startswith("one:")
    assert [command.node for command in plan.commands] == ["ann@one", "two"]
    assert "s3cret" not in "".join(command.line for command in plan.commands)
    assert all("NCCL_IB_HCA=mlx5 0" in shlex.join(shlex.split(command.words[-1])) for command in plan.commands)
    colossal = launch.plan(wish, TRAIN, logs=LOGS, engine="colossalai", environment=environment)
    assert colossal.commands[0].words[:2] == ("colossalai", "run") and colossal.clean_environment


def test_what_ssh_runs_reaches_its_words_whole_and_ends_with_the_connection(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("two\n")
    words = ["a b", "it's", "$HOME", '"', "\\"]
    logs = tmp_path / "the logs"
    plan = launch.plan(Wish(gpus=1, hostfile=tmp_path / "hosts"), words, logs=logs, environment={})
    remote = plan.commands[0].words[-1]
    script = tmp_path / "torchrun"
    script.write_text(
        f"#!{sys.executable}\nimport json, os, sys, time\nprint(json.dumps(sys.argv), flush=True)\n"
        "print('noise', file=sys.stderr)\nos.write(int(os.environ['OSORA_TERMINAL']), b'rank 0')\ntime.sleep(60)"
    )
    script.chmod(0o755)
    remote = remote.replace(f"{sys.executable} -m torch.distributed.run", str(script))
    with (tmp_path / "terminal").open("w") as terminal:
        shell = subprocess.Popen(
            ["sh", "-c", remote], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=terminal, text=True
        )
    assert shell.stdin is not None and shell.stdout is not None
    assert json.loads(shell.stdout.readline())[-len(words) :] == words
    assert shell.poll() is None
    shell.stdin.close()
    assert shell.wait(20) != 0
    script.write_text("#!/bin/sh\necho done\n")
    done = subprocess.Popen(["sh", "-c", remote], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None and done.stdout.read() == "done\n", "nobody else holds the connection"
    assert done.wait(20) == 0
    assert (logs / "launcher-0.log").read_text() == "noise\n" and (tmp_path / "terminal").read_text() == "rank 0"


@pytest.mark.parametrize(
    ("typed", "inner", "again"),
    [
        ("train --gpus 2 -o a --data x", "train --data x --output R", "train --data x --resume R"),
        ("train --gpus=2 -oa --max-restarts 3", "train --output R", "train --resume R"),
        ("train --resume --nodes 2", "train --resume --output R", "train --resume R"),
        ("train --resume R --submit --json", "train --resume R --json --output R", "train --json --resume R"),
        (
            "train --dry-run=measure --write-manifest m.csv --seed 1",
            "train --seed 1 --output R",
            "train --seed 1 --resume R",
        ),
        ("train --resume= --hostfile h", "train --resume= --output R", "train --resume R"),
    ],
)
def test_processes_get_the_words_less_those_of_launching(typed: str, inner: str, again: str) -> None:
    assert launch.inner_words(typed.split(), Path("R")) == inner.split()
    assert launch.again_words(typed.split(), Path("R")) == again.split()


def test_a_prompt_may_look_like_a_flag() -> None:
    words = ["sample", "--prompt", "-old man", "-p", "--gpus", "--gpus", "2"]
    assert launch.inner_words(words, Path("R"), {"--prompt", "-p", "--gpus"}) == [*words[:5], "--output", "R"]


def test_a_recipe_goes_on_without_settings() -> None:
    words = ["train", "--recipe", "three-stages", "--data", "x", "--json"]
    assert launch.again_words(words, Path("R"), recipe=True) == ["train", "--resume", "R", "--json"]


@pytest.mark.parametrize(
    "wish",
    [
        Wish(gpus=0),
        Wish(nodes=-1),
        Wish(gpus=2, max_restarts=-1),
        Wish(gpus=8, nodes=2, max_restarts=1),
        Wish(nodes=2, submit=True),
        Wish(gpus=8, nodes=2, submit=True, hostfile=Path("hosts")),
    ],
)
def test_wishes_that_mean_nothing_are_refused(wish: Wish) -> None:
    with pytest.raises(UsageError):
        launch.plan(wish, TRAIN, logs=LOGS, environment={})


def test_a_tool_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for way in ("srun", "sbatch", "ssh", "colossalai"):
        with pytest.raises(UsageError, match=f"^{way} is not on this machine"):
            launch.require_tool(way)  # type: ignore[arg-type]
