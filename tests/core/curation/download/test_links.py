"""A list of links becomes files and a manifest; what fails is told, and a second run fetches what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opensora_core.config import DownloadConfig
from opensora_core.curation import download
from opensora_core.curation.download import DataDone, DataPlan, DataRequest, ItemFailed, examine_data
from opensora_core.curation.download.item import safe_path
from opensora_core.curation.sources import find_sources
from opensora_core.data import read_manifest
from opensora_core.errors import ConfigError, InputError, OsoraError, ResourceError, UsageError
from tests.core.curation.download.conftest import mp4, table
from tests.core.net.loopback import file, redirect, running

VIDEOS = Path(__file__).parents[5] / "shared" / "videos"


@pytest.fixture
def shelf(server, tmp_path):
    for number in range(4):
        server.pages[f"/{number}.mp4"] = file(mp4(number), etag=f'"{number}"')
    (tmp_path / "urls.txt").write_text("# mine\n" + "".join(f"{server.url}/{n}.mp4\n" for n in range(4)))
    return server


def test_a_list_becomes_files_and_a_manifest_that_training_reads(shelf, get, tmp_path):
    done = get(tmp_path / "urls.txt")[-1]
    assert (done.num_new, done.num_failed, done.num_rows) == (4, 0, 4)
    assert done.num_bytes == sum(len(mp4(n)) for n in range(4))
    manifest = read_manifest(tmp_path / "out")
    assert {clip.path.read_bytes() for clip in manifest} == {mp4(n) for n in range(4)}
    assert all(clip.sha256 and clip.source.startswith(shelf.url) for clip in manifest)
    assert table(tmp_path / "out", "rejects.jsonl") == []


def test_a_second_run_asks_for_nothing(shelf, get, tmp_path):
    get(tmp_path / "urls.txt")
    before = (tmp_path / "out" / "manifest.jsonl").read_bytes()
    shelf.requests.clear()
    done = get(tmp_path / "urls.txt")[-1]
    assert (done.num_new, done.num_before) == (0, 4)
    assert shelf.requests == []
    assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == before


def test_only_what_is_missing_is_fetched(shelf, get, tmp_path):
    page = shelf.pages.pop("/2.mp4")
    events = get(tmp_path / "urls.txt")
    assert [event.reason for event in events if isinstance(event, ItemFailed)] == ["answered 404 Not Found"]
    assert table(tmp_path / "out", "rejects.jsonl")[0]["source"] == f"{shelf.url}/2.mp4"
    shelf.pages["/2.mp4"] = page
    next((tmp_path / "out" / "files").glob("0-*")).unlink()
    shelf.requests.clear()
    assert get(tmp_path / "urls.txt")[-1].num_new == 2
    assert {path for _, path, _ in shelf.requests} == {"/0.mp4", "/2.mp4"}
    assert len(table(tmp_path / "out")) == 4
    assert table(tmp_path / "out", "rejects.jsonl") == []


def test_captions_and_times_come_from_the_columns(shelf, get, tmp_path):
    rows = ["url,caption,start,end", f'{shelf.url}/0.mp4,"a, ""b""",,', f"{shelf.url}/1.mp4,NA,0:01,2.5"]
    (tmp_path / "list.csv").write_text("\n".join([*rows, f"{shelf.url}/1.mp4,c,3,", ""]))
    get(tmp_path / "list.csv")
    clips = {clip.caption: clip for clip in read_manifest(tmp_path / "out")}
    assert set(clips) == {'a, "b"', "NA", "c"}
    assert (clips["NA"].start_seconds, clips["NA"].end_seconds) == (1, 2.5)
    assert clips["NA"].path == clips["c"].path
    assert shelf.count("/1.mp4") == 1


def test_columns_of_other_names_are_mapped(shelf, get, tmp_path):
    (tmp_path / "l.jsonl").write_text(
        json.dumps({"where": f"{shelf.url}/0.mp4", "t0": 48, "t1": 96, "r": 24, "w": "x"})
    )
    get(tmp_path / "l.jsonl", settings={"columns": "link=where start=t0 end=t1 fps=r caption=w"})
    row = table(tmp_path / "out")[0]
    assert (row["start_seconds"], row["end_seconds"], row["caption"]) == (2, 4, "x")
    with pytest.raises(ConfigError, match="no 'lnk'"):
        get(tmp_path / "l.jsonl", settings={"columns": "lnk=where"})


