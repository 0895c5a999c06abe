"""One pass over a source that makes clip after clip: who gets which frame or packet, and what makes a file a clip."""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np
from av.container import OutputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from opensora_core.errors import InputError, OsoraError, ResourceError
from opensora_core.files import free_bytes, readable, sha256
from opensora_core.media.decoding import survey
from opensora_core.media.packets import Window
from opensora_core.media.pieces import Cut, Piece
from opensora_core.media.proof import Proof, proved
from opensora_core.media.read import Budget, Limits

Payload: TypeAlias = "VideoFrame | Packet[VideoStream]"
Event: TypeAlias = "tuple[int, int, Payload]"
"""The number of a decoded frame (else -1), the position of a packet (else -1), and the thing."""
Work: TypeAlias = "Generator[None, Payload, Cut]"
"""Takes the frames and packets of one clip as they come, and returns when the clip is on disk and was decoded back."""

_MAX_TICKS = 1_000_000  # per second
_TIMES_OFF = 1e-6  # seconds by which floats may miss


@dataclass(frozen=True)
class Job:
    """A clip that is to be made."""

    piece: Piece
    wants: Callable[[int, int], bool]  # the frame and the position of an event
    begin: Callable[[], Work]


class Patience(Budget):
    """A budget whose `max_seconds` is the longest wait for one frame: encoding takes as long as it takes."""

    def renew(self) -> None:
        """Begin to wait anew."""
        self._end = time.monotonic() + self.limits.max_seconds


def carried_out(jobs: Sequence[Job], events: Iterable[Event]) -> Iterator[tuple[Job, Cut | str]]:
    """Do jobs that do not overlap, in their order, with what a source gives in its.

    Yields:
        Every job with its clip, or with the reason why there is none.

    Raises:
        ResourceError: the disk refuses; nothing torn is left.
    """
    waiting = deque(jobs)
    work: Work | None = None
    lacking = "its frames do not decode as they did before"
    try:
        for frame, position, payload in events:
            while waiting and frame >= waiting[0].piece.end_frame:
                _close(work)
                work = None
                yield waiting.popleft(), lacking
            if not waiting:
                return
            job = waiting[0]
            if not job.wants(frame, position):
                continue
            try:
                if work is None:
                    work = job.begin()
                    next(work)
                work.send(payload)
                continue
            except StopIteration as end:
                outcome: Cut | str = end.value
            except ResourceError:
                raise
            except (OsoraError, av.FFmpegError, ValueError) as error:
                outcome = str(error)
            work = None
            yield waiting.popleft(), outcome
            if not waiting:
                return
        _close(work)
        work = None
        for job in waiting:
            yield job, lacking
    finally:
        _close(work)


def _close(work: Work | None) -> None:
    if work is not None:
        work.close()


def tick(stream: VideoStream, seconds: NDArray[np.float64]) -> Fraction:
    """Seconds per tick of the times of clips: the source's own, where all its frames lie on it."""
    base = stream.time_base
    if base is not None and base.denominator <= _MAX_TICKS:
        ticks = np.round(seconds / float(base))
        if len(ticks) and np.abs(ticks * float(base) - seconds).max() < _TIMES_OFF and (np.diff(ticks) > 0).all():
            return base
    return Fraction(1, 90_000)


def ticks_of(piece: Piece, seconds: NDArray[np.float64], base: Fraction) -> list[int]:
    """Times of the frames of a piece and of its end, in ticks from its first frame on, strictly ascending."""
    ticks = np.round(seconds[piece.start_frame : piece.end_frame] / float(base)).astype(np.int64)
    end = max(round(piece.end_seconds / float(base)), int(ticks[-1]) + 1)
    ticks = np.append(ticks, end) - ticks[0]
    steps = np.arange(len(ticks))
    return [int(tick) for tick in np.maximum.accumulate(ticks - steps) + steps]


@contextmanager
def clip_container(part: Path, path: Path, format: str) -> Iterator[OutputContainer]:
    """A container that gets no clock and no version into its file.

    Args:
        part: where it is written.
        path: that the file will have.
        format: FFmpeg's name.

    Raises:
        ResourceError: the disk is full.
        OSError: the file system refuses otherwise.
        InputError: the container does not take what it is given.
    """
    options = {"fflags": "+bitexact"}
    if format == "mp4":
        # sound that begins later than the pictures is placed in these ticks, by default whole milliseconds
        options |= {"movflags": "+faststart", "movie_timescale": "90000"}
    try:
        with av.open(f"file:{part}", "w", format=format, container_options=options) as container:
            yield container
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            size = part.stat().st_size if part.exists() else 0
            raise ResourceError(
                f"no space left for {path}: needed more than {readable(size)}, free {readable(free_bytes(path))}",
                "free some space, or choose another disk",
            ) from error
        raise
    except av.FFmpegError as error:
        raise InputError(f"the clip cannot be written: {error.strerror}") from error


def checked(
    part: Path,
    path: Path,
    piece: Piece,
    times: Sequence[float],
    limits: Limits,
    *,
    num_copied: int,
    tolerance: float,
    proof: Proof | None = None,
) -> Cut:
    """Decode a written clip back, or prove that it would decode.

    Args:
        part: where it lies now.
        path: that it will have.
        piece: what is in it.
        times: seconds of its frames from the first one on.
        limits: of what decoding it may cost.
        num_copied: frames that were copied.
        tolerance: seconds by which its times may be off.
        proof: of its packets; None decodes all of it, as does a clip that it does not fit.

    Raises:
        InputError: it does not hold these frames at these times.
    """
    try:
        found = proved(proof, Budget(part, limits)) if proof is not None else None
        found = found or survey(Window(), Budget(part, limits))
    except (InputError, av.FFmpegError) as error:
        reason = str(error).replace(str(part), str(path))  # the same in every run
        raise InputError(f"the clip does not decode back: {reason}") from error
    if len(found.times) != len(times):
        raise InputError(f"{len(found.times)} of the {len(times)} frames of the clip decode back")
    off = np.abs(np.array(found.times) - found.times[0] - np.array(times)).max()
    if off > tolerance + _TIMES_OFF:
        raise InputError(f"the frames of the clip are up to {off:.4f} s off their times")
    span = found.times[-1] - found.times[0]
    return Cut(
        path=path,
        start_frame=piece.start_frame,
        end_frame=piece.end_frame,
        start_seconds=piece.start_seconds,
        end_seconds=piece.end_seconds,
        num_frames=len(found.times),
        width=found.width,
        height=found.height,
        fps=(len(found.times) - 1) / span if span > 0 else found.average_fps,
        num_copied=num_copied,
        sha256=sha256(part),
    )
