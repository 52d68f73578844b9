"""A job's slide as this process has it: open, with its grid, tissue, stains and plan, and what its result is keyed by.

Promise: each is found once as long as the file stays the same, and is a function of slide and job alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from pathology.areas import file_sha256, read_tissue, within
from pathology.decide import doubt
from pathology.encoding import choose_encoding
from pathology.errors import SlideError
from pathology.faults import share_fault
from pathology.grid import TileGrid
from pathology.job import OF_A_FILE, Job, key_of
from pathology.memory import CACHE_SHARE
from pathology.model import ModelSpec
from pathology.models import load_spec
from pathology.models.pool import pooled_spec
from pathology.outline import polygons
from pathology.plan import Plan, make_plan
from pathology.pulse import under_way
from pathology.readers import open_slide
from pathology.slide import Slide
from pathology.staging import slide_path
from pathology.stain import VERSION as STAIN_VERSION
from pathology.stain import Stains, fit_stains, parameters
from pathology.tissue import METHODS, TissueMask, find_tissue, tissue_geojson, tissue_png

KEPT_SLIDES = 4
# Of a card's fields those that came later: where they say nothing, results have the keys that they had without them.
LATER = ("margin_px", "features", "detections", "stain")

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Area:
    """Where a job looks: how tissue is found, or the sha256 of its file, and that of the region of interest ("": none)."""

    tissue: str
    roi: str

    def fields(self) -> dict[str, str]:
        """Its part of a result's key."""
        return {"tissue": self.tissue} | ({"roi": self.roi} if self.roi else {})


class _Kept:
    """The open slides of this process, and what was found of them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.slides: OrderedDict[tuple[object, ...], Slide] = OrderedDict()
        self.tissue: WeakKeyDictionary[Slide, dict[Area, TissueMask]] = WeakKeyDictionary()
        self.stains: WeakKeyDictionary[Slide, dict[Area, Stains]] = WeakKeyDictionary()
        self.tissue_files: WeakKeyDictionary[Slide, dict[Area, tuple[bytes, bytes]]] = WeakKeyDictionary()
        self.grids: OrderedDict[Job, tuple[Slide, ModelSpec, TileGrid]] = OrderedDict()


_kept = _Kept()


def open_slide_of(job: Job) -> Slide:
    """The job's slide, opened once per process as long as the file stays the same."""
    path = slide_path(job)
    stamp: tuple[int, ...] = ()
    with suppress(OSError), under_way("read"):
        state = path.stat()
        stamp = (state.st_ino, state.st_size, state.st_mtime_ns)
    name = (path, job.slide_mpp, job.force, job.reader, job.fast_decode, *stamp)
    with _kept.lock:
        if name in _kept.slides:
            _kept.slides.move_to_end(name)
            return _kept.slides[name]
    try:
        with under_way("read"):
            slide = open_slide(
                path,
                job.slide_mpp,
                force=job.force,
                reader=job.reader,
                fast_decode=job.fast_decode,
                cache_bytes=job.memory // CACHE_SHARE,
            )
    except SlideError as error:
        fault = share_fault(error, path, Path(job.root))
        raise (fault or error) from error.__cause__
    with _kept.lock:
        # Closed when the last region that uses it lets go, not here.
        keep(_kept.slides, name, slide)
    return slide


def tiled(job: Job, again: bool = False) -> tuple[Slide, ModelSpec, TileGrid]:
    """The job's slide, card and grid. `again`: after a look whether the file is still the same."""
    with _kept.lock:
        if not again and job in _kept.grids:
            return _kept.grids[job]
    slide, spec = open_slide_of(job), spec_of(job)
    grid = grid_of(job, slide, spec)
    with _kept.lock:
        keep(_kept.grids, job, (slide, spec, grid))
    return slide, spec, grid


def grid_of(job: Job, slide: Slide, spec: ModelSpec) -> TileGrid:
    """The grid of all tiles of the slide as the job's model sees it."""
    return TileGrid(slide.info.shape, slide.info.mpp, spec.mpp, spec.tile_px, job.stride_px(spec))


