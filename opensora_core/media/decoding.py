"""From the packets of a video to exactly the frames that are wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain, islice

import av
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from opensora_core.errors import InputError
from opensora_core.media.packets import (
    DamageError,
    Timeline,
    UnreliableTimesError,
    Window,
    packets_from,
    scan,
    seconds,
)
from opensora_core.media.read import Budget, opened
from opensora_core.media.shown import Screen

_MAX_SILENT_PACKETS = 1000  # more than any codec or number of threads holds back
_TOP = float("-inf")

Decoded = tuple[int, VideoFrame, VideoStream]
"""The number of a frame, the frame, and the stream it comes from."""
_Way = Callable[[Sequence[int], Window, int, Budget], Iterator[Decoded]]


@dataclass(frozen=True)
class Survey:
    """What decoding a whole clip shows."""

    times: list[float]  # seconds of the frames that can be had, ascending
    height: int  # as shown
    width: int
    average_fps: float  # as the container says


def frames_at(indices: Sequence[int], window: Window, threads: int, budget: Budget) -> Iterator[Decoded]:
    """Decode chosen frames of a clip, from the nearest keyframes if all that they give can be verified.

    Otherwise from the top of the file; and by counting, where timestamps do not tell frames apart.

    Args:
        indices: ascending, without repetitions.
        window: of the clip.
        threads: of the decoder.
        budget: names the file.

    Yields:
        The frames, in no certain order. One that comes again replaces the earlier one.

    Raises:
        InputError: no such frame, or one that cannot be decoded.
        av.FFmpegError: what the container has against the file.
    """
    way: _Way = _from_keyframes
    while True:
        missing = set(indices)
        try:
            for decoded in way(indices, window, threads, budget):
                missing.discard(decoded[0])
                yield decoded
            return
        except UnreliableTimesError:
            way = _counting
        except DamageError as error:
            if way is not _from_keyframes:
                raise InputError(
                    f"frame {min(missing)} of {budget.path} cannot be decoded: {error}",
                    f"{len(indices) - len(missing)} of the {len(indices)} frames asked for could be",
                ) from error
            way = _from_top


def _from_keyframes(indices: Sequence[int], window: Window, threads: int, budget: Budget) -> Iterator[Decoded]:
    """Begin at keyframes, and pass over what no wanted frame needs."""
    yield from _by_time(indices, window, threads, budget, window.start, passing_over=True)


def _from_top(indices: Sequence[int], window: Window, threads: int, budget: Budget) -> Iterator[Decoded]:
    """Decode everything from the top of the file, as a stream without true keyframes needs it."""
    yield from _by_time(indices, window, threads, budget, _TOP, passing_over=False)


def _by_time(
    indices: Sequence[int], window: Window, threads: int, budget: Budget, start: float, *, passing_over: bool
) -> Iterator[Decoded]:
    with opened(budget.path, budget.limits.max_pixels) as (container, stream):
        timeline = scan(packets_from(container, stream, start), stream, window, indices[-1], budget)
        wanted = _timestamps(indices, timeline, budget)
        runs = timeline.runs(wanted)
        if not passing_over:
            runs = [(0, runs[-1][1])]
        if timeline.kept is not None:
            decoder = Decoder(stream, threads, budget)
            yield from _decode(timeline.kept, runs, timeline, wanted, decoder, passing_over=passing_over)
            return
    with opened(budget.path, budget.limits.max_pixels) as (container, stream):
        packets, decoder = packets_from(container, stream, start), Decoder(stream, threads, budget)
        yield from _decode(packets, runs, timeline, wanted, decoder, passing_over=passing_over)


def _timestamps(indices: Sequence[int], timeline: Timeline, budget: Budget) -> dict[int, int]:
    """The numbers of the wanted frames by their timestamps."""
    if indices[-1] >= len(timeline.clip):
        raise _no_such_frame(budget, indices[-1], len(timeline.clip))
    return {timeline.clip[index]: index for index in indices}


def _no_such_frame(budget: Budget, index: int, num_frames: int) -> InputError:
    return InputError(f"frame {index} of {budget.path} was asked for, which has {num_frames} frames to decode")


def _decode(
    packets: Iterable[Packet[VideoStream]],
    runs: Sequence[tuple[int, int]],
    timeline: Timeline,
    wanted: Mapping[int, int],
    decoder: Decoder,
    *,
    passing_over: bool,
) -> Iterator[Decoded]:
    """Feed runs of packets, and see to it that every one gives the frame it should."""
    feed = enumerate(packets)
    for run, (first, last) in enumerate(runs):
        if run:
            decoder.restart()
        due: set[int] = set()
        for position, packet in feed:
            if position < first:
                continue
            pts = timeline.pts[position]
            if packet.pts != pts:
                raise DamageError("the file reads differently the second time")
            if packet.is_corrupt:
                raise DamageError("its data is torn")
            # pictures that follow a keyframe but are shown before it refer to what was not decoded
            leads = pts < timeline.pts[first]
            needed = pts in wanted or not (leads or (passing_over and timeline.droppable[position]))
            if needed:
                if timeline.shown[position]:
                    due.add(pts)
                yield from _verified(decoder.feed(packet), due, wanted, decoder.stream)
            if position == last:
                break
        yield from _verified(decoder.feed(None), due, wanted, decoder.stream)
        if due:
            raise DamageError(f"{len(due)} frames did not come out of the decoder")


def _verified(
    frames: Iterable[VideoFrame], due: set[int], wanted: Mapping[int, int], stream: VideoStream
) -> Iterator[Decoded]:
    for frame in frames:
        if frame.is_corrupt:
            raise DamageError("its data is damaged")
        if frame.pts not in due:
            raise DamageError("a frame came out of the decoder with a time of its own")
        due.remove(frame.pts)
        if frame.pts in wanted:
            yield wanted[frame.pts], frame, stream


def _counting(indices: Sequence[int], window: Window, threads: int, budget: Budget) -> Iterator[Decoded]:
    """Decode everything from the top and count what comes out."""
    wanted, index = set(indices), 0
    with opened(budget.path, budget.limits.max_pixels) as (container, stream):
        decoder = Decoder(stream, threads, budget)
        for time, frame in counted(packets_from(container, stream, _TOP), decoder):
            if frame is None:
                raise DamageError("its data is damaged")
            if window.start <= time < window.end:
                if index in wanted:
                    yield index, frame, stream
                if index == indices[-1]:
                    return
                index += 1
    raise _no_such_frame(budget, indices[-1], index)


def counted(packets: Iterable[Packet[VideoStream]], decoder: Decoder) -> Iterator[tuple[float, VideoFrame | None]]:
    """Frames and their seconds in the order of showing; None for damage, except before the first sound frame."""
    step = 1 / float(decoder.stream.average_rate or 25)
    time, begun = -step, False
    # AVI numbers packets in the order of coding, and knows nothing of pictures that overtake others; so do files that
    # were written as if it were one: the n-th frame has the n-th of their times
    is_avi, in_order = decoder.stream.container.format.name == "avi", True
    newest, slots = -math.inf, list[int]()
    for packet in _from_keyframe(packets):
        if packet is not None and packet.pts is not None:
            in_order &= packet.pts > newest
            newest = max(newest, packet.pts)
            heappush(slots, packet.pts)
        elif packet is not None:
            in_order = False
        is_numbered = is_avi or (in_order and decoder.is_reordering)
        frames: list[VideoFrame | None]
        try:
            frames = list(decoder.feed(packet))
        except DamageError:
            frames = [None]
        for frame in frames:
            if frame is None or frame.is_corrupt:
                if begun:
                    yield time, None
                continue
            pts = frame.pts
            if slots:
                slot = heappop(slots)
                pts = slot if is_numbered else pts
            stamp = None if pts is None else seconds(pts, decoder.stream)
            time = stamp if stamp is not None and (stamp > time or not begun) else time + step
            begun = True
            yield time, frame


def _from_keyframe(packets: Iterable[Packet[VideoStream]]) -> Iterator[Packet[VideoStream] | None]:
    """Packets from the first keyframe on, and the end that makes a decoder give all it has."""
    begun = False
    for packet in packets:
        begun |= packet.is_keyframe
        if begun:
            yield packet
    yield None


def survey(window: Window, budget: Budget) -> Survey:
    """Decode a whole clip to learn what frames it has. A clip that breaks off ends with its last sound frame.

    Raises:
        InputError: no frame can be decoded, or sound frames follow damaged ones.
        av.FFmpegError: what the container has against the file.
    """
    try:
        try:
            return _survey_by_time(window, budget, window.start)
        except DamageError:
            return _survey_by_time(window, budget, _TOP)
    except UnreliableTimesError:
        return _survey_by_counting(window, budget)
    except DamageError as error:
        raise InputError(f"{budget.path} is damaged: {error}") from error


def _survey_by_time(window: Window, budget: Budget, start: float) -> Survey:
    with opened(budget.path, budget.limits.max_pixels) as (container, stream):
        timeline = scan(packets_from(container, stream, start), stream, window, None, budget)
    if not timeline.clip:
        raise _nothing(budget)
    clip = set(timeline.clip)
    positions = {pts: position for position, pts in enumerate(timeline.pts) if timeline.shown[position]}
    last = max(positions[pts] for pts in clip)
    sound: set[int] = set()
    damaged: set[int] = set()
    size = (0, 0)
    with opened(budget.path, budget.limits.max_pixels) as (container, stream):
        decoder = Decoder(stream, 1, budget, only_count=True)
        screen = Screen(budget.path, stream, None, budget.limits.max_pixels)
        for position, packet in enumerate(chain(islice(packets_from(container, stream, start), last + 1), [None])):
            if packet is not None and timeline.pts[position] < timeline.pts[0]:
                continue  # shown before the first keyframe: refers to what was not decoded
            try:
                frames = decoder.feed(packet)
            except DamageError:
                damaged.add(position)
                continue
            for frame in frames:
                if frame.is_corrupt or frame.pts not in positions:
                    damaged.add(positions.get(frame.pts or 0, position))
                elif frame.pts in clip:
                    size = size if sound else screen.size(frame)
                    sound.add(frame.pts)
        gaps = clip - sound
        end = min(gaps, default=timeline.clip[-1] + 1)
        # while the container is open: what a closed one says of its streams is garbage
        times, average = [seconds(pts, stream) for pts in timeline.clip if pts < end], _average_fps(stream)
    damaged.update(positions[pts] for pts in gaps)
    if damaged and any(positions[pts] > min(damaged) for pts in sound):
        raise DamageError(f"only {len(sound)} of its {len(clip)} frames can be decoded, and not the first ones alone")
    if not times:
        raise _nothing(budget)
    return Survey(times, *size, average)


def _survey_by_counting(window: Window, budget: Budget) -> Survey:
    times: list[float] = []
    size, damaged = (0, 0), False
    with opened(budget.path, budget.limits.max_pixels) as (container, stream):
        screen = Screen(budget.path, stream, None, budget.limits.max_pixels)
        decoder = Decoder(stream, 1, budget, only_count=True)
        for time, frame in counted(packets_from(container, stream, _TOP), decoder):
            if time >= window.end:
                break
            if frame is None:
                damaged = True
            elif time >= window.start:
                if damaged:
                    raise InputError(f"{budget.path} is damaged: sound frames follow damaged ones after {time:g} s")
                size = size if times else screen.size(frame)
                times.append(time)
        average = _average_fps(stream)
    if not times:
        raise _nothing(budget)
    return Survey(times, *size, average)


def _average_fps(stream: VideoStream) -> float:
    return float(stream.average_rate or 1)


def _nothing(budget: Budget) -> InputError:
    return InputError(f"{budget.path} holds no frame that can be decoded, or none in the seconds asked for")


class Decoder:
    """The decoder of a stream, which says what went wrong."""

    def __init__(self, stream: VideoStream, threads: int, budget: Budget, only_count: bool = False) -> None:
        self.stream = stream
        self._context = stream.codec_context
        self._context.thread_count = threads
        self._context.thread_type = "AUTO" if threads > 1 else "NONE"
        options = dict(self._context.options)
        if self._context.name == "h264":
            options["strict"] = "1"  # wait for as many pictures as may overtake, instead of guessing and losing some
        if only_count:
            options["skip_loop_filter"] = "all"
        self._context.options = options
        self._budget = budget
        self._num_packets = 0
        self._num_silent = 0

    @property
    def is_reordering(self) -> bool:
        """Whether pictures may overtake others."""
        return bool(self._context.has_b_frames)

    def feed(self, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
        """Frames that a packet completes; None completes all.

        Raises:
            DamageError: the packet cannot be decoded, or nothing has come of very many.
            InputError: beyond the budget.
        """
        self._num_packets += packet is not None
        self._budget.check(self._num_packets)
        try:
            frames = self._context.decode(packet)
        except (av.FFmpegError, EOFError) as error:
            raise DamageError(str(error)) from error
        self._num_silent = 0 if frames else self._num_silent + 1
        if self._num_silent > _MAX_SILENT_PACKETS:
            raise DamageError(f"{_MAX_SILENT_PACKETS} packets gave no frame")
        return frames

    def restart(self) -> None:
        """Forget everything, as before a jump."""
        self._context.flush_buffers()
