"""Archives are unpacked safely; Pexels and the hub are spoken to as they ask; YouTube goes by yt-dlp alone."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import sys
import tarfile
import zipfile
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from opensora_core.curation.download import SOURCES, ItemFailed, youtube
from opensora_core.data import read_manifest
from opensora_core.errors import InputError, OsoraError, UsageError
from opensora_core.notice import Notice
from tests.core.curation.download.conftest import mp4, table
from tests.core.net.loopback import Handler, file, running

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(files: dict[str, bytes], mode: str = "w") -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return target.getvalue()


def reasons(events: list[object]) -> str:
    return " ".join(event.reason for event in events if isinstance(event, ItemFailed))


# archives -------------------------------------------------------------------------------------------------------------

UCF = {
    f"UCF-101/{name}/v_{name}_g01_c0{n}.avi": mp4(10 * m + n)
    for m, name in enumerate(["ApplyEyeMakeup", "Yo"])
    for n in (1, 2)
}


def test_an_archive_is_unpacked_with_its_classes_as_captions(get, tmp_path):
    done = get("ucf101", zipped(tmp_path / "u.zip", UCF | {"UCF-101/readme.txt": b"x"}))[-1]
    assert (done.num_new, done.num_failed) == (4, 0)
    clips = read_manifest(tmp_path / "out")
    assert {clip.caption for clip in clips} == {"Apply Eye Makeup", "Yo"}
    assert clips[0].path.is_relative_to(tmp_path / "out" / "files" / "ucf101" / "UCF-101")
    assert {clip.path.read_bytes() for clip in clips} == set(UCF.values())
    assert get("ucf101", tmp_path / "u.zip")[-1].num_before == 4


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars_of_every_kind_are_read(mode, get, tmp_path):
    (tmp_path / "a.tar.any").write_bytes(tarred(UCF, mode))
    assert get("inter4k", tmp_path / "a.tar.any")[-1].num_new == 4


def test_tars_in_a_tar_are_folders(get, tmp_path):
    inner = {
        "n01440764.tar": tarred({"n01440764_1.JPEG": b"\xff\xd8\xff1"}),
        "n01443537.tar": tarred({"a.JPEG": b"\xff\xd8\xff2"}),
    }
    (tmp_path / "train.tar").write_bytes(tarred(inner))
    get("imagenet", tmp_path / "train.tar")
    assert [row["path"] for row in table(tmp_path / "out")] == [
        "files/imagenet/n01440764/n01440764_1.JPEG",
        "files/imagenet/n01443537/a.JPEG",
    ]


def test_a_linked_archive_is_fetched_once_and_removed_when_it_is_unpacked(server, get, tmp_path):
    content = zipped(tmp_path / "u.zip", UCF).read_bytes()
    server.pages["/u.zip"] = file(content, cuts=[500])
    assert get("ucf101", f"{server.url}/u.zip")[-1].num_new == 4
    assert not list((tmp_path / "out" / ".download").rglob("*.zip"))
    server.requests.clear()
    assert any(
        "unpacked before" in event.message
        for event in get("ucf101", f"{server.url}/u.zip")
        if isinstance(event, Notice)
    )
    assert server.requests == []
    next((tmp_path / "out").rglob("*.avi")).unlink()
    assert get("ucf101", f"{server.url}/u.zip")[-1].num_new == 1


def test_members_that_lead_out_are_refused(get, tmp_path):
    bad = zipped(
        tmp_path / "bad.zip", {"../evil.mp4": mp4(1), "/abs.mp4": mp4(2), "a/../../b.mp4": mp4(3), "ok.mp4": mp4(4)}
    )
    with zipfile.ZipFile(bad, "a") as archive:
        link = zipfile.ZipInfo("link.mp4")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    events = get("inter4k", bad)
    assert (events[-1].num_new, events[-1].num_failed) == (1, 4)
    assert "leads out" in reasons(events)
    assert "a link or device" in reasons(events)
    assert {path.name for path in tmp_path.rglob("*.mp4")} == {"ok.mp4"}


def test_links_and_devices_of_a_tar_are_refused(get, tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, kind in (
            ("s.mp4", tarfile.SYMTYPE),
            ("h.mp4", tarfile.LNKTYPE),
            ("d.mp4", tarfile.CHRTYPE),
            ("f.mp4", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("ok.mp4")
        info.size = len(mp4(1))
        archive.addfile(info, io.BytesIO(mp4(1)))
    events = get("inter4k", tmp_path / "t.tar")
    assert (events[-1].num_new, events[-1].num_failed) == (1, 4)


def test_bombs_are_refused(get, tmp_path, monkeypatch):
    monkeypatch.setattr("opensora_core.curation.download.unpack._HARMLESS", 10_000)
    zipped(tmp_path / "b.zip", {"bomb.mp4": bytes(5_000_000)})
    with pytest.raises(OsoraError, match="which is no video"):
        get("inter4k", tmp_path / "b.zip")
    (tmp_path / "b.tgz").write_bytes(tarred({"bomb.mp4": bytes(4_000_000)}, "w:gz"))
    with pytest.raises(OsoraError, match="which is no video"):
        get("inter4k", tmp_path / "b.tgz")
    (tmp_path / "c.tgz").write_bytes(tarred({"bomb.bin": bytes(4_000_000), "a.mp4": mp4(1)}, "w:gz"))
    with pytest.raises(OsoraError, match="which is no video"):
        get("inter4k", tmp_path / "c.tgz")
    events = get("inter4k", zipped(tmp_path / "n.zip", UCF), settings={"archive_files": 2})
    assert (events[-1].num_new, "unpacks to more" in reasons(events)) == (2, True)
    assert not list((tmp_path / "out").rglob("bomb*"))


def test_a_torn_archive_keeps_what_is_whole(get, tmp_path):
    (tmp_path / "t.tar").write_bytes(tarred(UCF)[:12_000])
    events = get("inter4k", tmp_path / "t.tar")
    assert events[-1].num_new == 2
    assert "torn" in reasons(events) or "cannot be read" in reasons(events) or "bytes" in reasons(events)
    (tmp_path / "x.zip").write_bytes(b"no archive")
    assert "cannot be read" in reasons(get("inter4k", tmp_path / "x.zip"))


def test_members_that_are_called_alike_are_all_kept(get, tmp_path):
    zipped(tmp_path / "a.zip", {"v/1.mp4": mp4(1), "v/a b.mp4": mp4(2), "v/a_b.mp4": mp4(3), "v/a%b.mp4": mp4(4)})
    zipped(tmp_path / "b.zip", {"v/1.mp4": mp4(5)})
    assert get("inter4k", tmp_path / "a.zip", tmp_path / "b.zip")[-1].num_new == 5
    rows = table(tmp_path / "out")
    assert {(tmp_path / "out" / row["path"]).read_bytes() for row in rows} == {mp4(n) for n in (1, 2, 3, 4, 5)}
    for row in rows:
        assert row["sha256"] == hashlib.sha256((tmp_path / "out" / row["path"]).read_bytes()).hexdigest()
    assert get("inter4k", tmp_path / "a.zip", tmp_path / "b.zip")[-1].num_before == 5


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_is_taken_once(get, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(9):
            archive.writestr("1.mp4", mp4(number))
    events = get("inter4k", tmp_path / "a.zip")
    assert (events[-1].num_new, "twice" in reasons(events)) == (1, True)
    assert [path.read_bytes() for path in (tmp_path / "out" / "files").rglob("*.mp4")] == [mp4(0)]
    assert not list((tmp_path / "out" / ".download" / "parts").glob("*"))


def test_headers_that_would_fill_the_memory_are_refused(get, tmp_path):
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33
    (tmp_path / "t.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_000))
    with pytest.raises(OsoraError, match="header of 8589934592 bytes"):
        get("inter4k", tmp_path / "t.tar")


def test_a_file_with_holes_is_refused(get, tmp_path):
    info = tarfile.TarInfo("holes.mp4")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:494] = b"%011o" % 2**32  # its size with the holes
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    (tmp_path / "t.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(OsoraError, match="holes"):
        get("inter4k", tmp_path / "t.tar")


def test_a_link_without_a_name_is_an_archive_too(server, get, tmp_path):
    server.pages["/%2e%2e"] = file(zipped(tmp_path / "u.zip", UCF).read_bytes())
    assert get("ucf101", f"{server.url}/%2e%2e")[-1].num_new == 4


def test_a_rar_without_a_library_is_said(get, tmp_path, monkeypatch):
    (tmp_path / "a.rar").write_bytes(b"Rar!\x1a\x07\x00")
    monkeypatch.setitem(sys.modules, "rarfile", None)
    with pytest.raises(UsageError, match="no library"):
        get("ucf101", tmp_path / "a.rar")
    with pytest.raises(UsageError, match="no address"):
        get("inter4k")
    with pytest.raises(InputError, match="no archive"):
        get("inter4k", tmp_path / "nowhere.zip")


# Pexels ---------------------------------------------------------------------------------------------------------------


class Pexels:
    """The part of the protocol that is used: pages of two videos, with a key."""

    def __init__(self, server, count: int = 5) -> None:
        self.server, self.count, self.remaining = server, count, 100
        self.elsewhere = ""
        server.pages["/v1/videos/search"] = self.search
        for number in range(count):
            for height in (360, 1080, 2160):
                server.pages[f"/f/{number}-{height}.mp4"] = file(mp4(number) + bytes([height % 251]))

    def search(self, handler: Handler) -> None:
        if handler.headers.get("Authorization") != "the-key":
            handler.reply(401, b'{"error": "no key"}')
            return
        query = parse_qs(urlsplit(handler.path).query)
        page = int(query["page"][0])
        assert query["query"] == ["sea & sky"]
        self.remaining -= 1
        videos = [self.video(n) for n in range(2 * page - 2, min(2 * page, self.count))]
        told: dict[str, object] = {"page": page, "per_page": 2, "total_results": self.count, "videos": videos}
        if 2 * page < self.count:
            base = self.elsewhere or self.server.url
            told["next_page"] = f"{base}/v1/videos/search?page={page + 1}&per_page=2&query=sea+%26+sky"
        headers = {"X-Ratelimit-Remaining": str(self.remaining), "X-Ratelimit-Reset": "4102444800"}
        handler.reply(200, json.dumps(told).encode(), headers)

    def video(self, number: int) -> dict[str, object]:
        files: list[dict[str, object]] = [
            {
                "id": h,
                "quality": "hd",
                "file_type": "video/mp4",
                "height": h,
                "link": f"{self.server.url}/f/{number}-{h}.mp4",
            }
            for h in (2160, 360, 1080)
        ]
        files += [
            {"id": 1, "quality": None, "height": None, "width": None, "link": f"{self.server.url}/f/x.mp4"},
            {"id": 2, "quality": "hd", "height": 1080, "link": None},
        ]
        return {
            "id": number,
            "url": f"https://www.pexels.com/video/{number}/",
            "user": {"name": f"Maker {number}"},
            "video_files": files,
        }


def search(get, server, **request):
    options = {"query": "sea & sky", "min_height": 720, **request}
    return get("pexels", settings={"pexels_url": server.url}, **options)


def test_pexels_is_searched_page_by_page(server, get, tmp_path, monkeypatch):
    monkeypatch.setenv("PEXELS_API_KEY", "the-key")
    Pexels(server)
    assert search(get, server)[-1].num_new == 5
    assert server.count("/v1/videos/search") == 3
    rows = table(tmp_path / "out")
    assert {row["attribution"] for row in rows} == {f"Video by Maker {n} on Pexels" for n in range(5)}
    assert all("Pexels License" in row["licence"] for row in rows)
    asked = {path for _, path, _ in server.requests if path.startswith("/f/")}
    assert asked == {f"/f/{n}-1080.mp4" for n in range(5)}
    assert all("Authorization" not in headers for _, path, headers in server.requests if path.startswith("/f/"))
    written = "".join(path.read_text("utf-8", "replace") for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert "the-key" not in written


def test_pexels_gives_as_many_as_are_wanted(server, get, tmp_path, monkeypatch):
    monkeypatch.setenv("PEXELS_API_KEY", "the-key")
    Pexels(server)
    assert search(get, server, limit=3)[-1].num_new == 3
    assert search(get, server, limit=4)[-1].num_new == 1


def test_the_key_goes_nowhere_else(server, get, monkeypatch):
    monkeypatch.setenv("PEXELS_API_KEY", "the-key")
    with running() as other:
        Pexels(server).elsewhere = other.url
        assert search(get, server)[-1].num_new == 5
        assert other.requests == []


def test_pexels_rate_limit_is_kept(server, get, monkeypatch):
    monkeypatch.setenv("PEXELS_API_KEY", "the-key")
    Pexels(server).remaining = 2
    events = search(get, server)
    assert events[-1].num_new == 4
    assert any("2100-01-01 00:00 UTC" in event.message for event in events if isinstance(event, Notice))


def test_pexels_without_a_key_or_a_query_is_said(server, get, monkeypatch):
    Pexels(server)
    monkeypatch.delenv("PEXELS_API_KEY", raising=False)
    with pytest.raises(UsageError, match="PEXELS_API_KEY is not set"):
        search(get, server)
    monkeypatch.setenv("PEXELS_API_KEY", "wrong-key")
    with pytest.raises(UsageError, match="does not know the key"):
        search(get, server)
    with pytest.raises(UsageError, match="needs a search"):
        search(get, server, query="")


# the hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    files = {
        "README.md": b"# cats",
        "train/metadata.jsonl": b'{"file_name": "a.mp4", "text": "a cat"}\n'
        b'{"file_name": "sub/b.mp4", "text": "two cats"}\n',
        "train/a.mp4": mp4(1),
        "train/sub/b.mp4": mp4(2),
        "train/c d.mp4": mp4(3),
    }
    siblings = [
        {"rfilename": n, "size": len(c), "lfs": {"sha256": hashlib.sha256(c).hexdigest()}} for n, c in files.items()
    ]
    told = json.dumps({"sha": COMMIT, "siblings": siblings, "cardData": {"license": "cc-by-4.0"}}).encode()
    server.pages["/api/datasets/o/cats/revision/main"] = lambda handler: handler.reply(200, told)
    for name, content in files.items():
        server.pages[f"/datasets/o/cats/resolve/{COMMIT}/{name.replace(' ', '%20')}"] = file(content)
    return server


def test_a_data_set_of_the_hub_comes_with_its_captions(dataset, get, tmp_path):
    events = get("hf:o/cats", settings={"allow_private": False})
    assert events[-1].num_new == 3
    rows = {Path(row["path"]).name: row for row in table(tmp_path / "out")}
    assert (rows["a.mp4"]["caption"], rows["b.mp4"]["caption"]) == ("a cat", "two cats")
    assert "caption" not in rows["c_d.mp4"]
    assert rows["a.mp4"]["licence"] == "cc-by-4.0"
    assert rows["b.mp4"]["path"] == "files/o--cats/train/sub/b.mp4"
    assert get("hf:o/cats")[-1].num_before == 3


def test_a_file_of_the_hub_with_another_sum_is_not_kept(dataset, get, tmp_path):
    dataset.pages[f"/datasets/o/cats/resolve/{COMMIT}/train/a.mp4"] = file(mp4(9))
    assert "SHA-256" in reasons(get("hf:o/cats"))
    assert len(table(tmp_path / "out")) == 2


def test_a_new_version_of_a_data_set_is_fetched(dataset, get, tmp_path):
    get("hf:o/cats")
    new = COMMIT[::-1]
    told = json.dumps({"sha": new, "siblings": [{"rfilename": "train/a.mp4"}]}).encode()
    dataset.pages["/api/datasets/o/cats/revision/main"] = lambda handler: handler.reply(200, told)
    dataset.pages[f"/datasets/o/cats/resolve/{new}/train/a.mp4"] = file(mp4(9))
    assert get("hf:o/cats")[-1].num_new == 1
    for row in table(tmp_path / "out"):
        assert row["sha256"] == hashlib.sha256((tmp_path / "out" / row["path"]).read_bytes()).hexdigest()


def test_a_mirror_that_tells_a_path_for_a_commit_is_refused(dataset, get, tmp_path):
    told = json.dumps({"sha": "../../../x", "siblings": [{"rfilename": "metadata.jsonl"}]}).encode()
    dataset.pages["/api/datasets/o/cats/revision/main"] = lambda handler: handler.reply(200, told)
    with pytest.raises(OsoraError, match="no commit"):
        get("hf:o/cats")


def test_a_data_set_that_is_not_there_is_said(dataset, get):
    with pytest.raises(OsoraError, match="cannot be had"):
        get("hf:o/dogs")


# YouTube --------------------------------------------------------------------------------------------------------------

ID = "dQw4w9WgXcQ"


@pytest.mark.parametrize(
    "link",
    [
        f"https://www.youtube.com/watch?v={ID}&list=x",
        f"http://youtu.be/{ID}?t=3",
        f"https://m.youtube.com/shorts/{ID}",
        f"https://www.youtube-nocookie.com/embed/{ID}",
    ],
)
def test_links_of_youtube_are_known(link):
    assert youtube.video_of(link) == ID


def test_other_links_are_not_youtubes():
    assert youtube.video_of(f"https://youtube.com.evil.example/watch?v={ID}") is None
    assert youtube.video_of("https://example.com/a.mp4") is None


class Elsewhere:
    """yt-dlp, with an address of this machine where it would ask YouTube."""

    def __init__(self, server, monkeypatch) -> None:
        pytest.importorskip("yt_dlp")
        call = youtube._Video.__call__
        link = f"{server.url}/v.mp4"
        monkeypatch.setattr(
            youtube._Video,
            "__call__",
            lambda own, *words: call(youtube._Video(link, own.video, own.start, own.end), *words),
        )


def metadata(path: Path) -> Path:
    rows = [
        {"video_id": ID, "start": 1, "end": "0:02.5", "caption": "a"},
        {"video_id": ID, "start": 4, "end": 6, "caption": "b"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_videos_of_youtube_come_by_yt_dlp_once_for_all_their_ranges(server, get, tmp_path, monkeypatch):
    server.pages["/v.mp4"] = file(mp4(1))
    Elsewhere(server, monkeypatch)
    monkeypatch.setattr(youtube, "EXTRACTORS", ["generic"])
    request = {"metadata": metadata(tmp_path / "m.jsonl"), "settings": {"youtube_whole": True}}
    assert get("hd-vg-130m", **request)[-1].num_new == 2
    rows = table(tmp_path / "out")
    assert [(row["start_seconds"], row["end_seconds"], row["caption"]) for row in rows] == [(1, 2.5, "a"), (4, 6, "b")]
    assert len({row["path"] for row in rows}) == 1
    assert rows[0]["source"] == f"https://www.youtube.com/watch?v={ID}"
    server.requests.clear()
    assert get("hd-vg-130m", **request)[-1].num_before == 2
    assert server.requests == []


def test_yt_dlp_goes_to_no_other_place(server, get, tmp_path, monkeypatch):
    Elsewhere(server, monkeypatch)
    with pytest.raises(OsoraError, match="not a single file"):
        get("hd-vg-130m", metadata=metadata(tmp_path / "m.jsonl"), settings={"youtube_whole": True})
    assert server.requests == []


def test_without_ffmpeg_whole_videos_are_said_and_fetched(server, get, tmp_path, monkeypatch):
    server.pages["/v.mp4"] = file(mp4(1))
    Elsewhere(server, monkeypatch)
    monkeypatch.setattr(youtube, "EXTRACTORS", ["generic"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    events = get("hd-vg-130m", metadata=metadata(tmp_path / "m.jsonl"))
    assert events[-1].num_rows == 2
    assert any("no ffmpeg" in event.message for event in events if isinstance(event, Notice))


def test_without_yt_dlp_it_is_said(get, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yt_dlp", None)
    with pytest.raises(UsageError, match="not installed"):
        get("hd-vg-130m", metadata=metadata(tmp_path / "m.jsonl"), settings={"youtube_whole": True})
    with pytest.raises(UsageError, match="needs its metadata"):
        get("hd-vg-130m")


def test_every_source_says_what_it_is():
    assert all(source.about for source in SOURCES.values())