def plan_slide(job: Job, slide: Slide, spec: ModelSpec, together: Sequence[ModelSpec] = ()) -> tuple[TissueMask, Plan]:
    """Tissue and plan of a job, as any run of it would make them. `together`: the cards of all models that it reads for."""
    tissue = tissue_of(slide, job)
    plan = make_plan(
        grid_of(job, slide, spec),
        spec,
        tissue,
        min_tissue=job.min_tissue,
        blend=job.blend,
        block=job.block,
        memory=job.memory,
        together=together,
    )
    return tissue, plan


def tissue_of(slide: Slide, job: Job) -> TissueMask:
    """The slide's tissue as the job wants it, found once as long as it is open."""
    area, found = _area(job), _kept.tissue.setdefault(slide, {})
    if area not in found:
        method = job.tissue
        tissue = find_tissue(slide, method) if method in METHODS else read_tissue(Path(method), slide.info)
        found[area] = tissue if job.roi is None else within(tissue, Path(job.roi), slide.info)
    return found[area]


def tissue_files(slide: Slide, job: Job) -> tuple[bytes, bytes]:
    """The contents of `finish.TISSUE_FILES`, made once as long as the slide is open."""
    area, made = _area(job), _kept.tissue_files.setdefault(slide, {})
    if area not in made:
        tissue = tissue_of(slide, job)
        outline = polygons(tissue.mask)
        made[area] = tissue_geojson(tissue, outline, slide.info.fingerprint), tissue_png(slide, tissue, outline)
    return made[area]


def stains_of(slide: Slide, job: Job) -> Stains:
    """The slide's stains, fitted once as long as it is open; to all of its tissue, whatever part a job looks at."""
    whole = replace(job, roi=None)
    area, fitted = _area(whole), _kept.stains.setdefault(slide, {})
    if area not in fitted:
        fitted[area] = fit_stains(slide, tissue_of(slide, whole))
    return fitted[area]


def stain_of(job: Job) -> NDArray[np.float32] | None:
    """The parameters of the slide's stains as the job's model takes them; None where it takes none."""
    spec = spec_of(job)
    return parameters(spec.stain, stains_of(open_slide_of(job), job)) if spec.stain else None


def key_fields(job: Job, slide: Slide, spec: ModelSpec) -> dict[str, Any]:
    """What decides a result's values, and nothing else: JSON values under their option's name where there is one."""
    dtype = choose_encoding(spec, job.heatmap_dtype).dtype
    return {
        "schema": 1,
        "slide": slide.info.fingerprint,
        "slide_mpp": slide.info.mpp,
        "fast_decode": job.fast_decode,
        "reader": slide.info.reader.split()[0],
        "model": spec.sha256,
        "card": key_of({name: value for name, value in asdict(spec).items() if name not in LATER or value}),
        "tile_px": spec.tile_px,
        "stride_px": job.stride_px(spec),
        **_area(job).fields(),
        "min_tissue": job.min_tissue,
        "blend": job.blend if spec.output == "map" else "none",
        "precision": job.precision,
        "compile": job.compile,
        **({"doubt": width} if (width := doubt(job, spec)) else {}),
        **({} if dtype == "float32" else {"heatmap_dtype": dtype}),
        # The stains themselves follow from what is above and from how they are fitted.
        **({"stain": f"{spec.stain} {STAIN_VERSION}"} if spec.stain else {}),
    }


def key_fields_of(job: Job) -> dict[str, Any]:
    """`key_fields` of a job's slide and model."""
    return key_fields(job, open_slide_of(job), spec_of(job))


def _area(job: Job) -> Area:
    return Area(
        job.tissue if job.tissue in METHODS else f"{OF_A_FILE}{file_sha256(Path(job.tissue))}",
        "" if job.roi is None else file_sha256(Path(job.roi)),
    )


def spec_of(job: Job) -> ModelSpec:
    """The card of the job's model, which is loaded for it only where there is no other way."""
    if job.model not in cards:
        cards[job.model] = load_spec(job.model)
    return pooled_spec(cards[job.model], job.heatmap_mpp)


# Of models whose card was read, or that were loaded in this process; before their maps are pooled.
cards: dict[str, ModelSpec] = {}


def keep(kept: OrderedDict[K, V], name: K, value: V) -> None:
    """Put `value` among what is kept: the last `KEPT_SLIDES` of its kind."""
    kept[name] = value
    kept.move_to_end(name)
    while len(kept) > KEPT_SLIDES:
        kept.popitem(last=False)
