"""One compressed tile of a TIFF -> its pixels. The only import of imagecodecs, simplejpeg and OpenCV.

Promise: nothing is decoded before the tile's own header was seen to claim the size that the TIFF states, and whatever
cannot be decoded is `Corrupt`, never pixels. JPEG is decoded in the colour space that the TIFF names: Aperio's RGB tiles
carry no mark of theirs.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

try:  # gives the same mean of 2 x 2 as Pillow, (sum + 2) >> 2, in a third of the time; other factors it rounds otherwise
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]

Pixels = NDArray[np.uint8]
Data = bytes | memoryview  # a tile as it lies in the file

VERSION = imagecodecs.__version__

NONE, LZW, JPEG, DEFLATE, OLD_DEFLATE = 1, 5, 7, 8, 32946
APERIO_YCBCR, APERIO_RGB, JPEG2000, WEBP, OLD_WEBP = 33003, 33005, 34712, 50001, 34927
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, YCBCR = 0, 1, 2, 6  # TIFF's PhotometricInterpretation
DIFFERENCES = 2  # TIFF's Predictor: each sample is stored as the difference to its left neighbour

FRAME_BYTES = 10  # of a JPEG's frame header, up to the number of components
END_OF_IMAGE = b"\xff\xd9"
# How a JPEG begins whose colour space Adobe's mark names.
ADOBE_RGB, ADOBE_YCBCR = (b"\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + space for space in (b"\x00", b"\x01"))
SCALED = (2, 4, 8)  # factors at which libjpeg's inverse DCT can give a smaller picture

# As plain numbers: from its enumeration imagecodecs takes a colour space in longer than from these.
GREY, OF_THREE, OF_FOUR = (
    int(space) for space in (imagecodecs.JPEG8.CS.GRAYSCALE, imagecodecs.JPEG8.CS.RGB, imagecodecs.JPEG8.CS.EXT_RGBX)
)
SPACES = {RGB: OF_THREE, YCBCR: int(imagecodecs.JPEG8.CS.YCbCr), WHITE_IS_ZERO: GREY, BLACK_IS_ZERO: GREY}

SHAPES_KEPT = 4
# Tiles whose memory is one: no more, since all of it is kept as long as any of them is.
MADE_AT_ONCE = 8
# What libjpeg-turbo writes at a time, and where in it pixels begin; rows are multiples of 8 bytes, and so begin off it too.
VECTOR_BYTES, OFF_VECTOR = 32, 4


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.pixels: dict[tuple[int, int], Pixels] = {}


_scratch = _Scratch()


class Corrupt(Exception):
    """A tile whose pixels cannot be had; the message says why."""


@dataclass(frozen=True, slots=True)
class TileCodec:
    """How the tiles of one level are compressed.

    shape        (height, width) of every tile, px
    samples      1 (grey) or 3
    tables       JPEG tables that all tiles share; b"" where each has its own
    header       what has to stand before each tile's bytes to make a JPEG of them (NDPI), or b""
    """

    compression: int
    photometric: int
    shape: tuple[int, int]
    samples: int
    predictor: int = 1
    tables: bytes = b""
    header: bytes = b""
    # What a tile that was found good begins with, up to the end of the size it claims: another that begins so claims the same.
    _seen: list[bytes] = field(default_factory=list, compare=False, repr=False)

    def decode_all(self, data: Sequence[Data], factor: int, fast: bool) -> list[Pixels | Corrupt]:
        """The tiles, reduced by `factor`: by `decode_scaled` where it is `fast` and can, else by `decode_mean`.

        In place of one that cannot be decoded the error, without its traceback, which holds the frames that decoded.
        """
        reduce = self.decode_scaled if fast and self.scales(factor) else self.decode_mean
        tiles: list[Pixels | Corrupt] = []
        for tile, room in zip(data, self._rooms(len(data), factor), strict=True):
            try:
                tiles.append(self.decode(tile, room) if factor == 1 else reduce(tile, factor, room))
            except Corrupt as error:
                tiles.append(Corrupt(str(error)))
        return tiles

    def _rooms(self, count: int, factor: int) -> Iterator[Pixels | None]:
        """Room for the pixels of so many tiles, several made at once; None for those that are not written where it is told."""
        if self.compression != JPEG or self.samples != 3:
            yield from [None] * count
            return
        for first in range(0, count, MADE_AT_ONCE):
            yield from self._room(factor, min(MADE_AT_ONCE, count - first))

    def _room(self, factor: int = 1, *count: int) -> Pixels:
        return empty_pixels((*count, self.shape[0] // factor, self.shape[1] // factor, 3))

    def decode(self, data: Data, room: Pixels | None = None) -> Pixels:
        """(height, width, 3) uint8 RGB of a tile, in `room` where its decoder can write there. Raises Corrupt."""
        self._check(data)
        if self.compression == JPEG and self.samples == 3:
            return self._jpeg(data, OF_THREE, self._room() if room is None else room)
        try:
            pixels = np.asarray(DECODERS[self.compression](self, bytes(data)))
        except (RuntimeError, ValueError) as error:  # each codec of imagecodecs has a RuntimeError of its own
            raise Corrupt(str(error)) from error
        if pixels.dtype != np.uint8 or pixels.size != self.shape[0] * self.shape[1] * self.samples:
            raise Corrupt(f"it holds {pixels.shape} of {pixels.dtype}, not {self.samples} x 8 bits of {self.shape} px")
        if self.predictor == DIFFERENCES:
            pixels = imagecodecs.delta_decode(pixels.reshape(*self.shape, self.samples), axis=1)
        if self.samples == 3:
            return pixels.reshape(*self.shape, 3)
        grey = pixels.reshape(*self.shape, 1)
        return np.repeat(255 - grey if self.photometric == WHITE_IS_ZERO else grey, 3, axis=2)

    def decode_mean(self, data: Data, factor: int, room: Pixels | None = None) -> Pixels:
        """(height / factor, width / factor, 3) uint8: means of factor x factor pixels, rounded once. As `decode`."""
        h, w = self.shape
        if self.compression == JPEG and self.samples == 3:
            # Four bytes a pixel are what Pillow computes on, so it takes them where they lie (three it would copy), and what
            # both JPEG and OpenCV are quickest with.
            self._check(data)
            four = self._jpeg(data, OF_FOUR, _four_bytes(self.shape))
            if factor == 2 and cv2 is not None:
                # Into arrays that are there: OpenCV takes a third of the time more where it makes its own.
                half = _four_bytes((h // 2, w // 2))
                smaller = cv2.resize(four, (w // 2, h // 2), dst=half, interpolation=cv2.INTER_AREA)
                return np.asarray(cv2.cvtColor(smaller, cv2.COLOR_RGBA2RGB, dst=self._room(2) if room is None else room))
            image = Image.frombuffer("RGBX", (w, h), four, "raw", "RGBX", 0, 1)
        else:
            image = Image.fromarray(self.decode(data))
        return np.frombuffer(image.reduce(factor).tobytes("raw", "RGB"), np.uint8).reshape(h // factor, w // factor, 3)

    def scales(self, factor: int) -> bool:
        """Whether `decode_scaled` can give this factor."""
        whole = self.shape[0] % factor == self.shape[1] % factor == 0
        return self.compression == JPEG and self.samples == 3 and not self.header and factor in SCALED and whole

    def decode_scaled(self, data: Data, factor: int, room: Pixels | None = None) -> Pixels:
        """(height / factor, width / factor, 3) uint8 by JPEG's own scaled inverse DCT: near the mean. As `decode`.

        The mean itself of a tile that ends early: its decoder here refuses what the other one, like OpenSlide, shows.
        """
        self._check(data)
        h, w = self.shape[0] // factor, self.shape[1] // factor
        room = self._room(factor) if room is None else room
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(
                self._whole_jpeg(data), "RGB", min_height=h, min_width=w, min_factor=factor, buffer=room
            )
        except ValueError:
            return self.decode_mean(data, factor, room)
        if pixels.shape != (h, w, 3):
            raise Corrupt(f"at 1/{factor} it is {pixels.shape[:2]} px, not {(h, w)}")
        return pixels

    def _check(self, data: Data) -> None:
        """Refuse a tile whose own header claims another size: a decoder would believe it and ask for the memory."""
        if self.compression not in SIZES or (self._seen and bytes(data[: len(self._seen[0])]) == self._seen[0]):
            return
        claimed = self._claim(data)
        if claimed[:2] != self.shape or (len(claimed) > 2 and claimed[2] != self.samples):
            raise Corrupt(f"its header claims {claimed}, the slide's tiles are {(*self.shape, self.samples)}")
        if self.compression == JPEG and not self.header:
            self._seen[:] = [bytes(data[: _jpeg_frame(data) + FRAME_BYTES])]

    def claimed(self, data: Data) -> tuple[int, ...] | None:
        """(height, width, ...) that a tile's own header claims; None where it has none that can be read."""
        try:
            return self._claim(data) if self.compression in SIZES else None
        except Corrupt:
            return None

    def _claim(self, data: Data) -> tuple[int, ...]:
        try:
            return SIZES[self.compression](self.header or data)
        except (IndexError, struct.error) as error:
            raise Corrupt("its header ends early") from error

    def _jpeg(self, data: Data, space: int, out: Pixels) -> Pixels:
        try:
            imagecodecs.jpeg8_decode(
                b"".join((self.header, data, END_OF_IMAGE)) if self.header else data,  # type: ignore[arg-type]  # any buffer will do
                tables=self.tables or None,
                colorspace=SPACES[self.photometric],
                outcolorspace=space,
                out=out,
            )
        except (RuntimeError, ValueError) as error:
            raise Corrupt(str(error)) from error
        return out

    def _whole_jpeg(self, data: Data) -> bytes:
        """The tile as a JPEG that stands alone: with its tables, and Adobe's mark that names the colour space."""
        at = 2
        while data[at : at + 2] == b"\xff\xe0":  # JFIF's mark would overrule Adobe's
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        return b"".join((ADOBE_YCBCR if self.photometric == YCBCR else ADOBE_RGB, self.tables[2:-2], data[at:]))


