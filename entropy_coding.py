"""Entropy coding of integer and float arrays: bytes that are near their zero-order entropy, at memory-like speed.

An array is cut into chunks of 2^20 elements and each chunk into planes of bytes, and each plane is one zstd frame
with a checksum. Wide types and floats are cut byte by byte, as Blosc's shuffle does. 16-bit integers, which are what
this suite's files consist of, are cut at a bit that suits the chunk: the upper part goes into a byte, the lower k
bits into another, and where the upper part needs more than a byte an escape, 255, sends the element to a third plane.
k is what the chunk's histogram says is cheapest of 0, 1, 2, 4 and 8: 8 for grid indices, whose upper byte is worth
six bits and whose lower byte is almost uniform, 1 to 4 for the moves of a fine-tune. Lower parts are packed, 8 / k to
a byte: they are noise, which has no shorter form, and as one byte each zstd would find matches in it. Signed integers
are first interleaved (0, -1, 1, -2, ...), or every small negative number would fill its upper bits with ones.

zstd runs with its match finder all but off (matches of seven bytes, a table of 64 entries): what remains of it is a
well-kept Huffman coder that begins anew every 128 KiB. Its usual levels find chance matches of three bytes in codes of
low entropy, which are worse than no match: 4.11 bits instead of 3.63 for 4-bit codes.

Layout of the bytes: for each chunk, of 16-bit integers first one byte k, then for each plane (lower part, upper part,
escapes; else from the lowest byte up) a little-endian uint32 with the length of the frame, and the frame. Type and
number of elements are the caller's to remember. Decoding allocates what it has decoded and never what a frame or a
caller's header claims.

Rejected, measured on one core (LOG.md): constriction's ANS and range coder come within 0.03% of the entropy even of
65,536 symbols, but decode 7 to 16 MB/s, where 50 were asked.
"""

from __future__ import annotations

import struct

import numpy as np
import zstandard

CHUNK = 1 << 20
"""Elements coded together: a chunk's planes are all that decoding holds beside its result."""

_LENGTH = struct.Struct("<I")
_ESCAPE = 255
_CUTS = (0, 1, 2, 4, 8)
_PARAMETERS = {"strategy": zstandard.STRATEGY_FAST, "min_match": 7, "target_length": 0, "hash_log": 6}


class EntropyError(ValueError):
    """Bytes that do not decode to what is expected of them."""


def encode(values: np.ndarray) -> bytes:
    """An array of any fixed-size type as bytes, its elements in row-major order."""
    flat = np.ascontiguousarray(values).reshape(-1)
    flat = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
    coder = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(
            1, **_PARAMETERS, write_checksum=True, write_content_size=True
        )
    )
    parts = []
    for start in range(0, len(flat), CHUNK):
        chunk = _interleave(flat[start : start + CHUNK])
        if flat.itemsize == 2 and flat.dtype.kind in "iu":
            cut, planes = _cut(chunk.view("<u2"))
            parts.append(bytes([cut]))
        else:
            raw = chunk.view(np.uint8).reshape(len(chunk), flat.itemsize)
            planes = [np.ascontiguousarray(raw[:, number]) for number in range(flat.itemsize)]
        for plane in planes:
            frame = coder.compress(plane.data)
            parts += [_LENGTH.pack(len(frame)), frame]
    return b"".join(parts)


