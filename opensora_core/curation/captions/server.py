"""Captions from a server that speaks the OpenAI protocol: vLLM, llama.cpp, OpenAI, and others."""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from opensora_core import net
from opensora_core.config import Config
from opensora_core.curation.captions.prompt import ask, grid, introduced, places
from opensora_core.curation.captions.protocol import Shown, Words
from opensora_core.errors import ConfigError, OsoraError, UsageError
from opensora_core.net.client import Client, Limits
from opensora_core.net.patience import TryAgain

PUBLIC = "https://api.openai.com/v1"
_MAX_TOKENS = 220
_QUALITY = 90  # of the JPEGs that are sent
_LONGEST_WAIT = 120.0  # seconds that a Retry-After is obeyed for
_LOGIN = (401, 403)
_UNKNOWN = (404, 405)


class Server:
    """Asks a server, several requests at a time.

    The key is `OPENAI_API_KEY` of the environment, and goes nowhere but to that server. 408, 429, 5xx, torn and garbled
    answers are tried again, as long as `Retry-After` says.

    Args:
        config: `caption.model` is `openai:NAME`.

    Raises:
        UsageError: no name, no server, or no key for the public one.
        ConfigError, InputError: settings that cannot be.
    """

    batch_size = 1
    is_local = False

    def __init__(self, config: Config) -> None:
        wanted = config.caption
        self.model = wanted.model.partition(":")[2]
        if not self.model:
            raise UsageError("--model openai: names no model", "for example --model openai:gpt-4o-mini")
        given = wanted.base_url or os.environ.get("OPENAI_BASE_URL", "")
        self.base_url = (given or PUBLIC).rstrip("/")
        if not self.base_url.startswith(("http://", "https://")):
            raise UsageError(
                f"--base-url {self.base_url.rpartition('@')[2]} is no address", "for example http://localhost:8000/v1"
            )
        self._key = os.environ.get("OPENAI_API_KEY", "")
        if not given and not self._key:
            raise UsageError(
                f"{PUBLIC} wants a key", "set OPENAI_API_KEY, or name a server of your own with --base-url"
            )
        if config.runtime.offline and not given:
            raise UsageError(f"{PUBLIC} cannot be asked in an offline run", "leave out --offline")
        if wanted.requests < 1 or wanted.requests_per_minute < 0 or wanted.retries < 0:
            raise ConfigError(
                f"caption.requests = {wanted.requests}, caption.requests_per_minute = {wanted.requests_per_minute}, "
                f"caption.retries = {wanted.retries}: the first is 1 or more, the others are 0 or more"
            )
        self.at = places(wanted)
        self.lanes = wanted.requests
        self._prompt = introduced(ask(wanted), len(self.at), grid=wanted.layout == "grid")
        self._config = wanted
        self._turns = _Turns(wanted.requests_per_minute)
        self._stop = threading.Event()
        patience = (wanted.retries + 1) * (wanted.request_seconds + _LONGEST_WAIT)
        self._seconds = patience
        self._client = Client(
            Limits(
                answer_seconds=wanted.request_seconds,
                stall_seconds=wanted.request_seconds,
                max_retries=wanted.retries,
                max_wait_seconds=_LONGEST_WAIT,
                patience_seconds=patience,
            ),
            allow_private=True,  # the user named it
            stop=self._stop,
        )

    @property
    def about(self) -> str:
        """The model and its server."""
        return f"{self.model} at {net.redacted(self.base_url)}"

    @property
    def facts(self) -> dict[str, str]:
        """What captions depend on."""
        wanted = self._config
        return {
            "model": wanted.model,
            "prompt": self._prompt,
            "layout": "grid" if wanted.layout == "grid" else "separate",
            "temperature": f"{wanted.temperature:g}",
            "seed": str(wanted.seed if wanted.temperature else 0),
            "max_tokens": str(wanted.max_tokens or _MAX_TOKENS),
        }

    def fetch(self, is_offline: bool) -> Iterator[tuple[str, int, int]]:
        """There is nothing to fetch."""
        return iter(())

    def load(self, device: str) -> None:
        """There is nothing to load; whether the server is there shows with the first request."""

    def prepare(self, clips: Sequence[Shown]) -> dict[str, Any]:
        """The body of the request for one clip."""
        (shown,) = clips
        frames = [grid(shown.frames)] if self._config.layout == "grid" else shown.frames
        pictures = [{"type": "image_url", "image_url": {"url": _data_url(frame)}} for frame in frames]
        content = [*pictures, {"type": "text", "text": self._prompt}]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._config.max_tokens or _MAX_TOKENS,
            "temperature": self._config.temperature,
            "seed": self._config.seed,
        }

    def describe(self, prepared: dict[str, Any], should_stop: Callable[[], bool]) -> list[Words]:
        """Send one request, and again while that may help.

        Raises:
            OsoraError: the server refuses all of them: a wrong key, an unknown model.
        """
        watch = threading.Thread(target=self._watch, args=(should_stop, done := threading.Event()), daemon=True)
        watch.start()
        content = json.dumps(prepared).encode()
        try:
            return [
                self._client.tries(
                    lambda until: self._attempt(content, until), deadline=time.monotonic() + self._seconds
                )
            ]
        except net.Cancelled:
            return [Words("", "stopped", failed=True)]
        except net.Unavailable as error:
            if error.status in _LOGIN:
                raise OsoraError(f"{error}", "OPENAI_API_KEY holds the key of this server") from error
            if error.status in _UNKNOWN:
                raise OsoraError(
                    f"{error}", f"is there a model {self.model!r} at {net.redacted(self.base_url)}?"
                ) from error
            is_refused = 400 <= error.status < 500 and error.status not in (408, 425, 429)
            return [Words("", str(error), failed=not is_refused)]
        finally:
            done.set()

    def _watch(self, should_stop: Callable[[], bool], done: threading.Event) -> None:
        while not done.wait(0.1):
            if should_stop():
                self._stop.set()
                return

    def _attempt(self, content: bytes, until: float) -> Words:
        url = f"{self.base_url}/chat/completions"
        if not self._turns.take(self._stop):
            raise net.Cancelled
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        deadline = min(until, time.monotonic() + self._config.request_seconds)
        secrets = [self._key] if self._key else []
        _, raw = self._client.read(
            url, method="POST", headers=headers, body=content, deadline=deadline, secrets=secrets
        )
        return _words_in(raw, net.redacted(url))


