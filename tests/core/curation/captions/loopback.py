"""A server on this machine that speaks the OpenAI protocol, and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TEXT = "A red ball rolls over the grass."


@dataclass
class Loopback:
    """`faults` are what the next requests meet, first come first served; `seen` is what was asked, and when."""

    url: str = ""
    faults: list[str] = field(default_factory=list)
    text: str = TEXT
    always: str = ""
    hang_seconds: float = 5.0
    delay_seconds: float = 0.0
    seen: list[tuple[float, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    most_at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _now: int = 0


@contextmanager
def serving() -> Iterator[Loopback]:
    """Serve until the block ends."""
    state = Loopback()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state._lock:
                state.seen.append((time.monotonic(), body, dict(self.headers.items())))
                fault = state.always or (state.faults.pop(0) if state.faults else "")
                state._now += 1
                state.most_at_once = max(state.most_at_once, state._now)
            try:
                time.sleep(state.delay_seconds)
                self.answer(fault)
            finally:
                with state._lock:
                    state._now -= 1

        def answer(self, fault: str) -> None:
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            good = json.dumps({"choices": [{"message": {"content": state.text}}], "usage": usage}).encode()
            kind, _, detail = fault.partition(" ")
            if kind.isdecimal():
                error = json.dumps({"error": {"message": f"no {self.headers.get('Authorization')}"}}).encode()
                self.reply(int(kind), error, {"Retry-After": detail} if detail else {})
            elif kind == "hang":
                time.sleep(state.hang_seconds)
                self.close_connection = True
            elif kind == "html":
                self.reply(200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
            elif kind == "half":
                self.send_response(200)
                self.send_header("Content-Length", str(len(good)))
                self.end_headers()
                self.wfile.write(good[: len(good) // 2])
                self.close_connection = True
            elif kind == "endless":
                self.reply(200, good.replace(b": 100", b": Infinity"), {})
            elif kind == "odd":
                self.reply(200, b'{"choices": []}', {})
            else:
                self.reply(200, good, {})

        def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
