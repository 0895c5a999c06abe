"""The job: a manifest in, the same rows with captions out, in a file that any number of runs may complete."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_core.config import CaptionConfig, Config
from opensora_core.curation.captions.clean import clean
from opensora_core.curation.captions.events import (
    CaptionDone,
    CaptionLoading,
    CaptionPlan,
    CaptionProgress,
    CaptionRejected,
    Event,
)
from opensora_core.curation.captions.frames import Unseen, see
from opensora_core.curation.captions.lanes import Described, Lanes, Ready
from opensora_core.curation.captions.lanes_ray import RayLane, devices_of
from opensora_core.curation.captions.language import check_language, language_of
from opensora_core.curation.captions.ledger import Ledger
from opensora_core.curation.captions.page import write_preview
from opensora_core.curation.captions.protocol import Captioner, Shown, Words
from opensora_core.curation.cluster import connected
from opensora_core.errors import ConfigError, DeviceError, InputError, OsoraError, UsageError
from opensora_core.notice import Notice
from opensora_core.runs import only_writer

if TYPE_CHECKING:
    from opensora_core.data.manifest import Manifest

DEFAULT_NAME = "captions.jsonl"
_TELL_SECONDS = 0.5
_LONGEST_STREAK = 8  # failures of the captioner, one after the other, after which it is not the clips' fault
_LONGEST_CAPTION = 20_000  # characters; more is a captioner that does not find an end
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # a NUL makes a manifest unreadable
_POSITIVE = ("gpus", "request_seconds", "stall_seconds", "clip_seconds", "clip_bytes")
_NOT_NEGATIVE = ("side", "batch_size", "temperature", "max_tokens", "price_in", "price_out", "workers")


@dataclass(frozen=True)
class CaptionRequest:
    """What is to be captioned, and how the output is dealt with.

    Attributes:
        source: whatever `read_manifest` reads.
        output: a `.jsonl`; None is `captions.jsonl` beside the manifest.
        redo: describe all clips anew, also those that have captions.
        retry_failed: describe those that got none before.
        preview: clips to show on a page beside the output; 0 for no page.
    """

    source: Path
    output: Path | None = None
    redo: bool = False
    retry_failed: bool = False
    preview: int = 0


def caption(config: Config, request: CaptionRequest) -> Iterator[Event]:
    """Describe the clips of a manifest.

    What an earlier run finished is not done again. A run may be stopped in whatever way; the next one completes the
    file, with nothing lost or said twice.

    Args:
        config: the settings, of which `caption` and `runtime` count.
        request: the manifest, the output, and what else is wanted.

    Yields:
        Notices, how far it is, every clip that gets no caption, and at the end what there is.

    Raises:
        ConfigError, UsageError: settings that contradict each other, or those of the output.
        InputError: the manifest cannot be read, or not a single caption came of it.
        WeightsError, DeviceError: the captioner cannot be had.
        ResourceError: the disk is full; what is finished is kept.
        OsoraError: the captioner failed on clip after clip; what is finished is kept.
    """
    began = time.monotonic()
    captioner, manifest, ledger = _prepare(config, request)
    with only_writer(ledger.state):
        yield from map(Notice, manifest.notes)
        yield CaptionLoading(captioner.about)
        # a model says for itself how it wants to be asked, so it is to be here first
        yield from (CaptionLoading(*told) for told in captioner.fetch(config.runtime.offline))
        _read(config, request, captioner, ledger)
        run = _Run(config, captioner, ledger)
        yield from run.go()
        ledger.finish()
        page = None
        if request.preview:
            page = ledger.output.with_suffix(".html")
            write_preview(page, ledger, config.caption, request.preview, captioner.at)
        if run.described and not ledger.finished and not ledger.kept:
            reason = next(iter(ledger.reasons()), "")
            raise InputError(
                f"not a single caption came of it: {reason}",
                f"all reasons are in {ledger.rejects}; --retry-failed tries them again",
            )
        yield run.done(time.monotonic() - began, page)


def examine(config: Config, request: CaptionRequest) -> Iterator[Event]:
    """Tell what `caption` would do. Nothing is written, fetched or loaded.

    Raises:
        ConfigError, UsageError, InputError: as `caption`.
    """
    captioner, manifest, ledger = _prepare(config, request)
    _read(config, request, captioner, ledger)
    todo = len(ledger.todo())
    tokens = todo * int(captioner.facts.get("max_tokens", "0"))
    yield CaptionPlan(
        source=manifest.format,
        output=ledger.output,
        captioner=captioner.about,
        prompt=captioner.facts.get("prompt", ""),
        clips=len(manifest),
        todo=todo,
        finished=len(ledger.finished),
        kept=len(ledger.kept),
        passed=len(ledger.passed),
        rejected=len(ledger.rejected),
        tokens=tokens,
        cost=tokens * config.caption.price_out / 1e6,
        notices=manifest.notes,
    )


def _prepare(config: Config, request: CaptionRequest) -> tuple[Captioner, Manifest, Ledger]:
    from opensora_core.curation.captions import build_captioner  # the table knows the job, not the other way round
    from opensora_core.data.manifest import read_manifest  # torch comes with it, which who decodes does without

    check_language(config.caption.language)
    _check_numbers(config.caption)
    captioner = build_captioner(config)
    if config.caption.gpus > 1 and not captioner.is_local:
        raise ConfigError(f"caption.gpus = {config.caption.gpus} says nothing to {captioner.about}", "leave it out")
    _check_engine(config.caption, captioner)
    manifest = read_manifest(request.source)
    ledger = Ledger(request.output or manifest.folder / DEFAULT_NAME, manifest)
    own = request.source / "manifest.jsonl" if request.source.is_dir() else request.source
    for path in (ledger.output, ledger.rejects):
        if path.resolve() == own.resolve():
            raise UsageError(f"{path} is what is read, and would be written", "name another --output")
    return captioner, manifest, ledger


def _check_numbers(config: CaptionConfig) -> None:
    for names, what in ((_POSITIVE, "above 0"), (_NOT_NEGATIVE, "0 or more")):
        for name in names:
            value = getattr(config, name)
            if value < 0 or (value == 0 and names is _POSITIVE):
                raise ConfigError(f"caption.{name} = {value} is not {what}")


def _check_engine(config: CaptionConfig, captioner: Captioner) -> None:
    if config.ray_address and config.engine != "ray":
        raise ConfigError(
            f"caption.ray_address = {config.ray_address} says nothing to engine {config.engine}", "--engine ray"
        )
    if config.engine == "ray" and not (captioner.is_local or captioner.at or config.camera):
        raise ConfigError(
            f"caption.engine = ray says nothing to {captioner.about}, which looks at nothing", "leave it out"
        )


def _read(config: Config, request: CaptionRequest, captioner: Captioner, ledger: Ledger) -> None:
    wanted = config.caption
    facts = {
        **captioner.facts,
        "at": " ".join(f"{share:g}" for share in captioner.at),
        "side": str(wanted.side if captioner.at else 0),
        "clean": str(wanted.clean),
        "camera": str(wanted.camera),
        "language": wanted.language,
    }
    ledger.read(facts, redo=request.redo, retry_failed=request.retry_failed)


def devices_for(config: Config) -> list[str]:
    """The devices of as many processes as are asked for.

    Raises:
        DeviceError: there are not so many.
    """
    from opensora_core.components import devices, resolve_device  # torch comes with it, which who decodes needs not

    first = str(resolve_device(config.runtime.device))
    count = config.caption.gpus
    if count == 1:
        return [first]
    if not first.startswith("cuda"):
        return [first] * count
    if config.runtime.device.startswith("cuda:"):
        raise ConfigError(f"--gpus {count} are not the one device {config.runtime.device}", "leave one of them out")
    found = [name for name in devices() if name.startswith("cuda")]
    if len(found) < count:
        raise DeviceError(f"there are {len(found)} GPUs here, not {count}", f"--gpus {len(found)}")
    return found[:count]


class _Run:
    """Works through the clips that have no caption."""

    def __init__(self, config: Config, captioner: Captioner, ledger: Ledger) -> None:
        self.config, self.captioner, self.ledger = config, captioner, ledger
        self.finished_before = len(ledger.finished)
        self.described = self.captioned = self.tokens_in = self.tokens_out = 0
        self.busy = self.elapsed = 0.0
        self.num_lanes = 1
        self._held: list[tuple[Shown, Words]] = []  # failures since the last caption
        self._last = ("", "")

    def go(self) -> Iterator[Event]:
        """Describe, and commit whatever is ready."""
        todo = self.ledger.todo()
        if not todo:
            self.ledger.begin()
            return
        clips = ((index, self.ledger.manifest[index]) for index in todo)
        source = see(self.config.caption, self.captioner.at, clips)
        with ExitStack() as stack:
            if self.config.caption.engine == "ray":
                lanes = self._on_ray(stack.enter_context(connected(self.config.caption.ray_address)), source)
            else:
                devices = devices_for(self.config) if self.captioner.is_local else ["cpu"]
                lanes = Lanes(self.captioner, devices, source)
            self.num_lanes = lanes.num_lanes
            stack.enter_context(closing(lanes))
            lanes.start()
            self.ledger.begin()
            yield from self._follow(lanes, len(todo))

    def _on_ray(self, library: Any, source: Iterator[Shown | Unseen | None]) -> Lanes:
        if not self.captioner.is_local:
            return Lanes(self.captioner, ["cpu"], source)
        devices = devices_of(library, self.config)
        return Lanes(self.captioner, devices, source, lambda device: RayLane(library, self.captioner, device))

    def _follow(self, lanes: Lanes, total: int) -> Iterator[Event]:
        ready_at, told = 0.0, 0.0
        while self.described < total:
            captions: dict[int, str] = {}
            rejects: list[tuple[Shown | Unseen, str, str]] = []
            for word in lanes.listen(_TELL_SECONDS):
                if isinstance(word, Ready):
                    ready_at = ready_at or time.monotonic()
                elif isinstance(word, Unseen):
                    rejects.append((word, "rejected", word.reason))
                elif isinstance(word, Described):
                    self.busy += word.seconds
                    self._hear(word, captions, rejects)
            is_last = self.described + len(rejects) + len(captions) + len(self._held) == total
            is_hopeless = is_last and bool(self._held) and not captions and not self.ledger.finished
            if is_last and not is_hopeless:
                rejects += self._release()
            self.ledger.append(captions, [(item.index, status, reason) for item, status, reason in rejects])
            self.captioned += len(captions)
            self.described += len(captions) + len(rejects)
            now = time.monotonic()
            self.elapsed = now - ready_at if ready_at else 0.0
            for item, status, reason in rejects:
                yield CaptionRejected(item.clip.id, status, reason)
            if is_hopeless or len(self._held) >= max(_LONGEST_STREAK, 2 * lanes.num_lanes):
                raise OsoraError(
                    f"{self.captioner.about} failed on {_clips(len(self._held))} one after the other: "
                    f"{self._held[-1][1].reason}",
                    f"the same command goes on from here, with {self.captioned} captions of this run kept",
                )
            if self.described and (now - told >= _TELL_SECONDS or self.described == total):
                told = now
                yield self._progress(total)

    def _hear(self, word: Described, captions: dict[int, str], rejects: list[tuple[Shown | Unseen, str, str]]) -> None:
        for shown, words in zip(word.clips, word.words, strict=True):
            self.tokens_in += words.tokens_in
            self.tokens_out += words.tokens_out
            if words.failed:
                self._held.append((shown, words))
                continue
            text, reason = finished(words, shown.camera, clean_up=self.config.caption.clean)
            wanted = self.config.caption.language
            found = language_of(words.text) if text and wanted else ""  # without what is said of the camera, in English
            if found and found != wanted:
                reason = f"the caption is in the language '{found}', not '{wanted}': {text[:80]}"
                text = ""
            if text:
                captions[shown.index] = text
                self._last = (shown.clip.id, text)
                rejects += self._release()
            else:
                rejects.append((shown, "rejected", reason))

    def _release(self) -> list[tuple[Shown | Unseen, str, str]]:
        """Failures that were not those of a captioner that is broken for all clips."""
        released: list[tuple[Shown | Unseen, str, str]] = [(s, "failed", words.reason) for s, words in self._held]
        self._held.clear()
        return released

    def _speed(self) -> float:
        return self.described / self.elapsed if self.elapsed else 0.0

    def _progress(self, total: int) -> CaptionProgress:
        speed = self._speed()
        return CaptionProgress(
            done=self.described,
            total=total,
            clips_per_second=speed,
            tokens_per_second=self.tokens_out / self.elapsed if self.elapsed else 0.0,
            seconds_left=(total - self.described) / speed if speed else None,
            clip=self._last[0],
            text=self._last[1],
        )

    def done(self, seconds: float, page: Path | None) -> CaptionDone:
        """What came of it."""
        wanted, ledger = self.config.caption, self.ledger
        in_lanes = self.num_lanes * self.elapsed
        return CaptionDone(
            output=ledger.output,
            captioned=self.captioned,
            finished_before=self.finished_before,
            kept=len(ledger.kept),
            passed=len(ledger.passed),
            rejected=ledger.reasons(),
            rejects=ledger.rejects if ledger.rejected else None,
            seconds=seconds,
            clips_per_second=self._speed(),
            tokens_per_second=self.tokens_out / self.elapsed if self.elapsed else 0.0,
            tokens_in=self.tokens_in,
            tokens_out=self.tokens_out,
            cost=(self.tokens_in * wanted.price_in + self.tokens_out * wanted.price_out) / 1e6,
            outside=max(1 - self.busy / in_lanes, 0.0) if in_lanes else 0.0,
            preview=page,
        )


def _clips(count: int) -> str:
    return f"{count} clip{'s' if count > 1 else ''}"


def finished(words: Words, camera: str, *, clean_up: bool) -> tuple[str, str]:
    """A caption as it is written, or "" and why there is none."""
    said = _CONTROL.sub("", words.text).strip()
    if not said:
        return "", words.reason or "the caption is empty"
    if len(said) > _LONGEST_CAPTION:
        return "", f"the caption has {len(said)} characters, more than {_LONGEST_CAPTION}: {said[:80]!r}"
    text = clean(said) if clean_up else said
    if not text:
        return "", f"nothing is left of the caption when it is cleaned: {said[:80]!r}"
    if camera and "camera" not in text.lower() and language_of(text) in ("", "en"):
        text = f"{text}{'' if text[-1] in '.!?…' else '.'} {camera}"
    return text, ""
