"""Cut clips out of a source in one pass: exact to the frame by encoding anew, by copying packets, or by both.

`exact` decodes the source once and encodes each piece. Times of the source are kept relative to the clip's first frame,
whatever the frame rate; with `Encoding.fps` output frame j, shown at j / fps, is the source's nearest in time. See
`Fitting` for sizes, rotation, colours and interlaced video. Sound is cut to the sample and becomes AAC.

`copy` takes the packets from the first keyframe in the piece that needs nothing before it (H.264: IDR) up to the last
one that needs nothing at or after its end. So a clip may begin later and, where pictures refer to others beyond the
end, end some frames earlier: `Cut` tells what is in it. Size, pixel shape, rotation and colours stay the source's.

`smart` copies these packets too, and encodes the frames before and after them like the source's: same size, rate, pixel
format. Where that cannot be right (any codec but H.264 4:2:0 of 8 bits, open groups of pictures, parameter sets that
change, no keyframe within) the piece is cut as by `exact`, but in the source's size and rate, and `num_copied` is 0.

Files are .mp4 for H.264, HEVC, AV1 and MPEG-4, as everything encoded is; copied VP8 and VP9 are .webm, and all else,
or a copied sound that these containers do not take, is .mkv. The suffix of `Piece.path` is replaced then.
The same source, pieces and encoding give the same bytes, if no hardware encodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from opensora_core.errors import InputError, UsageError
from opensora_core.media.copying import copied
from opensora_core.media.encoding import settled
from opensora_core.media.exact import Source, decoded, encoded
from opensora_core.media.pieces import Cut, Encoding, Failure, Piece
from opensora_core.media.piecework import Job, carried_out, tick
from opensora_core.media.read import Limits, opened
from opensora_core.media.soundtrack import Soundtrack
from opensora_core.media.splicing import spliced

__all__ = ["Cut", "Encoding", "Failure", "How", "Piece", "cut"]

How = Literal["exact", "copy", "smart"]
_LIMITS = Limits()
_ENCODING = Encoding()
_Way = Callable[[InputContainer, Source, Sequence[Piece], Encoding, int], Iterator[tuple[Job, Cut | str]]]


def cut(
    source: Path,
    pieces: Sequence[Piece],
    seconds: NDArray[np.float64],
    how: How = "exact",
    encoding: Encoding = _ENCODING,
    *,
    threads: int = 1,
    limits: Limits = _LIMITS,
    is_decoded: bool = False,
    on_progress: Callable[[float], None] | None = None,
) -> Iterator[Cut | Failure]:
    """Cut pieces out of a source, and decode each of them back or prove it by its bytes.

    Args:
        source: a video.
        pieces: in any order. Those that overlap cost a further pass; the others share one.
        seconds: (N,) times of all frames of the source that decode, ascending.
        how: the way, see this module.
        encoding: of what is encoded.
        threads: of the source's decoder. The result does not depend on them.
        limits: of what the source, and each clip, may cost. `max_seconds` is the longest wait for a frame.
        is_decoded: `seconds` are of frames each of which was decoded and found sound: copied packets are then compared
            with the source's, and only what is new and what stands beside it is decoded back.
        on_progress: is told how much is done, up to 1.

    Yields:
        For every piece its clip, or the reason why there is none, as they come to be known.

    Raises:
        InputError: the source cannot be opened, or a piece is not of it.
        ConfigError: an encoding that is not possible.
        DeviceError: a hardware encoder that is not there.
        ResourceError: the disk is full or refuses. Clips that were yielded stay, nothing torn does.
    """
    if how != "copy":
        encoding = settled(encoding)
    _require_within(source, pieces, seconds)
    total, done = sum(piece.end_frame - piece.start_frame for piece in pieces), 0
    for layer in _layers(pieces):
        for outcome, piece in _cut(
            source,
            layer,
            seconds,
            how=how,
            encoding=encoding,
            threads=threads,
            limits=limits,
            is_decoded=is_decoded,
        ):
            done += piece.end_frame - piece.start_frame
            if on_progress is not None:
                on_progress(done / total)
            yield outcome


def _require_within(source: Path, pieces: Sequence[Piece], seconds: NDArray[np.float64]) -> None:
    for piece in pieces:
        if not 0 <= piece.start_frame < piece.end_frame <= len(seconds):
            raise InputError(
                f"frames {piece.start_frame} to {piece.end_frame} of {source} were asked for, "
                f"which has {len(seconds)} frames"
            )
    if len({piece.path.with_suffix("") for piece in pieces}) < len(pieces):
        raise UsageError(f"two pieces of {source} have the same path")


def _layers(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces in the order of their beginnings, as few lists as hold none that overlap."""
    layers: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: (piece.start_frame, piece.end_frame, piece.path)):
        for layer in layers:
            if layer[-1].end_frame <= piece.start_frame:
                layer.append(piece)
                break
        else:
            layers.append([piece])
    return layers


def _cut(
    path: Path,
    pieces: list[Piece],
    seconds: NDArray[np.float64],
    *,
    how: How,
    encoding: Encoding,
    threads: int,
    limits: Limits,
    is_decoded: bool,
) -> Iterator[tuple[Cut | Failure, Piece]]:
    """Pieces that do not overlap."""
    ways: list[_Way]
    if how == "exact":
        ways = [_exact]
    elif how == "copy":
        ways = [copied]
    else:
        # packets are as large and as many as they are
        encoding = replace(encoding, fps=None, short_side=None, crop=None)
        ways = [spliced, _exact]
    for way in ways:
        is_last = way is ways[-1]
        again: list[Piece] = []
        with ExitStack() as stack:
            container, stream = stack.enter_context(opened(path, limits.max_pixels))
            track = stack.enter_context(Soundtrack(path, limits.max_pixels))
            source = Source(path, stream, seconds, tick(stream, seconds), track, limits, is_decoded)
            for job, outcome in way(container, source, pieces, encoding, threads):
                if isinstance(outcome, Cut):
                    yield outcome, job.piece
                elif is_last:
                    yield Failure(job.piece.path, outcome), job.piece
                else:
                    again.append(job.piece)
        pieces = sorted(again, key=lambda piece: piece.start_frame)
        if not pieces:
            return


def _exact(
    container: InputContainer, source: Source, pieces: Sequence[Piece], encoding: Encoding, threads: int
) -> Iterator[tuple[Job, Cut | str]]:
    jobs = [Job(piece, partial(_is_in, piece), partial(encoded, source, piece, encoding)) for piece in pieces]
    yield from carried_out(jobs, decoded(container, source, threads))


def _is_in(piece: Piece, frame: int, position: int) -> bool:
    return piece.start_frame <= frame < piece.end_frame
