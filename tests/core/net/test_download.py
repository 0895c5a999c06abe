"""Whatever a server does, there is the right file or none, after at most five retries and within the time there is."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import threading
import time
from pathlib import Path

import pytest

from opensora_core import net
from opensora_core.errors import ResourceError
from opensora_core.net import client as client_module
from tests.core.net.loopback import Handler, Loopback, file, redirect, running

CONTENT = os.urandom(300_000)
BOMB = gzip.compress(bytes(10**7))

FAST = net.Limits(
    connect_seconds=1,
    answer_seconds=0.4,
    stall_seconds=0.4,
    min_bytes_per_second=1000,
    window_seconds=0.4,
    max_wait_seconds=0.2,
    patience_seconds=1.2,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_WAIT", 0.01)


def get(server: Loopback, path: str, target: Path, wanted: net.Wanted | None = None, **options: object) -> net.Received:
    limits = options.pop("limits", FAST)
    return net.download(net.Client(limits, allow_private=True, **options), server.url + path, target, wanted=wanted)


# what goes right ------------------------------------------------------------------------------------------------------


def test_a_file_comes_with_its_sum_and_nothing_else_is_left(server, tmp_path):
    server.pages["/a"] = file(CONTENT)
    received = get(server, "/a", tmp_path / "sub" / "a")
    assert received.path.read_bytes() == CONTENT
    assert received.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a"]


def test_a_broken_line_is_taken_up_where_it_broke(server, tmp_path):
    server.pages["/a"] = file(CONTENT, cuts=[100_000, 50_000])
    assert get(server, "/a", tmp_path / "a").path.read_bytes() == CONTENT
    assert [headers.get("Range") for _, _, headers in server.requests] == [None, "bytes=100000-", "bytes=150000-"]


def test_what_an_earlier_run_left_is_continued(server, tmp_path):
    server.pages["/a"] = file(CONTENT, cuts=[100_000])
    with pytest.raises(net.Unavailable, match="broke off"):
        get(server, "/a", tmp_path / "a", limits=net.Limits(max_retries=0))
    assert not (tmp_path / "a").exists()
    get(server, "/a", tmp_path / "a")
    assert server.requests[-1][2]["Range"] == "bytes=100000-"
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_part_that_was_complete_is_not_fetched_again(server, tmp_path):
    (tmp_path / "a.part").write_bytes(CONTENT)
    (tmp_path / "a.part.version").write_text(json.dumps({"etag": '"1"', "total": len(CONTENT)}))
    get(server, "/a", tmp_path / "a")
    assert server.requests == []
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_redirects_are_followed_and_credentials_stay_behind(server, tmp_path):
    with running() as other:
        other.pages["/b"] = file(CONTENT)
        server.pages["/a"] = redirect("/c")
        server.pages["/c"] = redirect(f"{other.url}/b")
        client = net.Client(FAST, allow_private=True)
        net.download(client, f"{server.url}/a", tmp_path / "a", headers={"Authorization": "Bearer secret"})
        assert [headers.get("Authorization") for _, _, headers in server.requests] == ["Bearer secret"] * 2
        assert "Authorization" not in other.requests[0][2]


def test_a_login_in_the_address_is_sent_and_never_shown(server, tmp_path):
    url = server.url.replace("//", "//me:hunter2@") + "/a?key=abc&x=1"
    with pytest.raises(net.Unavailable) as caught:
        net.download(net.Client(FAST, allow_private=True), url, tmp_path / "a")
    assert server.requests[0][2]["Authorization"].startswith("Basic ")
    assert "hunter2" not in str(caught.value)
    assert "abc" not in str(caught.value)
    assert "x=1" in str(caught.value)


def test_the_bandwidth_is_shared(server, tmp_path):
    server.pages["/a"] = file(CONTENT)
    throttle = net.Throttle(1e6)
    start = time.monotonic()
    threads = [
        threading.Thread(target=lambda n=n: get(server, "/a", tmp_path / str(n), throttle=throttle)) for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start > 0.5  # 0.6 MB at 1 MB/s
    assert (tmp_path / "1").read_bytes() == CONTENT


# what goes wrong ------------------------------------------------------------------------------------------------------


def _ignores_ranges(handler: Handler) -> None:
    handler.reply(200, CONTENT, {"ETag": '"1"'}, 100_000 if "Range" not in handler.headers else None)


def _wrong_part(handler: Handler) -> None:
    if "Range" in handler.headers:
        handler.reply(206, CONTENT[7:], {"ETag": '"1"', "Content-Range": f"bytes 7-299999/{len(CONTENT)}"})
    else:
        cut = None if len(handler.server.requests) > 2 else 100_000
        handler.reply(200, CONTENT, {"ETag": '"1"'}, cut)


def _another_version(handler: Handler) -> None:
    """Continues, against the rules, with a file that has changed."""
    if "Range" in handler.headers:
        at = int(handler.headers["Range"][6:-1])
        new = CONTENT[::-1]
        handler.reply(206, new[at:], {"ETag": '"2"', "Content-Range": f"bytes {at}-{len(new) - 1}/{len(new)}"})
    else:
        handler.reply(200, CONTENT, {"ETag": '"1"'}, None if len(handler.server.requests) > 2 else 100_000)


def _endless_numbers(handler: Handler) -> None:
    if "Range" in handler.headers:
        handler.reply(206, CONTENT[100_000:], {"ETag": '"1"', "Content-Range": f"bytes 100000-{'9' * 5000}/*"})
    else:
        handler.reply(200, CONTENT, {"ETag": '"1"'}, None if len(handler.server.requests) > 2 else 100_000)


def _unsatisfiable(handler: Handler) -> None:
    if "Range" in handler.headers:
        handler.reply(416, b"", {"Content-Range": f"bytes */{len(CONTENT)}"})
    else:
        handler.reply(200, CONTENT, {"ETag": '"1"'}, None if len(handler.server.requests) > 2 else 100_000)


def _busy_twice(handler: Handler) -> None:
    if len(handler.server.requests) < 3:
        handler.reply(503 if len(handler.server.requests) == 1 else 429, b"", {"Retry-After": "0"})
    else:
        handler.reply(200, CONTENT)


def _busy_until_a_date(handler: Handler) -> None:
    if len(handler.server.requests) < 2:
        handler.reply(503, b"", {"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"})
    else:
        handler.reply(200, CONTENT)


def _long(handler: Handler) -> None:
    handler.reply(200, CONTENT + b"more", {"Content-Length": str(len(CONTENT))})


def _chunked(handler: Handler) -> None:
    handler.reply(200, b"", {"Transfer-Encoding": "chunked", "Content-Length": ""})
    for at in range(0, len(CONTENT), 50_000):
        chunk = CONTENT[at : at + 50_000]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
    handler.wfile.write(b"0\r\n\r\n")


@pytest.mark.parametrize(
    "page",
    [
        _ignores_ranges,
        _wrong_part,
        _another_version,
        _endless_numbers,
        _unsatisfiable,
        _busy_twice,
        _busy_until_a_date,
        _long,
        _chunked,
    ],
)
def test_a_server_that_misbehaves_for_a_while_still_gives_the_right_file(page, server, tmp_path):
    server.pages["/a"] = page
    assert get(server, "/a", tmp_path / "a").path.read_bytes() == CONTENT
    assert len(server.requests) <= 6


def _short(handler: Handler) -> None:
    handler.reply(200, CONTENT, {"ETag": f'"{len(handler.server.requests)}"'}, 100_000)


def _torn_chunks(handler: Handler) -> None:
    handler.reply(200, b"", {"Transfer-Encoding": "chunked", "Content-Length": ""})
    handler.wfile.write(b"%x\r\n%s" % (50_000, CONTENT[:20_000]))


def _no_length(handler: Handler) -> None:
    handler.reply(200, CONTENT[:1000], {"Content-Length": ""})


def _trickle(handler: Handler) -> None:
    handler.reply(200, b"", {"Content-Length": "1000000"})
    while not handler.server.stopped.wait(0.05):
        handler.wfile.write(b"x")
        handler.wfile.flush()


def _trickling_header(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while not handler.server.stopped.wait(0.05):
        handler.wfile.write(b"x")
        handler.wfile.flush()


def _hang(handler: Handler) -> None:
    handler.server.stopped.wait(10)


def _hang_in_the_middle(handler: Handler) -> None:
    handler.reply(200, CONTENT, {"ETag": f'"{len(handler.server.requests)}"'}, 1000)
    handler.server.stopped.wait(10)


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (lambda handler: handler.reply(500, b""), "answered 500"),
        (lambda handler: handler.reply(403, b""), "answered 403"),
        (_short, "broke off 6 times"),
        (_torn_chunks, "broke off 6 times"),
        (_no_length, "how long"),
        (_trickle, "bytes/s came|nothing came"),
        (_trickling_header, "timed out"),
        (_hang, "nothing came|timed out"),
        (_hang_in_the_middle, "nothing came|bytes/s"),
        (lambda handler: handler.reply(200, b"<html>", {"Content-Type": "text/html"}), "web page"),
        (lambda handler: handler.reply(200, b" <!DOCTYPE html>", {"Content-Type": "video/mp4"}), "web page"),
        (lambda handler: handler.reply(200, BOMB, {"Content-Encoding": "gzip"}), "packed"),
        (lambda handler: handler.reply(200, b""), "empty file"),
        (redirect("/a"), "circle"),
        (lambda handler: handler.reply(302, b"", {"Location": f"/a?{len(handler.server.requests)}"}), "too many"),
        (redirect("file:///etc/passwd"), "no http"),
        (redirect("ftp://127.0.0.1/x"), "no http"),
    ],
)
def test_a_server_that_never_behaves_is_given_up_and_leaves_no_file(page, reason, server, tmp_path):
    server.pages["/a"] = page
    start = time.monotonic()
    with pytest.raises(net.Unavailable, match=reason):
        get(server, "/a", tmp_path / "a")
    assert time.monotonic() - start < 6
    assert not (tmp_path / "a").exists()
    assert len(server.requests) <= 11


def test_at_most_five_retries(server, tmp_path):
    server.pages["/a"] = lambda handler: handler.reply(500, b"")
    with pytest.raises(net.Unavailable):
        get(server, "/a", tmp_path / "a")
    assert len(server.requests) == 6


def test_a_wrong_sum_or_size_is_no_file(server, tmp_path):
    server.pages["/a"] = file(CONTENT)
    for wanted, reason in (
        (net.Wanted(sha256="0" * 64), "SHA-256"),
        (net.Wanted(size=5), "not 5"),
        (net.Wanted(max_bytes=1000), "allowed"),
    ):
        with pytest.raises(net.Unavailable, match=reason):
            get(server, "/a", tmp_path / "a", wanted)
    server.pages["/b"] = _chunked  # whose length is not known before
    with pytest.raises(net.Unavailable, match="allowed"):
        get(server, "/b", tmp_path / "b", net.Wanted(max_bytes=60_000))
    assert list(tmp_path.glob("[ab]")) == []


def test_text_is_no_video(server, tmp_path):
    server.pages["/a"] = lambda handler: handler.reply(200, b"{}", {"Content-Type": "application/json"})
    with pytest.raises(net.Unavailable, match="no video"):
        get(server, "/a", tmp_path / "a", net.Wanted(is_media=True))
    assert get(server, "/a", tmp_path / "a").size == 2


def test_a_full_disk_is_one_error(server, tmp_path, monkeypatch):
    server.pages["/a"] = file(CONTENT)
    monkeypatch.setattr("opensora_core.files.free_bytes", lambda path: 1000)
    with pytest.raises(ResourceError, match="no space left"):
        get(server, "/a", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_stop_is_heard_within_a_moment(server, tmp_path):
    server.pages["/a"] = _hang
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    start = time.monotonic()
    with pytest.raises(net.Cancelled):
        get(server, "/a", tmp_path / "a", limits=net.Limits(), stop=stop)
    assert time.monotonic() - start < 1.5