def _four_bytes(shape: tuple[int, int]) -> Pixels:
    """An array of four bytes a pixel that this thread uses again and again, one for each of the last few shapes."""
    kept = _scratch.pixels
    if shape not in kept:
        if len(kept) == SHAPES_KEPT:
            kept.clear()
        kept[shape] = empty_pixels((*shape, 4))
    return kept[shape]


def empty_pixels(shape: tuple[int, ...]) -> Pixels:
    """Room for tiles, (..., height, width, samples) uint8, whose rows begin at no multiple of 32 bytes if those of a tile are
    multiples of 8 bytes long.

    Where they do, libjpeg-turbo writes them past the processor's caches, and whoever reads them next waits for memory: a tenth
    to a quarter of the time of decoding.
    """
    memory = np.empty(math.prod(shape) + VECTOR_BYTES, np.uint8)
    return np.ndarray(shape, np.uint8, memory.data, (OFF_VECTOR - memory.ctypes.data) % VECTOR_BYTES)


def _jpeg_size(data: Data) -> tuple[int, ...]:
    """(height, width, components) of a JPEG's frame header (ITU-T T.81, B.2.2)."""
    height, width, components = struct.unpack_from(">HHB", data, _jpeg_frame(data) + 5)
    return height, width, components


def _jpeg_frame(data: Data) -> int:
    """Where a JPEG's frame header begins."""
    if data[:2] != b"\xff\xd8":
        raise Corrupt("it is no JPEG")
    at = 2
    while True:
        while data[at] == data[at + 1] == 0xFF:  # fill bytes
            at += 1
        if data[at] != 0xFF:
            raise Corrupt("its JPEG header is damaged")
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return at
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def _jpeg2000_size(data: Data) -> tuple[int, ...]:
    """(height, width, components) of a codestream's SIZ segment (ITU-T T.800, A.5.1), also inside a JP2 file."""
    at = bytes(data[:4096]).find(b"\xff\x4f\xff\x51")
    if at < 0:
        raise Corrupt("it is no JPEG 2000")
    x1, y1, x0, y0 = struct.unpack_from(">IIII", data, at + 8)
    (components,) = struct.unpack_from(">H", data, at + 40)
    return y1 - y0, x1 - x0, components