class _Turns:
    """So many requests in a minute, evenly spread, of all lanes together."""

    def __init__(self, per_minute: int) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._lock = threading.Lock()
        self._next = 0.0

    def take(self, stop: threading.Event) -> bool:
        """Wait for a turn; False if the work was stopped."""
        if not self._gap:
            return True
        with self._lock:
            now = time.monotonic()
            wait = max(self._next - now, 0.0)
            self._next = now + wait + self._gap
        return not stop.wait(wait)


def _words_in(raw: bytes, url: str) -> Words:
    """The caption in an answer.

    Raises:
        TryAgain: it is none: what a proxy puts in the way, or half of one.
    """
    try:
        answer = json.loads(raw)
        message = answer["choices"][0]["message"]
        text = message.get("content")
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(part.get("text", "") for part in text)
        usage = answer.get("usage") or {}
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, ArithmeticError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise TryAgain(f"{url} sent something that is no answer") from error
    if not isinstance(text, str) or not text.strip():
        refusal = " ".join(str(message.get("refusal") or "").split())[:200]
        return Words("", f"the model refuses: {refusal}" if refusal else "the model said nothing", False, *counts)
    return Words(text.strip(), "", False, *counts)


def _data_url(frame: Any) -> str:
    content = io.BytesIO()
    Image.fromarray(frame).save(content, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
