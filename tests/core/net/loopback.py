"""A server on this machine that does as it is told, well or badly."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Page = Callable[["Handler"], None]


class Loopback(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Page] = {}
        self.requests: list[tuple[str, str, Mapping[str, str]]] = []
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        pass

    def count(self, path: str) -> int:
        return sum(asked.partition("?")[0] == path for _, asked, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Loopback

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path, dict(self.headers.items())))
        page = self.server.pages.get(self.path.partition("?")[0])
        with suppress(OSError):
            if page is None:
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            else:
                page(self)
        self.close_connection = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def reply(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Connection": "close", **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])

    def log_message(self, *_: object) -> None:
        pass


def file(
    content: bytes, *, etag: str = '"1"', cuts: list[int] | None = None, headers: Mapping[str, str] | None = None
) -> Page:
    """A file as a good server gives it; `cuts` are bytes after which the next answers break off."""
    left = cuts if cuts is not None else []

    def page(handler: Handler) -> None:
        told = {"ETag": etag, "Content-Type": "video/mp4", **(headers or {})}
        cut = left.pop(0) if left and handler.command == "GET" else None
        start = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if start and handler.headers.get("If-Range") == etag:
            at = int(start[1])
            told["Content-Range"] = f"bytes {at}-{len(content) - 1}/{len(content)}"
            handler.reply(206, content[at:], told, cut)
        else:
            handler.reply(200, content, told, cut)

    return page


def redirect(place: str) -> Page:
    return lambda handler: handler.reply(302, b"", {"Location": place})


@contextmanager
def running() -> Iterator[Loopback]:
    server = Loopback()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
