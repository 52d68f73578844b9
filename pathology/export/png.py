"""Heatmaps as pictures for people.

Promise: a heatmap pixel is a square exactly where its frame says, never smoothed over its borders; NaN shows the slide.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pathology.errors import UsageError
from pathology.export.colormap import colorize, lookup_table
from pathology.geometry import HeatmapFrame
from pathology.model import ModelSpec
from pathology.slide import Slide
from pathology.thumbnail import GREY, INK, LARGEST_PX, fit_text, font, picture, png_bytes

# The longer side of the slide in an overlay, px; small slides are enlarged to the second.
PICTURE_PX = LARGEST_PX
SMALL_PICTURE_PX = 900

# The page around it, px.
MARGIN = 20
HEADER = 58
FOOTER = 92
LEAST_PAGE = 760

# Share of colour over the slide, which is grey there: pink tissue would turn one score into many colours, none on the bar.
OPACITY = 0.6

# A scale bar is the longest of 1, 2, 5, 10 ... um that fits this many px.
SCALE_BAR_PX = 200
COLOR_BAR_PX = 256

NOTICE = "Research use only"


def overlay_l0_pixel(l0_shape: tuple[int, int]) -> float:
    """Level-0 px per pixel of the overlay. Give `overlay_png` the coarsest heatmap level that is at least this fine.

    A finer one isn't averaged, only looked up at pixel centres; a coarser one shows larger squares than there are.
    """
    longest = max(l0_shape)
    return longest / min(max(longest, SMALL_PICTURE_PX), PICTURE_PX)


def overlay_png(slide: Slide, heatmap: NDArray[np.float32], frame: HeatmapFrame, spec: ModelSpec, class_index: int) -> bytes:
    """A PNG page, at most 1600 px wide: slide with one class's heatmap over it, colour bar, scale bar, names, resolutions.

    heatmap  (h, w) float32 scores of class `class_index`, NaN where nothing was predicted
    frame    where the heatmap's pixels lie; of the very pyramid level that is given (see `overlay_l0_pixel`)

    Colours run over `spec.display`; scores outside it take the colour of its nearer end.
    """
    if heatmap.shape != frame.shape:
        raise UsageError(
            f"heatmap of {heatmap.shape} px with a frame of {frame.shape}: give the frame of the same pyramid level"
        )
    if not 0 <= class_index < len(spec.classes):
        raise UsageError(f"class {class_index} does not exist; model {spec.name} has classes 0 to {len(spec.classes) - 1}")
    image = _blend(picture(slide, SMALL_PICTURE_PX, PICTURE_PX), slide.info.shape, heatmap, frame, spec)
    page = Image.new("RGB", (max(LEAST_PAGE, image.width + 2 * MARGIN), image.height + HEADER + FOOTER), "white")
    left = (page.width - image.width) // 2
    page.paste(image, (left, HEADER))
    draw = ImageDraw.Draw(page)
    draw.rectangle((left - 1, HEADER - 1, left + image.width, HEADER + image.height), outline=(200, 200, 200))
    _header(draw, page.width, spec, class_index)
    top = HEADER + image.height + 16
    _scale_bar(draw, top, slide.info.mpp * slide.info.shape[1] / image.width)
    _color_bar(page, draw, top, spec)
    resolution = f"slide {slide.info.mpp:.4g} um/px   model {spec.mpp:.4g} um/px   heatmap {frame.mpp:.4g} um/px"
    _footer(draw, page.width, top + 52, resolution)
    return png_bytes(page)


def heatmap_png(heatmap: NDArray[np.float32], spec: ModelSpec) -> bytes:
    """An RGBA PNG of one class's (h, w) float32 heatmap: one pixel a heatmap pixel, NaN transparent.

    The picture is held in memory: give a pyramid level of a dense map of a whole slide.
    """
    return png_bytes(Image.fromarray(colorize(heatmap, *spec.display)))


def _blend(
    image: Image.Image, l0_shape: tuple[int, int], heatmap: NDArray[np.float32], frame: HeatmapFrame, spec: ModelSpec
) -> Image.Image:
    """The slide's picture, tinted with the colour of the heatmap pixel in which each picture pixel's centre lies."""
    l0_y = (np.arange(image.height) + 0.5) * (l0_shape[0] / image.height)
    l0_x = (np.arange(image.width) + 0.5) * (l0_shape[1] / image.width)
    rows = np.floor((l0_y - frame.l0_origin) / frame.l0_pixel).astype(np.int64)
    cols = np.floor((l0_x - frame.l0_origin) / frame.l0_pixel).astype(np.int64)
    height, width = heatmap.shape
    outside = ((rows < 0) | (rows >= height))[:, None] | ((cols < 0) | (cols >= width))[None, :]
    # Coloured first: a heatmap has far fewer pixels than its picture.
    small = colorize(heatmap, *spec.display).view(np.uint32)[..., 0]
    rgba = small.take(np.clip(rows, 0, height - 1), axis=0).take(np.clip(cols, 0, width - 1), axis=1)
    rgba[outside] = 0
    colored = Image.fromarray(rgba.view(np.uint8).reshape(*rgba.shape, 4))
    tinted = Image.blend(image.convert("L").convert("RGB"), colored.convert("RGB"), OPACITY)
    return Image.composite(tinted, image, colored.getchannel("A"))


def _header(draw: ImageDraw.ImageDraw, width: int, spec: ModelSpec, class_index: int) -> None:
    title, small = font(24), font(15)
    model = fit_text(f"model {spec.name}", small, (width - 2 * MARGIN) // 2)
    at = width - MARGIN - small.getlength(model)
    draw.text((at, 40), model, GREY, small, anchor="ls")
    draw.text((MARGIN, 40), fit_text(spec.classes[class_index], title, int(at) - 2 * MARGIN), INK, title, anchor="ls")


def _scale_bar(draw: ImageDraw.ImageDraw, top: int, um_per_px: float) -> None:
    length_um = nice_length(SCALE_BAR_PX * um_per_px)
    right = MARGIN + length_um / um_per_px
    draw.rectangle((MARGIN, top + 6, right, top + 11), fill=INK)
    draw.text((MARGIN, top + 20), f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} um", INK, font(15))


def nice_length(longest: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not longer."""
    decade = 10.0 ** math.floor(math.log10(longest))
    return max(step * decade for step in (1, 2, 5) if step * decade <= longest * (1 + 1e-9))