def decode(data: bytes | memoryview, dtype: np.dtype | type | str, count: int) -> np.ndarray:
    """The ``count`` elements of type ``dtype`` that :func:`encode` made ``data`` of: a writable array ``(count,)``.

    Raises:
        EntropyError: damaged, or bytes of another number or type of elements.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    reader = _PlaneReader(memoryview(data))
    out = bytearray()
    left = count
    while left > 0:
        size = min(CHUNK, left)
        if kind.itemsize == 2 and kind.kind in "iu":
            out += _join(reader, size).data.cast("B")
        elif kind.itemsize == 1:
            out += reader.plane(size)
        else:
            planes = [reader.plane(size) for _ in range(kind.itemsize)]
            chunk = np.empty((size, kind.itemsize), dtype=np.uint8)
            for number, plane in enumerate(planes):
                chunk[:, number] = np.frombuffer(plane, dtype=np.uint8)
            out += chunk.data.cast("B")
        left -= size
    if reader.left:
        raise EntropyError(f"{reader.left} bytes are left over after {count} elements")
    result = np.frombuffer(out, dtype=kind)
    if kind.kind == "i":
        _separate(result)
    return result


def _interleave(values: np.ndarray) -> np.ndarray:
    """0, -1, 1, -2, ... to 0, 1, 2, 3, ... of the same width; other types than signed integers as they are."""
    if values.dtype.kind != "i":
        return values
    return np.left_shift(values, 1) ^ np.right_shift(values, 8 * values.itemsize - 1)


def _separate(values: np.ndarray) -> None:
    """The inverse of :func:`_interleave` on signed integers, in place."""
    unsigned = values.view(f"<u{values.itemsize}")
    sign = unsigned & 1
    np.right_shift(unsigned, 1, out=unsigned)
    np.bitwise_xor(unsigned, np.negative(sign), out=unsigned)


def _cut(values: np.ndarray) -> tuple[int, list[np.ndarray]]:
    """The cheapest k for a chunk, uint16 ``(n,)``, and its planes, uint8: lower k bits, upper part, escapes."""
    counts = np.bincount(values, minlength=1 << 16)
    cut = min(_CUTS, key=lambda k: _cost(counts, k))
    upper = values >> cut
    escaped = upper >= _ESCAPE if cut < 8 else np.zeros(0, dtype=bool)
    if cut < 8:
        upper = np.minimum(upper, _ESCAPE)
    escapes = values[escaped] if escaped.any() else values[:0]
    return cut, [_pack_bits(values & ((1 << cut) - 1), cut), upper.astype(np.uint8), escapes.view(np.uint8)]


def _cost(counts: np.ndarray, cut: int) -> float:
    """Bits per element of a histogram ``(65536,)`` cut at bit ``cut``, the lower bits taken as uniform."""
    upper = counts.reshape(-1, 1 << cut).sum(1)
    if cut < 8:
        upper = np.append(upper[:_ESCAPE], upper[_ESCAPE:].sum())
    shares = upper[upper > 0] / upper.sum()
    escapes = 16.0 * upper[_ESCAPE] / upper.sum() if cut < 8 else 0.0
    return float(-(shares * np.log2(shares)).sum()) + cut + escapes


def _pack_bits(values: np.ndarray, width: int) -> np.ndarray:
    """Numbers of ``width`` bits (0, 1, 2, 4 or 8), ``8 / width`` to a byte, the first lowest; uint8."""
    if width in (0, 8):
        return values.astype(np.uint8)[: len(values) * width]
    each = 8 // width
    padded = np.zeros(-(-len(values) // each) * each, dtype=np.uint8)
    padded[: len(values)] = values
    packed = padded[::each].copy()
    for place in range(1, each):
        packed |= padded[place::each] << (place * width)
    return packed


def _unpack_bits(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """The inverse of :func:`_pack_bits`, uint8 ``(count,)``."""
    if width in (0, 8):
        return packed if width else np.zeros(count, dtype=np.uint8)
    each = 8 // width
    values = np.empty((len(packed), each), dtype=np.uint8)
    for place in range(each):
        values[:, place] = (packed >> (place * width)) & ((1 << width) - 1)
    return values.reshape(-1)[:count]


def _join(reader: _PlaneReader, size: int) -> np.ndarray:
    """The inverse of :func:`_cut`: the next chunk, uint16 ``(size,)``."""
    cut = reader.byte()
    if cut not in _CUTS:
        raise EntropyError(f"a chunk is cut at bit {cut}, expected one of {_CUTS}")
    packed = np.frombuffer(reader.plane(-(-size * cut // 8)), dtype=np.uint8)
    upper = np.frombuffer(reader.plane(size), dtype=np.uint8)
    values = (upper.astype("<u2") << cut) | _unpack_bits(packed, cut, size)
    escaped = np.flatnonzero(upper == _ESCAPE) if cut < 8 else np.zeros(0, dtype=np.int64)
    values[escaped] = np.frombuffer(reader.plane(2 * len(escaped)), dtype="<u2")
    return values


class _PlaneReader:
    """Walks through the frames of :func:`encode`'s bytes."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.at = 0
        self.decoder = zstandard.ZstdDecompressor()

    @property
    def left(self) -> int:
        """Bytes that were not read yet."""
        return len(self.view) - self.at

    def byte(self) -> int:
        """The next byte."""
        if self.left < 1:
            raise EntropyError("the data end too early")
        self.at += 1
        return self.view[self.at - 1]

    def plane(self, size: int) -> bytes:
        """The next plane, of ``size`` bytes; the frame's own claim is compared before anything is allocated for it."""
        if self.left < _LENGTH.size:
            raise EntropyError("the data end too early")
        (length,) = _LENGTH.unpack_from(self.view, self.at)
        frame = self.view[self.at + _LENGTH.size : self.at + _LENGTH.size + length]
        self.at += _LENGTH.size + length
        try:
            claimed = zstandard.frame_content_size(frame) if len(frame) == length else -1
            plane = self.decoder.decompress(frame) if claimed == size else b""
        except zstandard.ZstdError as error:
            raise EntropyError(f"a plane is damaged: {error}") from error
        if claimed != size or len(plane) != size:
            raise EntropyError(f"a plane is damaged: it does not hold {size} bytes")
        return plane


def zero_order_entropy(values: np.ndarray) -> float:
    """Entropy in bits per element of the array's own histogram: what no coder that treats elements alike and
    independently, and is told that histogram for nothing, can beat. Of an empty array 0."""
    if values.size == 0:
        return 0.0
    counts = np.unique(values, return_counts=True)[1]
    shares = counts / values.size
    return float(-(shares * np.log2(shares)).sum())
