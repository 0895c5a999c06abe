"""The Hugging Face hub: what its cache holds, what a repository offers, and fetching it without its long patience."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from opensora_core import net
from opensora_core.assets import fetch
from opensora_core.assets.table import Kind
from opensora_core.errors import UsageError
from opensora_core.files import refusal

_ETAG_TIMEOUT = 5.0  # seconds
_DESCRIPTIONS = (".json", ".txt", ".model")  # of models and tokenizers; always small
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_PART_FOLDERS: dict[Kind, tuple[str, ...]] = {
    "model": ("transformer",),
    "vae": ("vae",),
    "text": ("text", "text_encoder"),
}


@dataclass(frozen=True)
class Place:
    """A repository, or a file or folder in it."""

    repo: str
    inner: str
    revision: str

    @classmethod
    def parse(cls, word: str) -> Place:
        """Understand `hf:owner/repo[/file or folder][@revision]`.

        Raises:
            UsageError: the word is not of this form.
        """
        path, _, revision = word.removeprefix("hf:").partition("@")
        parts = path.strip("/").split("/")
        if len(parts) < 2 or not all(re.fullmatch(r"[\w.\-]+", part) and part.strip(".") for part in parts):
            raise UsageError(f"'{word}' is not hf:owner/repo", "for example hf:hpcai-tech/Open-Sora/file.pth@main")
        return cls("/".join(parts[:2]), "/".join(parts[2:]), revision or "main")


def endpoint() -> str:
    """The hub's address, `HF_ENDPOINT` or the public one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def cache_folder() -> Path:
    """Where the hub's client keeps what it downloads (`HF_HUB_CACHE`, `HF_HOME`)."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def address(repo: str, revision: str, files: tuple[str, ...]) -> str:
    """Where a person finds the files with a browser."""
    if len(files) == 1:
        return f"{endpoint()}/{repo}/resolve/{revision}/{files[0].partition('|')[0]}"
    return f"{endpoint()}/{repo}/tree/{revision}"


def _snapshot(repo: str, revision: str, cache: Path | None = None) -> Path:
    folder = (cache or cache_folder()) / f"models--{repo.replace('/', '--')}"
    with suppress(OSError):  # a revision without such a file is a commit, or unknown here
        revision = (folder / "refs" / revision).read_text().strip()
    return folder / "snapshots" / revision


def cached_files(repo: str, revision: str, files: tuple[str, ...], cache: Path | None = None) -> Path | None:
    """The file, or for several of them their folder, if the cache holds them all."""
    snapshot = _snapshot(repo, revision, cache)
    if not all(any((snapshot / name).is_file() for name in file.split("|")) for file in files):
        return None
    return common(snapshot, [_present(snapshot, file) for file in files])


def begun_bytes(repo: str) -> int:
    """Bytes of a repository that are in the cache, whole or in part."""
    blobs = cache_folder() / f"models--{repo.replace('/', '--')}" / "blobs"
    return sum(path.stat().st_size for path in blobs.glob("*") if path.is_file())


def cached_place(place: Place, kind: Kind, cache: Path | None = None) -> Path | None:
    """The file or folder of the cache that a download of the place would give, if it is there."""
    snapshot = _snapshot(place.repo, place.revision, cache)
    if not snapshot.is_dir():
        return None
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    try:
        chosen = choose(names, place, kind)
    except UsageError:
        return None  # what was fetched for another part; the hub knows what else there is
    return common(snapshot, chosen) if any(_is_weights(name) for name in chosen) else None


def download(
    repo: str,
    revision: str,
    files: tuple[str, ...],
    on_progress: fetch.Progress | None,
    client: net.Client | None = None,
) -> Path:
    """Fetch files of a repository into the hub's cache.

    The hub's library says what a file is and keeps the cache; the bytes come by our own client, which checks their sums
    and gives up a server that trickles.

    Returns:
        The file, or for several of them their folder.

    Raises:
        fetch.Unavailable: the hub cannot be reached, or does not give them.
        ResourceError: no space or no permission.
    """
    fetch.probe(endpoint())
    with translated(repo, revision):
        got = [_download_either(repo, revision, file.split("|"), on_progress, client) for file in files]
    return common(got[0][0], [name for _, name in got])


def download_place(place: Place, kind: Kind, on_progress: fetch.Progress | None) -> Path:
    """Fetch what a part needs of a repository.

    Raises:
        UsageError: the repository holds no such file, or several models and nothing says which.
        fetch.Unavailable, ResourceError: as `download`.
    """
    return download(place.repo, place.revision, tuple(listed(place, kind)), on_progress)


def listed(place: Place, kind: Kind) -> list[str]:
    """Ask the hub for the files that a part needs of a repository.

    Raises:
        UsageError, fetch.Unavailable: as `download_place`.
    """
    fetch.probe(endpoint())
    import huggingface_hub

    with translated(place.repo, place.revision):
        names = huggingface_hub.HfApi(endpoint=endpoint()).list_repo_files(place.repo, revision=place.revision)
    for name in (names := choose(names, place, kind)):
        require_inside(name)
    return names


def require_inside(name: str) -> str:
    """A name that a hub told, if it leads nowhere but into the folder that it is put in.

    Raises:
        fetch.Unavailable: it leads elsewhere; a mirror may say anything.
    """
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or not name.isprintable():
        raise fetch.Unavailable(f"{endpoint()} told a name that leads out of its folder: {name!r}")
    return name


def choose(names: Iterable[str], place: Place, kind: Kind) -> list[str]:
    """Pick of all files of a repository those that one part needs.

    A part lies in the folder that was named, or in the one that diffusers' pipelines and our own exports keep it in, or
    at the root. An export of ours is taken as a whole.

    Raises:
        UsageError: no weights there, or several that are not one model.
    """
    names = sorted(names)
    if place.inner in names:
        return [place.inner]
    folder = place.inner
    if not folder:
        if kind == "model" and {"config.json", "model.safetensors", "manifest.json"} <= set(names):
            return names
        folder = next((f for f in _PART_FOLDERS[kind] if f"{f}/config.json" in names), "")
    inside = [name for name in names if str(PurePosixPath(name).parent) == (folder or ".")]
    weights = [name for name in inside if _is_weights(name) and not fnmatch.fnmatch(name, "*.fp16.*")]
    safe = [name for name in weights if name.endswith(".safetensors")]
    weights = safe or weights
    where = f"{place.repo}/{folder}".rstrip("/")
    if not weights:
        raise UsageError(f"{where} holds no weights", "name the file: hf:owner/repo/FILE")
    is_sharded = all(re.search(r"-\d+-of-\d+\.", name) for name in weights)
    if len(weights) > 1 and not is_sharded:
        raise UsageError(
            f"{where} holds several models: {', '.join(weights[:10])}", f"name one: hf:{place.repo}/{weights[0]}"
        )
    if folder == "text_encoder":  # a pipeline keeps the tokenizer in a folder of its own
        inside += [name for name in names if name.startswith("tokenizer/") or name == "model_index.json"]
    return [name for name in inside if name.endswith(_DESCRIPTIONS)] + weights


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", *_PICKLES))


def _present(snapshot: Path, file: str) -> str:
    return next(name for name in file.split("|") if (snapshot / name).is_file())


def common(snapshot: Path, names: list[str]) -> Path:
    """The file itself if there is one, else the deepest folder that holds them all."""
    return snapshot / (
        names[0] if len(names) == 1 else os.path.commonpath([str(PurePosixPath(n).parent) for n in names])
    )


def headers() -> dict[str, str]:
    """What tells the hub who asks; it stays with the hub."""
    import huggingface_hub

    token = huggingface_hub.get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def is_whole(path: Path, etag: str) -> bool | None:
    """Whether a file is the one that the hub's sum, SHA-256 or git's SHA-1, was made of; None for any other sum."""
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        algorithm, head = "sha256", b""
    elif re.fullmatch(r"[0-9a-f]{40}", etag):
        algorithm, head = "sha1", b"blob %d\0" % path.stat().st_size
    else:
        return None
    digest = hashlib.new(algorithm, head, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == etag


def metadata(repo: str, revision: str, name: str) -> tuple[str, str, int]:
    """What the hub says about a file.

    Returns:
        Its commit, its sum as `is_whole` takes it, and its size in bytes, 0 where unknown.

    Raises:
        Whatever the hub's library does; `translated` is for that.
    """
    import huggingface_hub

    found = huggingface_hub.get_hf_file_metadata(
        huggingface_hub.hf_hub_url(repo, name, revision=revision, endpoint=endpoint()),
        timeout=_ETAG_TIMEOUT,
        endpoint=endpoint(),
    )
    commit = found.commit_hash or revision
    if found.commit_hash and "/" in require_inside(commit):
        raise fetch.Unavailable(f"{endpoint()} told a commit that is none: {commit!r}")
    return commit, found.etag or "", found.size or 0


def fetch_file(
    repo: str,
    commit: str,
    name: str,
    target: Path,
    *,
    etag: str,
    size: int,
    client: net.Client | None,
    on_progress: fetch.Progress | None,
) -> net.Received:
    """Fetch one file of a repository, and check it against the hub's sum.

    Raises:
        fetch.Unavailable: the hub does not give it, or sends something else.
        ResourceError: no space or no permission.
    """
    import huggingface_hub

    received = net.download(
        client or net.Client(trusted=(endpoint(),)),
        huggingface_hub.hf_hub_url(repo, name, revision=commit, endpoint=endpoint()),
        target,
        wanted=net.Wanted(sha256=etag if len(etag) == 64 else "", size=size),
        part=target.with_name(f"{target.name}.osora.part"),
        headers=headers(),
        on_progress=on_progress,
    )
    if is_whole(target, etag) is False:
        target.unlink()
        raise fetch.Unavailable(f"{endpoint()} sent a {name} whose sum is not the one it told, {etag}")
    return received


def _place_blob(
    repo: str, revision: str, name: str, client: net.Client | None, on_progress: fetch.Progress | None
) -> None:
    """Put the bytes of a file where the hub's library looks for them before it fetches any."""
    commit, etag, size = metadata(repo, revision, name)
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
        return  # no sum that could be checked: the library knows what it is
    blob = cache_folder() / f"models--{repo.replace('/', '--')}" / "blobs" / etag
    if not blob.exists():
        fetch_file(repo, commit, name, blob, etag=etag, size=size, client=client, on_progress=on_progress)


