"""Encoders for clips: which there are, how they are told what is wanted, and whether they really open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

import av
from av.codec.context import Flags
from av.video.codeccontext import VideoCodecContext

from opensora_core.errors import ConfigError, DeviceError, nearest
from opensora_core.media.pieces import Encoding

REPEATABLE_X264 = "mbtree=0"
"""x264's macroblock tree reads past the end of a row whose length is no multiple of 128 pixels, so that one video in
ten comes out differently (measured; never without it): files grow, and are repeatable."""

_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
_QP2LAMBDA = 118  # FFmpeg's unit of quality


@dataclass(frozen=True)
class Encoder:
    """An encoder of FFmpeg."""

    pixel_format: str
    options: Callable[[Encoding], dict[str, str]]
    is_hardware: bool = False  # may be absent, and gives other bytes on another device
    codec_tag: str = ""


def _x264(encoding: Encoding) -> dict[str, str]:
    return _software(encoding) | {"x264-params": REPEATABLE_X264}


def _x265(encoding: Encoding) -> dict[str, str]:
    return _software(encoding) | {"x265-params": "log-level=none:pools=none:frame-threads=1"}


def _software(encoding: Encoding) -> dict[str, str]:
    tune = {"tune": "fastdecode"} if encoding.fast_decode else {}
    return {"preset": encoding.preset, "crf": str(encoding.crf), **tune}


def _nvenc(encoding: Encoding) -> dict[str, str]:
    number = max(1, _PRESETS.index(encoding.preset) - 1)
    return {"preset": f"p{number}", "rc": "vbr", "cq": str(encoding.crf), "b": "0"}


def _qsv(encoding: Encoding) -> dict[str, str]:
    return {"preset": _PRESETS[max(2, _PRESETS.index(encoding.preset))], "global_quality": str(encoding.crf)}


def _amf(encoding: Encoding) -> dict[str, str]:
    place = _PRESETS.index(encoding.preset)
    quality = "speed" if place < 4 else "balanced" if place < 6 else "quality"
    return {"quality": quality, "rc": "cqp", "qp_i": str(encoding.crf), "qp_p": str(encoding.crf)}


def _videotoolbox(encoding: Encoding) -> dict[str, str]:
    return {"flags": "+qscale", "global_quality": str(_QP2LAMBDA * max(1, 100 - 2 * encoding.crf))}


ENCODERS: dict[str, Encoder] = {
    "libx264": Encoder("yuv420p", _x264),
    "libx265": Encoder("yuv420p", _x265, codec_tag="hvc1"),
    "h264_nvenc": Encoder("yuv420p", _nvenc, is_hardware=True),
    "h264_videotoolbox": Encoder("yuv420p", _videotoolbox, is_hardware=True),
    "h264_qsv": Encoder("nv12", _qsv, is_hardware=True),
    "h264_amf": Encoder("nv12", _amf, is_hardware=True),
    "hevc_nvenc": Encoder("yuv420p", _nvenc, is_hardware=True, codec_tag="hvc1"),
    "hevc_videotoolbox": Encoder("yuv420p", _videotoolbox, is_hardware=True, codec_tag="hvc1"),
    "hevc_qsv": Encoder("nv12", _qsv, is_hardware=True, codec_tag="hvc1"),
}
"""Encoders by FFmpeg's names. "auto" asks the hardware ones for H.264 in this order."""


@lru_cache(maxsize=32)
def settled(encoding: Encoding) -> Encoding:
    """The same encoding with an encoder that has been opened on this machine.

    Raises:
        ConfigError: an encoder or preset that is unknown, or settings that it refuses.
        DeviceError: a hardware encoder that is not there.
    """
    if encoding.codec == "auto":
        for name, encoder in ENCODERS.items():
            if encoder.is_hardware and name.startswith("h264") and not encoding.fast_decode:
                candidate = replace(encoding, codec=name)
                if not _refusal(candidate):
                    return candidate
        encoding = replace(encoding, codec="libx264")
    if encoding.codec not in ENCODERS:
        raise ConfigError(f"unknown encoder '{encoding.codec}'", nearest(encoding.codec, [*ENCODERS, "auto"]))
    if encoding.preset not in _PRESETS:
        raise ConfigError(f"unknown preset '{encoding.preset}' of an encoder", nearest(encoding.preset, _PRESETS))
    _require_sense(encoding)
    if refusal := _refusal(encoding):
        if ENCODERS[encoding.codec].is_hardware:
            raise DeviceError(f"encoder {encoding.codec} does not open here: {refusal}", "use libx264, or auto")
        raise ConfigError(f"encoder {encoding.codec} refuses its settings: {refusal}")
    return encoding


def _require_sense(encoding: Encoding) -> None:
    if ENCODERS[encoding.codec].is_hardware and encoding.fast_decode:
        raise ConfigError(f"encoder {encoding.codec} has no fast_decode", "use libx264 or libx265")
    if not 0 <= encoding.crf <= 51:
        raise ConfigError(f"crf {encoding.crf} is not in 0 to 51", "18 looks like the source, 23 is half the size")
    if encoding.fps is not None and not 0 < encoding.fps <= 1000:
        raise ConfigError(f"{encoding.fps} frames per second were asked for", "ask for more than 0 and at most 1000")
    if encoding.short_side is not None and encoding.short_side < 16:
        raise ConfigError(f"a short side of {encoding.short_side} was asked for", "ask for 16 pixels or more")


def _refusal(encoding: Encoding) -> str:
    """Why the encoder cannot be used; "" if it encodes a picture."""
    try:
        context = av.CodecContext.create(encoding.codec, "w")
        assert isinstance(context, VideoCodecContext)
        prepare(context, encoding, (256, 256), Fraction(1, 25))
        frame = av.VideoFrame(256, 256, context.pix_fmt or "yuv420p")
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        packets = [*context.encode(frame), *context.encode(None)]
    except (av.FFmpegError, ValueError) as error:
        return str(error)
    return "" if packets else "it gives nothing"


def prepare(context: VideoCodecContext, encoding: Encoding, size: tuple[int, int], base: Fraction) -> None:
    """Set an encoder up. The same pictures give the same bytes then, if it is not hardware.

    Args:
        context: of an encoder that is not open yet.
        encoding: settled.
        size: height and width in pixels, even.
        base: seconds per tick of the times of its frames.
    """
    encoder = ENCODERS[encoding.codec]
    (context.height, context.width), context.pix_fmt = size, encoder.pixel_format
    context.time_base = base
    context.thread_count = 1  # x264's choices depend on the number of threads
    context.flags |= Flags.bitexact | Flags.global_header
    context.options = encoder.options(encoding)
    if encoder.codec_tag:
        context.codec_tag = encoder.codec_tag


def rational_rate(fps: float) -> Fraction:
    """Frames per second as a fraction: 23.976 is 24000/1001."""
    whole = round(fps * 1001 / 1000)
    broadcast = Fraction(whole * 1000, 1001)
    if whole and abs(fps - broadcast) < 0.0005 < abs(fps - round(fps)):
        return broadcast
    return Fraction(fps).limit_denominator(1001)
