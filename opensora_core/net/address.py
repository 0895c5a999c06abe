"""Addresses: what of them may be shown, and to which machines they may lead."""

from __future__ import annotations

import ipaddress
import queue
import re
import socket
import threading
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit, urlunsplit

_SECRET = re.compile(
    r"key|token|secret|sign|^sig$|passw|pwd|auth|jwt|credential|session|policy|hmac|^code$|^access|^sid$", re.IGNORECASE
)
_PAIR = re.compile(r"([^&;=]*)=([^&;]*)")
_EMBEDDING = tuple(map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")))
"""Networks whose addresses end in one of IPv4, which is where they lead; those that Python knows are not among them."""

_PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Unavailable(Exception):  # noqa: N818 - a reason within a message for users, never seen on its own
    """Something that cannot be had; its text completes a sentence and holds no secret.

    Attributes:
        status: that the server answered with; 0 where it is not about that.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Refused(Unavailable):
    """An address that is not gone to: trying again would not help."""


@dataclass(frozen=True)
class Target:
    """An http address, taken apart.

    Attributes:
        scheme: http or https.
        host: a name or a number, without brackets.
        port: given, or the usual one.
        path: with the query, ready to be sent.
        login: `user:password`, or empty.
    """

    scheme: str
    host: str
    port: int
    path: str
    login: str

    @classmethod
    def parse(cls, url: str) -> Target:
        """Take an address apart.

        Raises:
            Refused: it is none of http or https, or makes no sense.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise Refused("an address that cannot be understood") from None
        scheme = parts.scheme.lower()
        if scheme not in _PORTS or not parts.hostname:
            raise Refused(f"{redacted(url)} is no http or https address")
        if any(ord(char) < 0x20 or char == "\x7f" for char in url):
            raise Refused(f"{redacted(url)!r} holds control characters")
        try:
            host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
        except UnicodeError:
            raise Refused(f"{redacted(url)} names no machine") from None
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            path += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]|")
        login = ""
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        return cls(scheme, host, port or _PORTS[scheme], path, login)

    @property
    def origin(self) -> tuple[str, str, int]:
        """What two addresses of the same server share."""
        return self.scheme, self.host, self.port

    @property
    def netloc(self) -> str:
        """The value of a Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def redacted(url: str) -> str:
    """An address as it may be shown: without login, fragment, and the values of keys, tokens and signatures."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(an address that cannot be understood)"
    path = parts.path if parts.netloc else parts.path.rpartition("@")[2]  # a login of something that is no address
    query = _PAIR.sub(lambda pair: f"{pair[1]}=***" if _SECRET.search(unquote(pair[1])) else pair[0], parts.query)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, query, ""))


def is_private(address: str) -> bool:
    """Whether an address is of this machine, of a local network, or of anything else that is not the open internet."""
    ip: Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if any(ip in network for network in _EMBEDDING):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_private(str(inner))
        if ip.is_site_local:
            return True
    return not ip.is_global or ip.is_multicast


def resolve(host: str, port: int, seconds: float) -> list[str]:
    """The addresses that a name stands for.

    It is looked up in a thread of its own: a resolver has its own timeouts, which nothing can shorten.

    Raises:
        TimeoutError: no answer in time.
        OSError: there is no such name.
    """
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=max(seconds, 0.001))
    except queue.Empty:
        raise TimeoutError("timed out") from None
    if isinstance(answer, UnicodeError):
        raise OSError("not a name of a machine")
    if isinstance(answer, Exception):
        raise answer
    return answer
