"""The one HTTP client: requests whose every hop is checked, tried again where that can help, and never for long."""

from __future__ import annotations

import base64
import http.client
import json
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urljoin

from opensora_core.net.address import Refused, Target, Unavailable, redacted
from opensora_core.net.answer import NETWORK_ERRORS, Answer, said, told
from opensora_core.net.patience import Patience, Throttle, TryAgain, counted
from opensora_core.net.wire import Cancelled, Clock, connect

T = TypeVar("T")

_REDIRECTS = (301, 302, 303, 307, 308)
_FIRST_WAIT = 0.2
_LONGEST_WAIT = 5.0
_OWN = {"User-Agent": "osora", "Accept-Encoding": "identity", "Connection": "close"}
_CREDENTIALS = ("authorization", "cookie", "proxy-authorization", "x-api-key", "api-key")


@dataclass(frozen=True)
class Limits:
    """What a server may do before it is given up.

    Attributes:
        connect_seconds: to connect.
        answer_seconds: from the request to the end of the header.
        stall_seconds: between two bytes.
        min_bytes_per_second: of a body, over `window_seconds`.
        window_seconds: see there.
        total_seconds: of a whole download, all retries included; 0 is no limit.
        max_bytes: of a body; 0 is no limit.
        max_retries: after the first try.
        max_redirects: of one try.
        max_wait_seconds: that a `Retry-After` is obeyed for.
        patience_seconds: of trouble without anything gained, after which nothing more is tried.
    """

    connect_seconds: float = 10.0
    answer_seconds: float = 20.0
    stall_seconds: float = 8.0
    min_bytes_per_second: float = 1000.0
    window_seconds: float = 10.0
    total_seconds: float = 0.0
    max_bytes: int = 0
    max_retries: int = 5
    max_redirects: int = 10
    max_wait_seconds: float = 20.0
    patience_seconds: float = 45.0