def test_the_same_content_is_kept_once(shelf, get, tmp_path):
    shelf.pages["/copy.mp4"] = file(mp4(0))
    with (tmp_path / "urls.txt").open("a") as lines:
        lines.write(f"{shelf.url}/copy.mp4\n{shelf.url}/3.mp4\n")
    done = get(tmp_path / "urls.txt")[-1]
    assert (done.num_new, done.num_duplicates, done.num_rows) == (4, 1, 4)
    assert len(list((tmp_path / "out" / "files").iterdir())) == 4
    assert "the same content as files/" in table(tmp_path / "out", "rejects.jsonl")[0]["reason"]
    assert get(tmp_path / "urls.txt")[-1].num_before == 5


def test_rows_that_cannot_be_used_are_rejected_with_their_number(shelf, get, tmp_path):
    rows = [
        {"link": f"{shelf.url}/0.mp4"},
        {"link": "file:///etc/passwd"},
        {"x": 1},
        {"link": "http://a/b", "end": "soon"},
    ]
    rows += [{"link": f"{shelf.url}/1.mp4", "start": 5, "end": 3}, {"link": "https://www.youtube.com/@channel"}]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = get(tmp_path / "l.jsonl")[-1]
    assert (done.num_new, done.num_failed) == (1, 5)
    assert {row["source"] for row in table(tmp_path / "out", "rejects.jsonl")} == {
        f"l.jsonl, row {n}" for n in range(2, 7)
    }


def test_private_addresses_of_a_list_get_no_hit(shelf, get, tmp_path):
    with pytest.raises(OsoraError, match="no public network"):
        get(tmp_path / "urls.txt", settings={"allow_private": False})
    assert shelf.requests == []


def test_a_redirect_leads_to_no_private_address(shelf, get, tmp_path):
    with running() as inside:
        shelf.pages["/0.mp4"] = redirect(f"{inside.url}/x.mp4")
        with pytest.raises(OsoraError):
            get(tmp_path / "urls.txt", settings={"allow_private": False})
        assert inside.requests == []


@pytest.mark.parametrize(
    ("body", "kind"),
    [(b"<html>", "text/html"), (b"{}", "application/json"), (b"just words", ""), (b"<!doctype html>", "video/mp4")],
)
def test_what_is_no_video_is_not_kept(body, kind, server, get, tmp_path):
    server.pages["/a"] = lambda handler: handler.reply(200, body, {"Content-Type": kind})
    (tmp_path / "l.txt").write_text(f"{server.url}/a")
    with pytest.raises(OsoraError, match="not a single file"):
        get(tmp_path / "l.txt")
    assert list((tmp_path / "out").glob("files/*")) == []


def test_no_secret_reaches_a_table(server, get, tmp_path):
    server.pages["/a.mp4"] = file(mp4(1))
    links = [f"{server.url}/{name}?token=s3cret&n=1".replace("//", "//me:hunter2@") for name in ("a.mp4", "b.mp4")]
    (tmp_path / "l.txt").write_text("\n".join(links))
    events = get(tmp_path / "l.txt")
    written = "".join(path.read_text("utf-8", "replace") for path in (tmp_path / "out").rglob("*") if path.is_file())
    for secret in ("s3cret", "hunter2"):
        assert secret not in written + repr(events)


def test_a_file_that_was_placed_before_a_kill_is_not_fetched_again(shelf, get, tmp_path):
    get(tmp_path / "urls.txt")
    journal = tmp_path / "out" / ".download" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2]) + lines[2][:40])  # killed after a file had its place, while it was told
    shelf.requests.clear()
    assert get(tmp_path / "urls.txt")[-1].num_rows == 4
    assert shelf.requests == []
    assert len(list((tmp_path / "out" / "files").iterdir())) == 4


