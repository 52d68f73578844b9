"""Writer of small DICOM slides for tests. Promise: OpenSlide opens them, and equal arguments give equal bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import imagecodecs
import numpy as np

from pathology.readers.dicom import WHOLE_SLIDE
from tests.slides import Pixels, pyramid

TILE_PX = 128
EXPLICIT, JPEG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.50"


def element(group: int, number: int, kind: str, value: bytes | str | int | Sequence[bytes]) -> bytes:
    """A data element in explicit VR, little endian; a sequence of items where `kind` is SQ."""
    if isinstance(value, int):
        value = struct.pack("<I" if kind == "UL" else "<H", value)
    elif isinstance(value, str):
        value = value.encode()
    elif not isinstance(value, bytes):
        value = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item for item in value)
    value += (b"\0" if kind in ("UI", "OB") else b" ") * (len(value) % 2)
    head = struct.pack("<HH", group, number) + kind.encode()
    if kind in ("OB", "SQ", "UN"):
        return head + struct.pack("<HI", 0, len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def write_instance(
    path: Path,
    series: str,
    uid: str,
    pixels: Pixels,
    *,
    image_type: str = "ORIGINAL\\PRIMARY\\VOLUME\\NONE",
    mpp: float = 0.5,
    sop_class: str = WHOLE_SLIDE,
    jpeg: bool = False,
    part: tuple[int, int] | None = None,
    private: bytes = b"",
) -> Path:
    """One image of a slide, of frames of 128 x 128 px, as raw RGB or as JPEG.

    part     (number from 0, count): only these frames, of an image that is split into files
    private  elements that stand before those that are wanted
    """
    height, width = pixels.shape[:2]
    down, across = -(-height // TILE_PX), -(-width // TILE_PX)
    padded = np.pad(pixels, ((0, down * TILE_PX - height), (0, across * TILE_PX - width), (0, 0)), mode="edge")
    frames = [
        np.ascontiguousarray(padded[y : y + TILE_PX, x : x + TILE_PX])
        for y in range(0, down * TILE_PX, TILE_PX)
        for x in range(0, across * TILE_PX, TILE_PX)
    ]
    split = b""
    if part is not None:
        number, count = part
        share = -(-len(frames) // count)
        first = number * share
        frames = frames[first : first + share]
        split = element(0x0020, 0x0242, "UI", uid) + element(0x0020, 0x9161, "UI", f"{uid}.9")
        split += element(0x0020, 0x9162, "US", number + 1) + element(0x0020, 0x9163, "US", count)
        split += element(0x0020, 0x9228, "UL", first)
    uid = uid if part is None else f"{uid}.{part[0] + 1}"
    meta = b"".join(
        (
            element(0x0002, 0x0001, "OB", b"\0\1"),
            element(0x0002, 0x0002, "UI", sop_class),
            element(0x0002, 0x0003, "UI", uid),
            element(0x0002, 0x0010, "UI", JPEG if jpeg else EXPLICIT),
            element(0x0002, 0x0012, "UI", "1.2.3"),
        )
    )
    spacing = element(0x0028, 0x0030, "DS", f"{mpp / 1000:.7g}\\{mpp / 1000:.7g}")
    data = b"".join(
        (
            element(0x0008, 0x0008, "CS", image_type),
            element(0x0008, 0x0016, "UI", sop_class),
            element(0x0008, 0x0018, "UI", uid),
            element(0x0008, 0x0060, "CS", "SM"),
            private,
            element(0x0020, 0x000D, "UI", f"{series}.1"),
            element(0x0020, 0x000E, "UI", series),
            split,
            element(0x0020, 0x9311, "CS", "TILED_FULL"),
            element(0x0028, 0x0002, "US", 3),
            element(0x0028, 0x0004, "CS", "YBR_FULL_422" if jpeg else "RGB"),
            element(0x0028, 0x0006, "US", 0),
            element(0x0028, 0x0008, "IS", str(len(frames))),
            element(0x0028, 0x0010, "US", TILE_PX),
            element(0x0028, 0x0011, "US", TILE_PX),
            element(0x0028, 0x0100, "US", 8),
            element(0x0028, 0x0101, "US", 8),
            element(0x0028, 0x0102, "US", 7),
            element(0x0028, 0x0103, "US", 0),
            element(0x0048, 0x0006, "UL", width),
            element(0x0048, 0x0007, "UL", height),
            element(0x0048, 0x0303, "UL", 1),
            element(0x5200, 0x9229, "SQ", [element(0x0028, 0x9110, "SQ", [spacing])]),
            _compressed(frames) if jpeg else element(0x7FE0, 0x0010, "OB", b"".join(f.tobytes() for f in frames)),
        )
    )
    path.write_bytes(bytes(128) + b"DICM" + element(0x0002, 0x0000, "UL", len(meta)) + meta + data)
    return path


def write_series(
    folder: Path,
    series: str,
    pixels: Pixels,
    *,
    downsamples: Sequence[int] = (1, 4),
    mpp: float = 0.5,
    suffix: str = ".dcm",
    prefix: str = "",
    jpeg: bool = False,
    private: bytes = b"",
) -> list[Path]:
    """A slide of a file a level and its label; the first file is level 0. `private`: as for `write_instance`, in all files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (level, downsample) in enumerate(zip(pyramid(pixels, downsamples), downsamples, strict=True)):
        kind = "DERIVED\\PRIMARY\\VOLUME\\RESAMPLED" if number else "ORIGINAL\\PRIMARY\\VOLUME\\NONE"
        path = folder / f"{prefix}{number}{suffix}"
        uid, side = f"{series}.{number + 10}", mpp * downsample
        write_instance(path, series, uid, level, image_type=kind, mpp=side, jpeg=jpeg, private=private)
        paths.append(path)
    label = folder / f"{prefix}label{suffix}"
    kind = "ORIGINAL\\PRIMARY\\LABEL\\NONE"
    picture = pixels[:128, :128]
    return [*paths, write_instance(label, series, f"{series}.2", picture, image_type=kind, jpeg=jpeg, private=private)]


def _compressed(frames: Sequence[Pixels]) -> bytes:
    """Pixel data of one JPEG a frame, in items behind an empty offset table."""
    items = [b"", *(imagecodecs.jpeg8_encode(f, level=90, outcolorspace="YCBCR", subsampling="422") for f in frames)]
    body = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(i) + len(i) % 2) + i + b"\0" * (len(i) % 2) for i in items)
    return struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF) + body + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