class Client:
    """Asks servers. It holds no connection, so threads may share it.

    Args:
        limits: what a server may do.
        allow_private: whether addresses of this machine and of local networks may be gone to.
        trusted: addresses whose servers may be private: those that the user named himself.
        throttle: the bandwidth of all transfers together.
        stop: set to make everything that waits end with `Cancelled`.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        allow_private: bool = False,
        trusted: Iterable[str] = (),
        throttle: Throttle | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.allow_private = allow_private
        self.trusted = frozenset(Target.parse(url).origin for url in trusted)
        self.throttle = throttle or Throttle(0)
        self.stop = stop or threading.Event()

    def open(
        self,
        url: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        deadline: float = float("inf"),
    ) -> Answer:
        """Ask once, and follow redirects, each of which is checked as the first address was.

        Args:
            url: http or https; a login in it is sent as such.
            method: of the request; a redirect may make it GET, as browsers do.
            headers: credentials among them stay with the server that they are for.
            body: what is sent.
            deadline: by `time.monotonic`, of everything up to the end of the body.

        Returns:
            The answer, with whatever status.

        Raises:
            Refused: an address or redirect that is not gone to.
            TryAgain: nobody is there, or breaks off.
            Cancelled: the work is no longer wanted.
        """
        first = Target.parse(url)
        seen: set[str] = set()
        sent = dict(headers or {})
        for _ in range(self.limits.max_redirects + 1):
            if url in seen:
                raise Refused(f"{redacted(url)} redirects in a circle")
            seen.add(url)
            target = Target.parse(url)
            if first.scheme == "https" and target.scheme == "http":
                raise Refused(f"https://{first.netloc} redirects to {redacted(url)}, which is not encrypted")
            if target.origin != first.origin:
                sent = {name: value for name, value in sent.items() if name.lower() not in _CREDENTIALS}
            answer = self._ask(target, url, method, sent, body, deadline)
            place = answer.headers.get("Location")
            if answer.status not in _REDIRECTS or not place:
                return answer
            answer.close()
            if method != "HEAD" and (answer.status == 303 or (answer.status in (301, 302) and method == "POST")):
                method, body = "GET", None
            url = urljoin(url, place)
        raise Refused(f"{redacted(url)} is one redirect too many: {self.limits.max_redirects} are followed")

    def _ask(  # noqa: PLR0917
        self, target: Target, url: str, method: str, headers: Mapping[str, str], body: bytes | None, deadline: float
    ) -> Answer:
        limits = self.limits
        clock = Clock(
            min(deadline, time.monotonic() + limits.connect_seconds + limits.answer_seconds),
            limits.answer_seconds,
            stop=self.stop,
        )
        login = {}
        if target.login and "authorization" not in {name.lower() for name in headers}:
            login = {"Authorization": f"Basic {base64.b64encode(target.login.encode()).decode()}"}
        wire = None
        try:
            wire, to_proxy = connect(
                target,
                clock,
                allow_private=self.allow_private or target.origin in self.trusted,
                connect_seconds=limits.connect_seconds,
            )
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.sock = wire
            # conn.close(), which http.client calls as soon as it has read the header, must not close what is read on
            connection.close = lambda: None  # type: ignore[method-assign]
            path = target.path if to_proxy is None else f"{target.scheme}://{target.netloc}{target.path}"
            own = {"Host": target.netloc, **_OWN, **login, **(to_proxy or {})}
            connection.request(method, path, body, {**own, **headers})
            response = connection.getresponse()
        except (Unavailable, Cancelled):
            if wire is not None:
                wire.close()
            raise
        except (*NETWORK_ERRORS, ValueError) as error:
            if wire is not None:
                wire.close()
            raise TryAgain(f"{redacted(url)} cannot be reached: {told(error)}") from error
        except BaseException:
            if wire is not None:
                wire.close()
            raise
        clock.deadline, clock.stall_seconds = deadline, limits.stall_seconds
        clock.min_bytes_per_second, clock.window_seconds = limits.min_bytes_per_second, limits.window_seconds
        return Answer(url, response.status, response.headers, response, wire)

    def reach(self, url: str, deadline: float) -> None:
        """Check that a server answers at all, with whatever status.

        Raises:
            Unavailable: it does not, by this time of `time.monotonic`.
        """
        try:
            target = Target.parse(url)
            self._ask(target, url, "HEAD", {}, None, deadline).close()
        except TryAgain as error:
            if not isinstance(error.__cause__, ssl.SSLError):  # somebody is there; who follows may know it better
                raise Unavailable(str(error)) from error

    def tries(
        self, attempt: Callable[[float], T], *, deadline: float = float("inf"), max_retries: int | None = None
    ) -> T:
        """Call `attempt` until it returns; each time with the deadline that it has.

        Raises:
            Unavailable: what the attempt raised as such, or the last failure of too many or too long ones.
            Cancelled: the work is no longer wanted.
        """
        most = self.limits.max_retries if max_retries is None else max_retries
        patience = Patience(self.limits.patience_seconds, deadline)
        for number in range(most + 1):
            try:
                return attempt(patience.until())
            except TryAgain as error:
                self.wait_or_give_up(error, number, most, patience)
        raise AssertionError("the last failure was raised")

    def wait_or_give_up(self, error: TryAgain, number: int, most: int, patience: Patience) -> None:
        """After failure `number` (from 0): wait as long as is right.

        Raises:
            Unavailable: it was the last one.
            Cancelled: the work is no longer wanted.
        """
        wait = min(_FIRST_WAIT * 2**number, _LONGEST_WAIT) * random.uniform(0.5, 1.0)
        if error.after is not None:
            wait = min(error.after, self.limits.max_wait_seconds) + random.uniform(0.0, 0.1)
        if number >= most:
            raise Unavailable(counted(str(error), number + 1), error.status) from error
        if time.monotonic() + wait >= patience.until():
            asked = f", and asks for {error.after:.0f} s of patience" if error.after else ""
            raise Unavailable(f"{error} (given up after {number + 1} tries{asked})", error.status) from error
        if self.stop.wait(wait):
            raise Cancelled

    def read(
        self,
        url: str,
        *,
        method: str,
        headers: Mapping[str, str],
        body: bytes | None,
        deadline: float,
        good: tuple[int, ...] = (200,),
        secrets: Iterable[str] = (),
    ) -> tuple[Answer, bytes]:
        """Ask an API once, and read what it says; of an error, its own words as well.

        Args:
            url, method, headers, body, deadline: as `open`.
            good: statuses that are no error.
            secrets: words beside those of the credentials that an error must not repeat.

        Returns:
            The answer, which is closed, and its body.

        Raises:
            Unavailable, Refused, TryAgain, Cancelled: as `open` and `Answer.check`.
        """
        with self.open(url, method=method, headers=headers, body=body, deadline=deadline) as answer:
            raw = answer.read_all()
            try:
                answer.check(good=good)
            except (TryAgain, Unavailable) as error:
                if words := said(raw, [*secrets, *_secrets_in(headers)]):
                    error.args = (f"{error}: {words}",)
                raise
            return answer, raw

    def json(
        self,
        url: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        seconds: float = 60.0,
        max_retries: int | None = None,
    ) -> tuple[Any, Mapping[str, str]]:
        """Ask for JSON.

        Args:
            url: of an API.
            method: GET or POST.
            headers: credentials among them.
            body: sent as JSON.
            seconds: of wall time for everything, retries and waiting included.
            max_retries: other than the limit says.

        Returns:
            The value and the headers of the answer.

        Raises:
            Unavailable: it cannot be had. The text names the reason and holds no secret.
            Cancelled: the work is no longer wanted.
        """
        content = None if body is None else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}

        def attempt(deadline: float) -> tuple[Any, Mapping[str, str]]:
            sent = {"Accept": "application/json", **kind, **(headers or {})}
            answer, raw = self.read(url, method=method, headers=sent, body=content, deadline=deadline, good=(200, 201))
            if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise Unavailable(f"{redacted(url)} sent something compressed, which was not asked for")
            try:
                return json.loads(raw), dict(answer.headers.items())
            except (ValueError, RecursionError):
                # what a proxy puts in the way, or half of an answer; both pass
                raise TryAgain(f"{redacted(url)} sent something that is not JSON", status=answer.status) from None

        return self.tries(attempt, deadline=time.monotonic() + seconds, max_retries=max_retries)


def _secrets_in(headers: Mapping[str, str]) -> list[str]:
    credentials = (value for name, value in headers.items() if name.lower() in _CREDENTIALS)
    return [word for value in credentials for word in value.split() if len(word) > 5]