def test_a_full_disk_ends_the_run_and_keeps_what_is_there(shelf, get, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text(f"{shelf.url}/0.mp4")
    get(tmp_path / "one.txt")
    monkeypatch.setattr("opensora_core.files.free_bytes", lambda path: 100)
    with pytest.raises(ResourceError, match="no space left"):
        get(tmp_path / "urls.txt")
    assert len(table(tmp_path / "out")) == 1
    assert not list((tmp_path / "out").rglob("*.part"))


def test_a_dry_run_asks_nobody_and_writes_nothing(shelf, tmp_path):
    request = DataRequest(str(tmp_path / "urls.txt"), tmp_path / "out", limit=3)
    plan = list(examine_data(DownloadConfig(), request))[-1]
    assert isinstance(plan, DataPlan)
    assert (plan.total, plan.done) == (3, 0)
    assert shelf.requests == []
    assert not (tmp_path / "out").exists()


def test_requests_that_make_no_sense_are_refused(shelf, get, tmp_path):
    with pytest.raises(UsageError) as caught:
        get("pexel")
    assert "pexels" in caught.value.hint
    with pytest.raises(InputError, match="no list"):
        get(tmp_path / "nowhere.txt")
    (tmp_path / "l.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="no column of links"):
        get(tmp_path / "l.csv")
    assert not list((tmp_path / "out").glob("*.jsonl"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.jsonl").write_text("")
    with pytest.raises(UsageError, match="no download made it"):
        list(download.download_data(DownloadConfig(), DataRequest(str(tmp_path / "urls.txt"), tmp_path / "other")))


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", "C:\\x", "a\0b", "..", "", "a/..\\..\\b"])
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(ValueError, match="leads out"):
        safe_path(name)


def test_names_keep_their_folders_and_lose_what_is_odd():
    assert safe_path("./a b/.hidden/ü%d.mp4") == "a_b/hidden/ü_d.mp4"


def test_names_are_as_long_as_file_systems_take():
    place = safe_path("ü" * 300 + "/" + "視" * 300 + ".mp4")
    assert place.endswith("視.mp4")
    assert max(len(part.encode()) for part in place.split("/")) <= 150
    with pytest.raises(ValueError, match="folders"):
        safe_path("a/" * 500 + "b.mp4")


def test_one_content_has_a_row_for_each_range_and_no_row_twice(server, get, tmp_path):
    for name in ("a", "b", "c"):
        server.pages[f"/{name}.mp4"] = file(mp4(1))
    links = [(name, *span) for name in ("a", "b", "c") for span in ((0, 2), (2, 4))]
    rows = [{"link": f"{server.url}/{name}.mp4", "start": start, "end": end} for name, start, end in links]
    rows.append({"link": f"{server.url}/c.mp4"})
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    get(tmp_path / "l.jsonl")
    found = [(row.get("start_seconds"), row.get("end_seconds")) for row in table(tmp_path / "out")]
    assert sorted(found, key=str) == [(0.0, 2.0), (2.0, 4.0), (None, None)]
    assert get(tmp_path / "l.jsonl")[-1].num_before == 7


def test_the_world_is_rendered_with_its_captions(get, tmp_path):
    done = get("world", limit=3, settings={"seed": 7})[-1]
    assert isinstance(done, DataDone)
    assert done.num_new == 3
    clips = read_manifest(tmp_path / "out")
    assert all(clip.caption and clip.num_frames == 16 for clip in clips)
    assert get("world", limit=4, settings={"seed": 7})[-1].num_new == 1


@pytest.mark.skipif(not VIDEOS.is_dir(), reason="no videos")
def test_what_was_downloaded_can_be_split(server, get, tmp_path):
    server.pages["/v.mp4"] = file((VIDEOS / "mb_video.mp4").read_bytes())
    (tmp_path / "l.txt").write_text(f"{server.url}/v.mp4")
    get(tmp_path / "l.txt")
    found = find_sources([tmp_path / "out" / "manifest.jsonl"], output=tmp_path / "clips")
    assert [(source.path.suffix, source.reason) for source in found.sources] == [(".mp4", "")]
