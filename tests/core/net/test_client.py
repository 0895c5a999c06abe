"""Addresses are checked where the connection is made, JSON is asked for with patience, and secrets stay inside."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from opensora_core import net
from opensora_core.config import DownloadConfig
from opensora_core.errors import ConfigError
from opensora_core.net import client as client_module
from opensora_core.net.address import Target
from opensora_core.net.patience import retry_after
from tests.core.net.loopback import Handler, redirect, running


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_WAIT", 0.01)


# where to go ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "127.8.8.8",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
        ),
        *("::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "224.0.0.1"),
        *("64:ff9b::7f00:1", "255.255.255.255", "ff02::1"),
        *("64:ff9b:1::7f00:1", "::127.0.0.1", "::ffff:0:127.0.0.1", "fec0::1"),
    ],
)
def test_private_addresses_are_known_in_every_spelling(address):
    assert net.is_private(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses_are_public(address):
    assert not net.is_private(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "[::ffff:127.0.0.1]"])
def test_this_machine_is_not_gone_to_unless_allowed(host, server):
    server.pages["/"] = lambda handler: handler.reply(200, b"{}")
    url = f"http://{host}:{server.server_address[1]}/"
    with pytest.raises(net.Refused):
        net.Client().json(url)
    assert server.requests == []
    assert net.Client(allow_private=True).json(url)[0] == {}
    assert net.Client(trusted=[url]).json(url)[0] == {}


def test_a_redirect_to_a_private_address_is_not_followed(server):
    with running() as inside:
        server.pages["/"] = redirect(f"{inside.url}/secret")
        with pytest.raises(net.Refused, match="no public network"):
            net.Client(trusted=[server.url]).json(server.url + "/")
        assert len(server.requests) == 1
        assert inside.requests == []


def test_a_name_cannot_mean_another_machine_after_it_was_checked(server, monkeypatch):
    answers = ["93.184.216.34", "127.0.0.1", "127.0.0.1", "127.0.0.1"]
    asked = []

    def lookup(host, port, *_, **__):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers[len(asked) - 1], port))]

    dialled = []

    def dial(address, timeout=None):
        dialled.append(address)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket, "create_connection", dial)
    with pytest.raises(net.Unavailable):
        net.Client().json("http://rebinding.example/", max_retries=1)
    assert dialled == [("93.184.216.34", 80)]  # the one that was checked; the second answer is refused


def test_one_private_address_among_public_ones_is_refused(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(net.Refused, match=r"10\.0\.0\.1"):
        net.Client().json("http://mixed.example/")


@pytest.mark.parametrize("url", ["", "file:///etc/passwd", "http://", "http://[", "http://a:b:c/", "gopher://a/", "a"])
def test_other_addresses_make_no_sense(url):
    with pytest.raises(net.Refused):
        net.Client(allow_private=True).json(url)


def test_lines_cannot_be_smuggled_into_a_request(server):
    with pytest.raises(net.Unavailable):
        net.Client(allow_private=True).json(f"{server.url}/a\r\nX-Evil: 1\r\n\r\n", max_retries=0)
    assert all("X-Evil" not in headers for _, _, headers in server.requests)


# what is shown --------------------------------------------------------------------------------------------------------


def test_addresses_are_shown_without_secrets():
    url = "https://me:pw@host.example:8443/a/b?X-Amz-Signature=s1&api_key=s2&q=cats&token=s3&sig=s4#s5"
    shown = net.redacted(url)
    assert shown.startswith("https://host.example:8443/a/b?")
    assert "q=cats" in shown
    for secret in ("me", "pw", "s1", "s2", "s3", "s4", "s5"):
        assert secret not in shown.replace("host.example", "")
    assert net.redacted("http://h/a?b=1;token=s1;c=%20x") == "http://h/a?b=1;token=***;c=%20x"
    assert "pw" not in net.redacted("me:pw@host/a")


# JSON -----------------------------------------------------------------------------------------------------------------


def test_json_is_sent_and_answered(server):
    def echo(handler: Handler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.reply(200, json.dumps({"got": json.loads(body), "who": handler.headers["Authorization"]}).encode())

    server.pages["/v1"] = echo
    answer = net.post_json(f"{server.url}/v1", {"a": ["ü"]}, headers={"Authorization": "Bearer k"}, seconds=5)
    assert answer == {"got": {"a": ["ü"]}, "who": "Bearer k"}


def _good_after(count: int, status: int, body: bytes, headers: dict[str, str] | None = None):
    def page(handler: Handler) -> None:
        if len(handler.server.requests) <= count:
            handler.reply(status, body, headers)
        else:
            handler.reply(200, b'{"ok": 1}')

    return page


@pytest.mark.parametrize(
    "page",
    [
        _good_after(2, 429, b"", {"Retry-After": "0.1"}),
        _good_after(5, 503, b"busy"),
        _good_after(1, 200, b"<html>"),
        _good_after(1, 200, b'{"half": '),
    ],
)
def test_what_passes_is_waited_for(page, server):
    server.pages["/"] = page
    assert net.post_json(server.url, {}, headers={}, seconds=10) == {"ok": 1}


@pytest.mark.parametrize(
    ("page", "reason", "count"),
    [
        (_good_after(99, 500, b""), "answered 500", 6),
        (_good_after(99, 400, b'{"error": {"message": "no model"}}'), "no model", 1),
        (_good_after(99, 401, b'{"error": {"message": "bad key sk-12345678"}}'), r"bad key \*\*\*", 1),
        (_good_after(99, 200, b"[1]"), "no JSON object", 1),
        (_good_after(99, 200, b"<html>"), "not JSON", 6),
    ],
)
def test_what_does_not_pass_is_said(page, reason, count, server):
    server.pages["/"] = page
    with pytest.raises(net.Unavailable, match=reason) as caught:
        net.post_json(server.url, {}, headers={"Authorization": "Bearer sk-12345678"}, seconds=10)
    assert "sk-12345678" not in str(caught.value)
    assert len(server.requests) == count


def test_a_server_that_hangs_costs_the_time_that_it_may(server):
    server.pages["/"] = lambda handler: handler.server.stopped.wait(10)
    start = time.monotonic()
    with pytest.raises(net.Unavailable):
        net.post_json(server.url, {}, headers={}, seconds=0.5)
    assert time.monotonic() - start < 1.5


def test_a_long_retry_after_does_not_outlast_the_time(server):
    server.pages["/"] = lambda handler: handler.reply(429, b"", {"Retry-After": "3600"})
    with pytest.raises(net.Unavailable, match="3600 s"):
        net.post_json(server.url, {}, headers={}, seconds=1)
    assert len(server.requests) == 1


def test_waiting_is_told_in_seconds_or_as_a_date():
    assert retry_after({"Retry-After": "2.5"}) == 2.5
    assert retry_after({"Retry-After": "-3"}) == 0
    assert retry_after({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}) > 1e9
    assert retry_after({"Retry-After": "soon"}) is None
    assert retry_after({}) is None


def test_settings_that_make_no_sense_are_refused():
    import threading

    with pytest.raises(ConfigError, match=r"download\.workers"):
        net.client_of(DownloadConfig(workers=0), stop=threading.Event())


def test_a_retry_after_that_is_no_number_is_none():
    assert retry_after({"Retry-After": "nan"}) is None
    with pytest.raises(ConfigError, match="nan"):
        net.client_of(DownloadConfig(max_bytes_per_second=float("nan")), stop=threading.Event())


def test_a_name_in_other_letters_is_asked_for_as_the_network_spells_it():
    assert Target.parse("http://b\u00fccher.example/").netloc == "xn--bcher-kva.example"
    with pytest.raises(net.Refused):
        Target.parse("http://" + "\u00fc" * 80 + ".example/")


def test_a_proxy_gets_its_login_and_a_server_does_not(server, monkeypatch):
    server.pages["http://files.example/a"] = lambda handler: handler.reply(200, b"[]")
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//user:word@"))
    assert net.Client(allow_private=True).json("http://files.example/a")[0] == []
    assert server.requests[0][2]["Proxy-Authorization"] == "Basic dXNlcjp3b3Jk"
    monkeypatch.delenv("http_proxy")
    server.pages["/a"] = lambda handler: handler.reply(200, b"[]")
    net.Client(allow_private=True).json(f"{server.url}/a")
    assert "Proxy-Authorization" not in server.requests[1][2]


def test_what_a_server_says_cannot_write_on_the_terminal(server):
    def page(handler: Handler) -> None:
        handler.send_response(404, "\x1b[2Jgone")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    server.pages["/"] = page
    with pytest.raises(net.Unavailable, match="gone") as caught:
        net.Client(allow_private=True).json(server.url + "/")
    assert str(caught.value).isprintable()
