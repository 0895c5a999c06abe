"""Clips that show what another one shows: by a hash of their pictures, and by CLIP's embeddings where there are some.

The hash is the usual one of the DCT (Zauner 2010, "pHash"): 64 bits for a picture, which hardly change when it is
encoded anew or resized. A clip has those of five frames at fixed shares of its length.

The index is one of many keys (Norouzi et al. 2012, "multi-index hashing"). Codes that differ in at most d of their bits
agree, in one of b parts, in all but d // b of that part's bits. So a code is looked for under the keys of its parts and
their neighbours, and compared with the few that are found there: nothing that is near enough is missed, and nothing
else is looked at but what shares 16 bits by chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations

import cv2
import numpy as np
from numpy.typing import NDArray

from opensora_core.config import FilterConfig
from opensora_core.curation.filters.look import Filter, Gray, Look

NUM_PICTURES, BITS = 5, 64
"""Hashes of a clip, and bits of each."""

_PART = 16  # bits of a key: a hundred thousand clips share one or two of them by chance
_MOST_RADIUS = 3  # bits: a key has 697 neighbours so near
_LEAST_CONTRAST = 4.0  # standard deviation, in levels, of a picture that has something to hash
_SIDE, _KEPT = 32, 8  # of the picture that is transformed, and of the lowest frequencies that are kept
_SEED = 20240614  # of the planes that embeddings are told apart by


def picture_hash(gray: Gray) -> int:
    """64 bits of a picture (H, W): which of its lowest frequencies are above their median. 0 if there is nothing in it.

    No picture with something in it has 0, for half of its bits are 1.
    """
    small = cv2.resize(gray, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if float(small.std()) < _LEAST_CONTRAST:
        return 0
    low = cv2.dct(small)[:_KEPT, :_KEPT].ravel()
    return int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes(), "big")


def signature(look: Look) -> int:
    """The hashes of five pictures as one number of 320 bits; 0 if there is nothing in any of them."""
    code = 0
    for share in range(NUM_PICTURES):
        place = look.firsts[min(int((share + 0.5) * len(look.firsts) / NUM_PICTURES), len(look.firsts) - 1)]
        code = code << BITS | picture_hash(look.grays[place])
    return code


def fingerprint(vector: NDArray[np.float32]) -> int:
    """320 bits of an embedding (E,): on which side of as many planes it lies (Charikar 2002)."""
    sides = _planes(len(vector)) @ vector.astype(np.float64) > 0
    return int.from_bytes(np.packbits(sides).tobytes(), "big")


@lru_cache(2)
def _planes(width: int) -> NDArray[np.float64]:
    return np.random.default_rng(_SEED).standard_normal((NUM_PICTURES * BITS, width))


def bits_of(similarity: float) -> int:
    """In how many bits fingerprints of a cosine or more differ at most, but for one in a thousand."""
    share = float(np.arccos(np.clip(similarity, -1, 1))) / np.pi
    size = NUM_PICTURES * BITS
    return int(size * share + 3 * (size * share * (1 - share)) ** 0.5) + 1


class Index:
    """Codes by their parts. Codes are put in one after the other, and each can be asked for what is near it.

    Args:
        most: bits in which codes differ at most to be near each other.
        size: bits of a code.
    """

    def __init__(self, most: int, size: int = NUM_PICTURES * BITS) -> None:
        self.most = most
        self._count = size // _PART
        self._codes: list[int] = []
        self._names: list[int] = []
        self._tables: list[dict[int, list[int]]] = [{} for _ in range(self._count)]

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, code: int, name: int) -> None:
        """Put a code in."""
        place = len(self._codes)
        self._codes.append(code)
        self._names.append(name)
        for table, key in zip(self._tables, self._keys(code), strict=True):
            if key is not None:
                table.setdefault(key, []).append(place)

    def near(self, code: int) -> Iterator[tuple[int, int]]:
        """(bits that differ, name) of all codes that are near, each once, in the order in which they were put in."""
        keys = self._keys(code)
        parts = sum(key is not None for key in keys) or 1
        found: set[int] = set()
        radius = self.most // parts
        if radius > _MOST_RADIUS:  # most of its pictures show nothing: plain comparison is no slower
            found.update(range(len(self._codes)))
        for table, key in zip(self._tables, keys, strict=True):
            if key is not None and radius <= _MOST_RADIUS:
                for flip in _flips(radius):
                    if (places := table.get(key ^ flip)) is not None:
                        found.update(places)
        for place in sorted(found):
            if (bits := (code ^ self._codes[place]).bit_count()) <= self.most:
                yield bits, self._names[place]

    def _keys(self, code: int) -> list[int | None]:
        """The parts of a code; None for those of a picture with nothing in it, which are all the same."""
        keys: list[int | None] = []
        for start in range(0, self._count * _PART, BITS):
            hashed = code >> start & 2**BITS - 1
            keys += [hashed >> shift & 2**_PART - 1 if hashed else None for shift in range(0, BITS, _PART)]
        return keys


@lru_cache(8)
def _flips(radius: int) -> tuple[int, ...]:
    """Masks of up to `radius` bits of a part, few bits first."""
    return tuple(
        sum(1 << bit for bit in bits) for count in range(radius + 1) for bits in combinations(range(_PART), count)
    )


COPY_BITS = Filter(
    about="bits of a picture's 64-bit hash in which it differs from the nearest clip that is kept, if it is near",
    unit="bits of 64",
    measure=None,
    least="min_copy_bits",
    is_on=lambda settings: settings.min_copy_bits > 0,
)
COPY_SIMILARITY = Filter(
    about="cosine with the embedding of the nearest clip that is kept, if it is near",
    unit="of 1",
    measure=None,
    most="max_copy_similarity",
    is_on=lambda settings: bool(settings.clip_model) and settings.max_copy_similarity > 0,
    needs="a CLIP: --set filter.clip_model=FOLDER",
)


def most_bits(settings: FilterConfig) -> int:
    """Bits of 320 in which copies differ at most."""
    return int(np.ceil(settings.min_copy_bits * NUM_PICTURES)) - 1