def _color_bar(page: Image.Image, draw: ImageDraw.ImageDraw, top: int, spec: ModelSpec) -> None:
    """The colour bar, right-aligned, as the colours look over white glass."""
    face = font(15)
    low, high = (f"{value:g}" for value in spec.display)
    units = spec.units or ("probability" if spec.scores == "probability" else "score")
    right = page.width - MARGIN
    left = right - COLOR_BAR_PX
    over_glass = np.round(lookup_table() * OPACITY + 255 * (1 - OPACITY)).astype(np.uint8)
    bar = np.broadcast_to(over_glass, (16, 256, 3))
    page.paste(Image.fromarray(np.ascontiguousarray(bar)), (left, top))
    draw.rectangle((left - 1, top - 1, right, top + 16), outline=GREY)
    draw.text((left, top + 20), low, INK, face)
    draw.text((right, top + 20), high, INK, face, anchor="ra")
    room = COLOR_BAR_PX - int(face.getlength(low) + face.getlength(high)) - 16
    draw.text(((left + right) / 2, top + 20), fit_text(units, face, room), INK, face, anchor="ma")


def _footer(draw: ImageDraw.ImageDraw, width: int, top: int, resolution: str) -> None:
    small = font(13)
    draw.text((MARGIN, top), resolution, GREY, small)
    draw.text((width - MARGIN, top), NOTICE, GREY, small, anchor="ra")