def _webp_size(data: Data) -> tuple[int, ...]:
    """(height, width) of a WebP file (RFC 9649)."""
    kind = bytes(data[12:16])
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or kind not in (b"VP8 ", b"VP8L", b"VP8X"):
        raise Corrupt("it is no WebP")
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1


def _raw(codec: TileCodec, data: bytes) -> Pixels:
    return np.frombuffer(data, np.uint8)


def _deflate(codec: TileCodec, data: bytes) -> Pixels:
    # Into a buffer of the size that is due: a bomb ends there.
    return np.frombuffer(imagecodecs.zlib_decode(data, out=codec.shape[0] * codec.shape[1] * codec.samples), np.uint8)


def _lzw(codec: TileCodec, data: bytes) -> Pixels:
    return np.frombuffer(imagecodecs.lzw_decode(data, out=codec.shape[0] * codec.shape[1] * codec.samples), np.uint8)


def _grey_jpeg(codec: TileCodec, data: bytes) -> Pixels:
    return codec._jpeg(data, GREY, np.empty(codec.shape, np.uint8))


def _jpeg2000(codec: TileCodec, data: bytes) -> Pixels:
    pixels: Pixels = imagecodecs.jpeg2k_decode(data)
    return pixels


def _aperio_ycbcr(codec: TileCodec, data: bytes) -> Pixels:
    return ycbcr_to_rgb(_jpeg2000(codec, data))


