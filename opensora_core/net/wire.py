"""One connection, to an address that was checked, on which nothing can take longer than it may."""

from __future__ import annotations

import base64
import io
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from opensora_core.net.address import Refused, Target, is_private, redacted, resolve

_SLICE_SECONDS = 0.25  # after which a wait looks whether it is still wanted
_MAX_PROXY_ANSWER = 16 * 2**10
_BUFFER = 1 << 16


class Cancelled(Exception):  # noqa: N818 - it did what it was asked to
    """The work was asked to stop."""


class Slow(TimeoutError):  # noqa: N818 - a timeout, and named like one
    """Less came than the least that is accepted."""


@dataclass
class Clock:
    """What a transfer may take: everything that waits asks here first.

    Attributes:
        deadline: when it ends, whatever happens.
        stall_seconds: between two bytes.
        min_bytes_per_second: measured over `window_seconds` of waiting; 0 is not measured.
        stop: set where the work is no longer wanted.
    """

    deadline: float
    stall_seconds: float
    min_bytes_per_second: float = 0.0
    window_seconds: float = 10.0
    stop: threading.Event = field(default_factory=threading.Event)

    def left(self) -> float:
        """Seconds until the deadline.

        Raises:
            Cancelled: the work is no longer wanted.
            TimeoutError: there are none.
        """
        if self.stop.is_set():
            raise Cancelled
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left


class Wire(io.RawIOBase):
    """A connected socket that is read under a clock. Closing it closes the socket."""

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        super().__init__()
        self.sock, self.clock = sock, clock
        self._waited, self._came = 0.0, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes.

        Raises:
            TimeoutError: none came in time, or too few.
            Cancelled: they are no longer wanted.
        """
        began = time.monotonic()
        while True:
            before = time.monotonic()
            left = min(self.clock.left(), began + self.clock.stall_seconds - before)
            if left <= 0:
                raise TimeoutError(f"nothing came for {self.clock.stall_seconds:g} s")
            self.sock.settimeout(min(left, _SLICE_SECONDS))
            try:
                count = self.sock.recv_into(buffer)
            except TimeoutError:
                self._measure(time.monotonic() - before, 0)
                continue
            self._measure(time.monotonic() - before, count)
            return count

    def _measure(self, waited: float, count: int) -> None:
        """Only waiting counts, so that a slow disk or a bandwidth limit is not held against the server."""
        clock = self.clock
        self._waited += waited
        self._came += count
        if self._waited >= clock.window_seconds:
            if self._came < clock.min_bytes_per_second * self._waited:
                raise Slow(f"only {self._came / self._waited:.0f} bytes/s came")
            self._waited, self._came = 0.0, 0

    # the part of a socket that http.client uses -----------------------------------------------------------------------

    def makefile(self, *_: Any, **__: Any) -> io.BufferedReader:
        """What the answer is read from."""
        return io.BufferedReader(self, _BUFFER)

    def sendall(self, content: bytes) -> None:
        """Send everything, in the time there is."""
        self.sock.settimeout(self.clock.left())
        self.sock.sendall(content)

    def close(self) -> None:
        """Close the socket too."""
        if not self.closed:
            with suppress(OSError):
                self.sock.close()
            super().close()


def connect(
    target: Target, clock: Clock, *, allow_private: bool, connect_seconds: float
) -> tuple[Wire, Mapping[str, str] | None]:
    """Connect to a server, or to the proxy that the environment names for it.

    Every address that the name stands for is checked, and the connection is made to one of those that were, so that a
    name cannot mean one machine when it is checked and another when it is used.

    Returns:
        The connection, and, where a request on it is read by a proxy and so names the whole address, what else such a
        request has in its header.

    Raises:
        Refused: an address of a private network.
        OSError: nobody is there.
    """
    until = time.monotonic() + min(connect_seconds, clock.left())
    proxy = getproxies().get(target.scheme, "")
    if proxy and proxy_bypass(target.host):
        proxy = ""
    if proxy:
        if not allow_private:
            with suppress(OSError):  # where only the proxy knows names, only the proxy can check them
                _check(target, resolve(target.host, target.port, until - time.monotonic()))
        return _through(proxy, target, clock, until)
    addresses = resolve(target.host, target.port, until - time.monotonic())
    if not allow_private:
        _check(target, addresses)
    wire = Wire(_dial(addresses, target.port, until), clock)
    return (_secure(wire, target, until) if target.scheme == "https" else wire), None


def _check(target: Target, addresses: list[str]) -> None:
    for address in addresses:
        if is_private(address):
            raise Refused(f"{target.netloc} is {address}, in no public network (download.allow_private=true lets it)")


def _dial(addresses: list[str], port: int, until: float) -> socket.socket:
    failure: OSError = OSError("the name stands for no address")
    for number, address in enumerate(addresses):
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        try:  # a dead address leaves time for the others
            return socket.create_connection((address, port), timeout=left / (len(addresses) - number))
        except OSError as error:
            failure = error
    raise failure


def _secure(wire: Wire, target: Target, until: float) -> Wire:
    try:
        wire.sock.settimeout(max(until - time.monotonic(), 0.001))
        wire.sock = ssl.create_default_context().wrap_socket(wire.sock, server_hostname=target.host)
    except BaseException:
        wire.close()
        raise
    return wire


def _through(proxy: str, target: Target, clock: Clock, until: float) -> tuple[Wire, Mapping[str, str] | None]:
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    server = Target.parse(proxy)
    if urlsplit(proxy).scheme != "http":
        raise Refused(f"the proxy {redacted(proxy)} is of a kind that is not spoken here: only http:// is")
    addresses = resolve(server.host, server.port, until - time.monotonic())
    wire = Wire(_dial(addresses, server.port, until), clock)
    login = {}
    if server.login:
        login = {"Proxy-Authorization": f"Basic {base64.b64encode(server.login.encode()).decode()}"}
    if target.scheme == "http":
        return wire, login
    host = f"[{target.host}]" if ":" in target.host else target.host
    lines = [f"CONNECT {host}:{target.port} HTTP/1.1", f"Host: {host}:{target.port}"]
    lines += [f"{name}: {value}" for name, value in login.items()]
    try:
        wire.sendall("\r\n".join([*lines, "", ""]).encode())
        answer, byte = b"", bytearray(1)  # one by one: what follows the empty line belongs to TLS
        while not answer.endswith(b"\r\n\r\n"):
            if len(answer) > _MAX_PROXY_ANSWER or not wire.readinto(byte):
                raise ConnectionError("the proxy broke off")
            answer += byte
        status = answer.split(b" ", 2)[1:2]
        if status != [b"200"]:
            raise ConnectionError(f"the proxy answered {b''.join(status).decode('ascii', 'replace')}")
    except BaseException:
        wire.close()
        raise
    return _secure(wire, target, until), None
