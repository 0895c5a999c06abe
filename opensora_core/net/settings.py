"""From the settings of downloads to a client."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from opensora_core.config import DownloadConfig
from opensora_core.errors import ConfigError
from opensora_core.net.client import Client, Limits
from opensora_core.net.patience import Throttle


def client_of(config: DownloadConfig, *, stop: threading.Event, trusted: Iterable[str] = ()) -> Client:
    """The client that settings ask for.

    Args:
        config: the settings.
        stop: set to make everything that waits end.
        trusted: addresses that the user named himself.

    Raises:
        ConfigError: a setting that makes no sense.
    """
    for name, least in (
        ("workers", 1),
        ("max_bytes_per_second", 0),
        ("min_bytes_per_second", 0),
        ("window_seconds", 0.1),
        ("connect_seconds", 0.1),
        ("answer_seconds", 0.1),
        ("stall_seconds", 0.1),
        ("patience_seconds", 0),
        ("max_wait_seconds", 0),
        ("max_retries", 0),
        ("file_seconds", 0),
        ("file_bytes", 1),
    ):
        if not (value := getattr(config, name)) >= least:  # which NaN is not either
            raise ConfigError(
                f"download.{name} = {value:g} is less than {least:g}", f"--set download.{name}={max(least, 1):g}"
            )
    limits = Limits(
        connect_seconds=config.connect_seconds,
        answer_seconds=config.answer_seconds,
        stall_seconds=config.stall_seconds,
        min_bytes_per_second=config.min_bytes_per_second,
        window_seconds=config.window_seconds,
        total_seconds=config.file_seconds,
        max_bytes=config.file_bytes,
        max_retries=config.max_retries,
        max_wait_seconds=config.max_wait_seconds,
        patience_seconds=config.patience_seconds,
    )
    return Client(
        limits,
        allow_private=config.allow_private,
        trusted=trusted,
        throttle=Throttle(config.max_bytes_per_second),
        stop=stop,
    )
