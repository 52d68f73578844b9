"""How large a level-0 pixel is. Promise: never a guess; whatever is missing, absurd or contradicted is refused by name.

The order: the user's own value, then what the file says, of which the first stated counts even where it is broken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pathology.errors import Reason, SlideError
from pathology.readers.tiff import Directory

MPP_MIN, MPP_MAX = 0.05, 10.0  # um/px; 72 dpi, which many programs write unasked, would be 352.8
MAX_ANISOTROPY = 1.05
MAX_DIFFERENCE = 0.10

UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}  # TIFF's ResolutionUnit: inch, cm
UM_PER_OME_UNIT = {"\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3}
UNIT_NAMES = {"inch": 2, "centimeter": 3}

# Properties that state um/px themselves, y before x. OpenSlide makes its own mpp of these and of lengths such as Hamamatsu's;
# they count where it made none of them, because it could not read the number.
VENDOR_FIELDS = (
    ("aperio.MPP", "aperio.MPP"),
    ("mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_Y", "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X"),
    ("ventana.ScanRes", "ventana.ScanRes"),
)

# All of OpenSlide's properties that are looked at here.
PROPERTIES = frozenset(
    (
        "openslide.mpp-x",
        "openslide.mpp-y",
        "tiff.XResolution",
        "tiff.YResolution",
        "tiff.ResolutionUnit",
        *(name for fields in VENDOR_FIELDS for name in fields),
    )
)


@dataclass(frozen=True, slots=True)
class Claim:
    """um/px as a file states it, unchecked: text or number, None where an axis is not stated; `source` says where."""

    y: str | float | None
    x: str | float | None
    source: str


def openslide_claim(properties: Mapping[str, str]) -> Claim | None:
    """The first resolution that OpenSlide's properties state."""
    for y, x in VENDOR_FIELDS:
        # OpenSlide takes "0,499" for 0.499; a comma may as well part thousands, so the text itself is what counts.
        if y in properties and not _number(properties[y]) > -math.inf:
            return Claim(properties[y], properties.get(x), x)
    y, x = "openslide.mpp-y", "openslide.mpp-x"
    if y in properties or x in properties:
        return Claim(properties.get(y), properties.get(x), "openslide.mpp")
    for y, x in VENDOR_FIELDS:
        if y in properties or x in properties:
            return Claim(properties.get(y), properties.get(x), x)
    per_unit_y, per_unit_x = (_number(properties.get(f"tiff.{axis}Resolution", "nan")) for axis in "YX")
    return tags_claim(per_unit_y, per_unit_x, UNIT_NAMES.get(properties.get("tiff.ResolutionUnit", "inch"), 1))


def directory_claim(directory: Directory) -> Claim | None:
    """The resolution that a TIFF directory's tags state."""
    y, x, unit = directory.resolution
    return tags_claim(math.nan if y is None else y, math.nan if x is None else x, unit)


def ome_claim(text: str) -> Claim | None:
    """The PhysicalSize of the first image in a text of OME-XML; None where it states none, or not in um, nm or mm."""
    # Taken by pattern: an XML parser would also follow whatever entities a stranger's file defines.
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", text)
    if pixels is None:
        return None
    stated = dict(re.findall(r'PhysicalSize([XY](?:Unit)?)\s*=\s*"([^"]*)"', pixels.group()))
    sizes: list[str | float | None] = []
    for axis in "YX":
        scale = UM_PER_OME_UNIT.get(stated.get(f"{axis}Unit", "\u00b5m"))
        size = stated.get(axis)
        sizes.append(None if size is None or scale is None else size if scale == 1 else _number(size) * scale)
    return None if sizes == [None, None] else Claim(sizes[0], sizes[1], "OME PhysicalSize")


def tags_claim(per_unit_y: float, per_unit_x: float, unit: int) -> Claim | None:
    """The resolution of px per unit; None where the unit has no length or no number is given."""
    if unit not in UM_PER_UNIT or not (per_unit_y > 0 or per_unit_x > 0):
        return None
    y, x = (UM_PER_UNIT[unit] / v if v > 0 else None for v in (per_unit_y, per_unit_x))
    return Claim(y, x, "tiff tags")


def choose_mpp(name: str, claim: Claim | None, option: float | None, *, force: bool) -> tuple[float, str]:
    """(um per level-0 px, where it comes from). `name` is for messages.

    Raises SlideError: NO_MPP where nothing is stated, BAD_MPP where what is stated cannot be so, or where the option differs
    from a sound statement of the file by more than 10 % and is not forced.
    """
    if option is None:
        if claim is None:
            message = f"{name} states no resolution; give its um per pixel with --slide-mpp"
            raise SlideError(Reason.NO_MPP, message)
        stated = _sound(claim)
        if isinstance(stated, str):
            message = f"{name}: {stated} ({claim.source}); give the right um per pixel with --slide-mpp"
            raise SlideError(Reason.BAD_MPP, message)
        return stated, claim.source
    if not MPP_MIN <= option <= MPP_MAX:
        message = f"{name}: --slide-mpp {option:g} um/px is outside {MPP_MIN:g} to {MPP_MAX:g}; give um per level-0 pixel"
        raise SlideError(Reason.BAD_MPP, message)
    own = None if claim is None else _sound(claim)
    if isinstance(own, float) and abs(option - own) > MAX_DIFFERENCE * own and not force:
        message = (
            f"{name}: --slide-mpp {option:g} differs by {abs(option / own - 1):.0%} from the file's own {own:g} um/px; "
            "leave it out, or add --force to use it all the same"
        )
        raise SlideError(Reason.BAD_MPP, message)
    return float(option), "option"


def _sound(claim: Claim) -> float | str:
    """The claim's mean um/px, or what is wrong with it."""
    y, x = _number(claim.y), _number(claim.x)
    if not (math.isfinite(y) and math.isfinite(x)):
        return f"its resolution, {_shown(claim.x)} by {_shown(claim.y)}, is not a number"
    if not all(MPP_MIN <= v <= MPP_MAX for v in (y, x)):
        return f"its resolution, {x:g} by {y:g} um/px, is outside {MPP_MIN:g} to {MPP_MAX:g}"
    if max(y, x) > MAX_ANISOTROPY * min(y, x):
        return f"its pixels are {x:g} by {y:g} um, not square"
    return y if y == x else (y + x) / 2


def _shown(value: str | float | None) -> str:
    """For messages: what looks like a number as it stands; other text is not repeated, since it may be anything."""
    if value is None:
        return "nothing"
    if not isinstance(value, str):
        return f"{value:g}"
    return repr(value) if re.fullmatch(r"[-+\d.,' eE]{1,40}|[-+]?(?i:nan|inf|infinity)", value) else "other text"


def _number(value: str | float | None) -> float:
    """NaN for what is no plain decimal number."""
    try:
        return math.nan if value is None or "_" in str(value) else float(value)
    except ValueError:
        return math.nan