def _download_either(
    repo: str,
    revision: str,
    names: list[str],
    on_progress: fetch.Progress | None,
    client: net.Client | None = None,
) -> tuple[Path, str]:
    """Fetch the first of the names that the repository has; returns the snapshot's folder and that name."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        try:
            _place_blob(repo, revision, name, client, on_progress)
            path = huggingface_hub.hf_hub_download(
                repo,
                name,
                revision=revision,
                cache_dir=cache_folder(),
                endpoint=endpoint(),
                etag_timeout=_ETAG_TIMEOUT,
                tqdm_class=_bar(on_progress),
            )
            return Path(path.removesuffix(name)), name
        except EntryNotFoundError:
            if name == names[-1]:
                raise
    raise AssertionError("no name to download")


def _bar(on_progress: fetch.Progress | None) -> Any:
    """A progress bar that draws nothing: the core does not print, it tells."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            self.done, self.of = int(options.get("initial") or 0), int(options.get("total") or 0)
            options.pop("name", None)  # the hub's own bars take it
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            if on_progress is not None:
                on_progress(self.done, self.of)

    return Silent


@contextmanager
def translated(repo: str, revision: str) -> Iterator[None]:
    """Turn what the hub's client raises into our own errors."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        reason = f"{repo} asks you to accept its terms at {endpoint()}/{repo} and to log in: hf auth login"
        raise fetch.Unavailable(reason) from error
    except errors.RepositoryNotFoundError as error:
        raise fetch.Unavailable(f"{endpoint()} knows no repository {repo} that you may read") from error
    except errors.RevisionNotFoundError as error:
        raise fetch.Unavailable(f"{repo} has no revision '{revision}'") from error
    except errors.LocalEntryNotFoundError as error:
        raise fetch.Unavailable(f"{endpoint()} stopped answering: {_first_line(error.__cause__ or error)}") from error
    except errors.EntryNotFoundError as error:
        raise fetch.Unavailable(f"{repo} has no such file: {_first_line(error)}") from error
    # HTTPError is the root of whichever HTTP library the hub's client is built on
    except (errors.HTTPError, errors.HFValidationError, *fetch.NETWORK_ERRORS) as error:  # type: ignore[attr-defined]
        raise fetch.Unavailable(f"{endpoint()} refused: {_first_line(error)}") from error
    except OSError as error:
        raise refusal(cache_folder(), error) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
