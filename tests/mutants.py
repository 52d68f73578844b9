"""Damaged files for tests: small slides of every kind that is read, and seeded changes to their headers.

Promise: equal seeds give equal bytes.
"""

from __future__ import annotations

import resource
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from pathology.errors import SlideError
from pathology.geometry import Box
from pathology.readers import open_slide
from tests.dicom_slides import write_series
from tests.slides import noise_pixels, pyramid, smooth_pixels, write_tiff

HEADER_BYTES = 700  # of a tile or of a file that is no TIFF
NUMBERS = (0, 1, 2, 3, 7, 8, 16, 255, 256, 4096, 65_535, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
MORE_BYTES = 2**30


@dataclass(frozen=True)
class Base:
    """A sound file, and the (place, bytes) of what its headers consist of."""

    content: bytes
    fields: tuple[tuple[int, int], ...]
    suffix: str


@dataclass(frozen=True)
class Opened:
    """What came of opening a file: "opens", "read", a reason, or what was raised that should not; seconds it took."""

    verdict: str
    seconds: float
    detail: str = ""


def bases(folder: Path) -> dict[str, Base]:
    """Slides of a few hundred pixels; written below `folder`."""
    made = {name: (_tiff if make is not _dicom else _plain)(make(folder)) for name, make in MAKERS.items()}
    assert len({len(base.content) for base in made.values()}) > 5
    return made


def mutate(base: Base, rng: np.random.Generator) -> bytes:
    """`base` with one to four changes in its headers, and now and then cut short."""
    content = bytearray(base.content)
    for _ in range(int(rng.integers(1, 5))):
        at, count = base.fields[int(rng.integers(len(base.fields)))]
        kind = int(rng.integers(6))
        if kind == 0:  # a bit
            content[at + int(rng.integers(count))] ^= 1 << int(rng.integers(8))
        elif kind == 1:  # a byte
            content[at + int(rng.integers(count))] = int(rng.integers(256))
        elif kind == 2:  # all of it
            content[at : at + count] = rng.bytes(count)
        elif kind == 3:  # another field
            other, length = base.fields[int(rng.integers(len(base.fields)))]
            content[at : at + min(count, length)] = base.content[other : other + min(count, length)]
        else:  # a number that means something
            width = min(count, int(rng.choice([1, 2, 4, 8])))
            near = (len(content), at, at - 8, *(place for place, _ in base.fields[:3]))
            number = int(rng.choice(near)) if kind == 5 else NUMBERS[int(rng.integers(len(NUMBERS)))]
            order = "big" if base.content[:2] == b"MM" else "little"
            content[at : at + width] = (number % 256**width).to_bytes(width, order)
    if rng.random() < 0.05:
        del content[int(rng.integers(len(content))) :]
    return bytes(content)


def limit_memory() -> int:
    """Let this process have `MORE_BYTES` beyond what it has; the bytes it may have."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MORE_BYTES, mapped + MORE_BYTES))
    return mapped + MORE_BYTES


def try_to_open(path: Path) -> Opened:
    """Open the file as `check` and `info` do, and say what came of it."""
    began = time.perf_counter()
    try:
        with open_slide(path, 0.5, force=True):
            verdict, detail = "opens", ""
    except SlideError as error:
        verdict, detail = str(error.reason), str(error)
    except Exception as error:
        verdict, detail = "raises", repr(error)
    return Opened(verdict, time.perf_counter() - began, detail)


def try_to_read(path: Path) -> Opened:
    """The same, and the first tile of every level."""
    began = time.perf_counter()
    try:
        with open_slide(path, 0.5, force=True) as slide:
            for level in range(len(slide.info.level_shapes)):
                slide.read(level, Box(0, 0, 64, 64))
            verdict, detail = "read", ""
    except SlideError as error:
        verdict, detail = str(error.reason), str(error)
    except Exception as error:
        verdict, detail = "raises", repr(error)
    return Opened(verdict, time.perf_counter() - began, detail)


def _tiff(path: Path) -> Base:
    """Fields: the header, and each tag's entry, value and the count before them; the first bytes of tiles."""
    content = path.read_bytes()
    fields = [(0, 4), (4, 4), (4, 12)]
    with tifffile.TiffFile(path) as tiff:
        wide = tiff.is_bigtiff
        entry = 20 if wide else 12
        for page in _pages(tiff):
            fields.append((page.offset, 8 if wide else 2))
            for tag in page.tags:
                fields += [(tag.offset, 2), (tag.offset + 2, 2), (tag.offset + 4, entry // 2 - 2), (tag.offset, entry)]
                fields.append((tag.valueoffset, max(1, min(tag.valuebytecount, HEADER_BYTES))))
            fields.append((tag.offset + entry, 8 if wide else 4))  # where the next directory lies
            fields.append((page.dataoffsets[0], min(page.databytecounts[0], 64)))
    return Base(content, tuple((at, count) for at, count in fields if at + count <= len(content)), path.suffix)


def _plain(path: Path) -> Base:
    content = path.read_bytes()
    fields = [(at, 8) for at in range(128, min(len(content) - 8, 128 + 2 * HEADER_BYTES), 4)]
    return Base(content, tuple(fields), path.suffix)


def _pages(tiff: tifffile.TiffFile) -> Iterator[tifffile.TiffPage]:
    for page in tiff.pages:
        yield page
        if page.pages is not None:
            yield from page.pages


def _aperio_jpeg(folder: Path) -> Path:
    levels = pyramid(smooth_pixels(384, 512), [1, 4])
    return write_tiff(folder / "jpeg.svs", levels, compression="jpeg", tile_px=64, label=levels[1][:30, :40])


def _jpeg2000(folder: Path) -> Path:
    pixels = smooth_pixels(192, 192)
    with tifffile.TiffWriter(folder / "jp2k.svs") as tiff:
        tiff.write(
            pixels,
            photometric="rgb",
            tile=(64, 64),
            compression="jpeg2000",
            description="Aperio Image Library v0\r\n192x192|MPP = 0.5",
            metadata=None,
        )
    return folder / "jp2k.svs"


def _big(folder: Path) -> Path:
    with tifffile.TiffWriter(folder / "big.tif", bigtiff=True) as tiff:
        for number, level in enumerate(pyramid(noise_pixels(300, 260), [1, 2])):
            tiff.write(
                level, photometric="rgb", tile=(64, 64), compression="deflate", subfiletype=int(number > 0), metadata=None
            )
    return folder / "big.tif"


def _big_endian(folder: Path) -> Path:
    path = folder / "motorola.tif"
    pixels = noise_pixels(150, 200)
    tifffile.imwrite(path, pixels, byteorder=">", photometric="rgb", tile=(64, 64), compression="lzw", metadata=None)
    return path


def _ome(folder: Path) -> Path:
    with tifffile.TiffWriter(folder / "s.ome.tif") as tiff:
        for number, level in enumerate(pyramid(noise_pixels(256, 384), [1, 2, 4])):
            tiff.write(
                level,
                tile=(64, 64),
                photometric="rgb",
                compression="deflate",
                subifds=2 if number == 0 else None,
                subfiletype=1 if number else 0,
                metadata={"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25} if number == 0 else None,
            )
    return folder / "s.ome.tif"


def _strips(folder: Path) -> Path:
    tifffile.imwrite(folder / "strips.tif", noise_pixels(90, 120), photometric="rgb", compression="lzw", rowsperstrip=16)
    return folder / "strips.tif"


def _pillows(folder: Path) -> Path:
    Image.fromarray(smooth_pixels(120, 90)).save(folder / "pillow.tif", compression="jpeg")
    return folder / "pillow.tif"


def _philips(folder: Path) -> Path:
    """As Philips' software names itself, with the least that OpenSlide wants."""
    attribute = '<Attribute Name="{}" Group="0x0028" Element="0x0030" PMSVR="IDoubleArray">{}</Attribute>'
    text = '<?xml version="1.0" ?><DataObject ObjectType="DPUfsImport">' + attribute.format(
        "DICOM_PIXEL_SPACING", '"0.0005" "0.0005"'
    )
    with tifffile.TiffWriter(folder / "philips.tif") as tiff:
        for number, level in enumerate(pyramid(smooth_pixels(256, 256), [1, 2])):
            tiff.write(
                level,
                tile=(64, 64),
                photometric="ycbcr",
                compression="jpeg",
                subsampling=(1, 1),
                software="Philips DP v1.0",
                description=f"{text}</DataObject>" if number == 0 else "level=1",
                subfiletype=int(number > 0),
                metadata=None,
            )
    return folder / "philips.tif"


def _dicom(folder: Path) -> Path:
    return write_series(folder / "series", "1.2.7", smooth_pixels(200, 200), downsamples=(1,), jpeg=True)[0]


MAKERS: dict[str, Callable[[Path], Path]] = {
    "aperio jpeg": _aperio_jpeg,
    "jpeg2000": _jpeg2000,
    "bigtiff deflate": _big,
    "big endian lzw": _big_endian,
    "ome": _ome,
    "strips": _strips,
    "pillow": _pillows,
    "philips": _philips,
    "dicom": _dicom,
}


def chain(path: Path, directories: int, tags: int) -> Path:
    """A TIFF of many directories one behind the other: a picture of 10 x 10 px each, and tags that nobody knows."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, 10) for tag in (256, 257, *range(40_000, 39_998 + tags)))
    step = 2 + len(entries) + 4
    content = bytearray(b"II*\0" + struct.pack("<II", 16, 0) + bytes(4))
    for k in range(directories):
        content += struct.pack("<H", tags) + entries
        content += struct.pack("<I", 16 + step * (k + 1) if k < directories - 1 else 0)
    path.write_bytes(content)
    return path
