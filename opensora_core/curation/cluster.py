"""A Ray cluster: one that is there, or one of this machine's own that begins and ends with the work."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import opensora_core
from opensora_core.errors import ResourceError, UsageError

POLL_SECONDS = 0.2
SEE_SECONDS = 5.0
"""That a shared file system may keep a new file from others."""

_CONNECT_SECONDS = 10.0
_STORE_BYTES = 256 * 2**20  # of shared memory, for words on their way


def ray() -> Any:
    """The library, which sends nothing home and is imported only where it is asked for.

    Raises:
        UsageError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return import_module("ray")
    except ImportError as error:
        raise UsageError(
            f"--engine ray needs Ray, which cannot be imported: {error}", 'pip install "osora[ray]"'
        ) from None


@contextmanager
def connected(address: str, num_cpus: int = 0) -> Iterator[Any]:
    """Be part of a cluster, or of one of this machine's own that ends with it. One that is there already is used.

    To be entered on the main thread first: Ray's processes end with the thread that started them.

    Args:
        address: `HOST:PORT`, `auto`, or empty for this machine alone.
        num_cpus: that this machine is to count as, if it is alone; 0 counts its own.

    Yields:
        The library.

    Raises:
        UsageError: Ray is not installed, or an address that it has no use for.
        ResourceError: there is no such cluster.
    """
    library = ray()
    if library.is_initialized():
        yield library
        return
    if "://" in address:
        raise UsageError(
            f"--ray-address {address} is that of a client",
            "start it on a machine of the cluster, with HOST:PORT or auto",
        )
    _require_listener(address)
    # Ray puts sockets there, whose names may not be long
    own = None if address else tempfile.mkdtemp(prefix="osora-ray-", dir="/tmp" if Path("/tmp").is_dir() else None)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if own:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options |= {"address": "local", "include_dashboard": False, "num_cpus": max(num_cpus, cores)}
        options |= {"object_store_memory": _STORE_BYTES, "_temp_dir": own}
        options |= {"_system_config": {"worker_niceness": 0}}  # else anything else here goes first
    else:
        options["address"] = address
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if is_main else None
    try:
        try:
            library.init(**options)
        except (ConnectionError, ValueError, RuntimeError, AssertionError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            if own:
                raise ResourceError(f"Ray does not start here: {reason}", "leave --engine ray out") from error
            raise _no_cluster(address, reason) from error
        with suppress(AttributeError):  # deaths are told to who waits; Ray would also print them, among our own words
            library._private.worker.print_to_stdstream = lambda *_, **__: None
        if before is not None:
            signal.signal(signal.SIGTERM, before)  # Ray's own would end the process with nothing tidied up
        yield library
    finally:
        library.shutdown()
        if own:
            shutil.rmtree(own, ignore_errors=True)


def _require_listener(address: str) -> None:
    """Find out in seconds what takes Ray minutes."""
    host, _, port = address.rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, reason: str) -> ResourceError:
    return ResourceError(
        f"there is no Ray cluster at {address}: {reason}",
        "ray start --head on one machine and ray start --address=HOST:PORT on the others; auto is that of this machine",
    )


class Actor:
    """What every worker of Ray does first, whatever it is for."""

    def __init__(self, folder: str) -> None:
        # processes that it spawns would otherwise import the main module of Ray's worker
        vars(sys.modules["__main__"]).pop("__file__", None)
        self._folder = folder

    def begin(self, token: str) -> tuple[str, str, str]:
        """Go to the driver's folder.

        Args:
            token: a file that the driver has just written, or empty.

        Returns:
            The machine, the version, and what it does not see.
        """
        unseen = ""
        try:
            os.chdir(self._folder)
        except OSError:
            unseen = self._folder
        end = time.monotonic() + SEE_SECONDS
        while token and not unseen and not os.path.exists(token):  # noqa: PTH110
            if time.monotonic() > end:
                unseen = str(Path(token).parent)
            time.sleep(POLL_SECONDS)
        return socket.gethostname(), opensora_core.__version__, unseen


def require_same(name: str, version: str, unseen: str) -> None:
    """Check what an actor answers to `begin`.

    Raises:
        ResourceError: its machine has another version, or does not see what it has to.
    """
    if version != opensora_core.__version__:
        raise ResourceError(
            f"{name} has osora {version}, and this is {opensora_core.__version__}",
            "install the same on all machines of the cluster",
        )
    if unseen:
        raise unseen_error(name, unseen)


def unseen_error(name: str, path: str) -> ResourceError:
    """What to say of a machine that does not see a path."""
    return ResourceError(
        f"{name} does not see {path}, or sees another",
        "all machines of the cluster have to have inputs and output at the same place, such as on a network drive",
    )


def told(error: BaseException) -> str:
    """The line of Ray's long story that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "Error" in line or "died" in line), lines[0] if lines else repr(error))