def _webp(codec: TileCodec, data: bytes) -> Pixels:
    pixels: Pixels = imagecodecs.webp_decode(data, hasalpha=False)
    return pixels


def ycbcr_to_rgb(pixels: Pixels) -> Pixels:
    """(H, W, 3) uint8 YCbCr -> RGB after JFIF (ITU-T T.871), in the 16-bit fixed point of libjpeg and OpenSlide."""
    y = pixels[..., 0].astype(np.int32)
    cb, cr = pixels[..., 1].astype(np.int32) - 128, pixels[..., 2].astype(np.int32) - 128
    half = 1 << 15
    red = y + ((91881 * cr + half) >> 16)  # 1.402
    green = y + ((-22554 * cb - 46802 * cr + half) >> 16)  # 0.34414, 0.71414
    blue = y + ((116130 * cb + half) >> 16)  # 1.772
    return np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)


SIZES: Mapping[int, Callable[[Data], tuple[int, ...]]] = {
    JPEG: _jpeg_size,
    JPEG2000: _jpeg2000_size,
    APERIO_YCBCR: _jpeg2000_size,
    APERIO_RGB: _jpeg2000_size,
    WEBP: _webp_size,
    OLD_WEBP: _webp_size,
}
DECODERS: Mapping[int, Callable[[TileCodec, bytes], Pixels]] = {
    NONE: _raw,
    LZW: _lzw,
    DEFLATE: _deflate,
    OLD_DEFLATE: _deflate,
    JPEG: _grey_jpeg,
    JPEG2000: _jpeg2000,
    APERIO_YCBCR: _aperio_ycbcr,
    APERIO_RGB: _jpeg2000,
    WEBP: _webp,
    OLD_WEBP: _webp,
}
