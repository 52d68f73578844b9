"""One slide, one model: the request as names and numbers. Promise: picklable, hashable, and all a worker needs to begin."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pathology.encoding import Dtype
from pathology.errors import UsageError
from pathology.model import ModelSpec
from pathology.stitch import Blend

SCHEMA = 1
# Owner of work that nobody owns.
FREE = "free"
# In a key, what precedes the hash of the file that tissue was taken from.
OF_A_FILE = "file "

# Fields of a job that say where and how it runs rather than what it is.
NOT_ASKED = frozenset(("out", "stage", "stage_bytes", "overwrite", "strict", "columns", "owner"))

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
ReaderName = Literal["auto", "direct", "openslide", "pillow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to compute, where to, and how.

    slide        path of the slide
    slide_id     name of its folder in the output
    root         the folder or file that the user named, through which the slide was found
    model        reference for `load_model`
    out          output folder
    slide_mpp    um per level-0 px that overrides the file's own; `force` allows one that contradicts the file
    overlap      0: none; below 1: share of the tile; 1 and above: grid px
    min_tissue   share of a tile that must be tissue, 0..1
    tissue       how tissue is found: "otsu", "none", or a file of it (`areas.read_tissue`)
    roi          GeoJSON file of polygons outside which nothing is inferred; None: the whole slide
    blend        weights where dense answers overlap
    heatmap_mpp    um per pixel of dense maps, at most: pooled from the model's own; None: as it answers
    heatmap_dtype  how dense maps are stored; "auto": probabilities as uint8, values as float32
    block        strides a side of a region; None: as the plan sees fit
    on_bad_tile  a tile that cannot be decoded: "mask" leaves it NaN and the slide "partial", "fail" fails the slide
    device       "cpu", "cuda", "cuda:N", "mps"
    batch_size   tiles per model call; part of what decides the last bits. 0: as found at the run's start
    threads      torch threads of a process; likewise. 0: as measured at the run's start
    readers      threads that read tiles for a device. 0: as measured at the run's start
    precision    what the network computes in; "fp32" is the reference
    compile      let torch compile the network
    reader       which reader gives the pixels; "auto": the first that suits the file
    fast_decode  decode JPEG at a reduced scale where a coarser picture is wanted: other pixels, sooner
    memory       bytes that a worker may hold in tiles, windows and canvases
    hash_input   record the sha256 of the slide's whole files
    stage        folder on a local disk that slides are copied to ahead of use; None: read where they are. In a worker: the
                 folder that holds this slide's copy
    stage_bytes  most bytes of slides in `stage` at once
    overwrite    replace results that were made from other inputs or parameters
    strict       refuse to finish a slide whose regions come from different environments
    columns      (name, value) pairs of the slide list that are passed through to the record
    owner        who works on the slide, and so where: a token of `lease.Leases`
    """

    slide: str
    slide_id: str
    root: str
    model: str
    out: str
    slide_mpp: float | None = None
    force: bool = False
    overlap: float = 0.0
    min_tissue: float = 0.1
    tissue: str = "otsu"
    roi: str | None = None
    blend: Blend = "hann"
    heatmap_mpp: float | None = None
    heatmap_dtype: Dtype | Literal["auto"] = "auto"
    block: int | None = None
    on_bad_tile: Literal["mask", "fail"] = "mask"
    device: str = "cpu"
    batch_size: int = 32
    threads: int = 1
    readers: int = 2
    precision: Precision = "fp32"
    compile: bool = False
    reader: ReaderName = "auto"
    fast_decode: bool = False
    memory: int = 2**30
    hash_input: bool = False
    stage: str | None = None
    stage_bytes: int = 2**36
    overwrite: bool = False
    strict: bool = False
    columns: tuple[tuple[str, str], ...] = ()
    owner: str = FREE

    def __post_init__(self) -> None:
        if self.batch_size < 0:
            raise UsageError(f"batch size {self.batch_size}: use 1 or more, or 0 to have it found")
        if self.readers < 0:
            raise UsageError(f"{self.readers} reader threads: use 1 or more, or 0 to have them measured")
        if self.threads < 0:
            raise UsageError(f"{self.threads} torch threads: use 1 or more, or 0 to have them measured")

    def stride_px(self, spec: ModelSpec) -> int:
        """Grid px between neighbouring tiles for this overlap. UsageError where it does not fit the model."""
        tile_px = spec.tile_px
        if not math.isfinite(self.overlap):
            raise UsageError(f"overlap {self.overlap} is no number; use a share below 1 or a number of pixels below {tile_px}")
        overlap = self.overlap if self.overlap >= 1 else self.overlap * tile_px
        stride = tile_px - round(overlap)
        if not 1 <= stride <= tile_px:
            raise UsageError(
                f"overlap {self.overlap:g} does not fit a tile of {tile_px} px; "
                f"use a share below 1 or a number of pixels below {tile_px}"
            )
        margins = spec.margins_px
        if tile_px - stride < margins:
            raise UsageError(
                f"model {spec.name} has margins of {margins} px in all, which neighbours must cover; "
                f"use --overlap {margins} or more"
            )
        return stride

    def asked(self) -> dict[str, Any]:
        """JSON values of which `Job.again` makes a job that computes the same; its columns stand elsewhere in a record."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_ASKED}

    @staticmethod
    def again(asked: Mapping[str, Any], columns: Mapping[str, str], out: str) -> Job:
        """The job that was asked for, with results below `out`. Raises UsageError for what no job of this version has."""
        try:
            return Job(**asked, columns=tuple(columns.items()), out=out)
        except (TypeError, AttributeError) as error:
            raise UsageError(f"a record names a job of another kind ({error}); run the same again with --overwrite") from None

    @property
    def slide_folder(self) -> Path:
        """Results of this slide, all models."""
        return Path(self.out) / "slides" / self.slide_id

    def result_folder(self, model_name: str) -> Path:
        return self.slide_folder / model_name

    @property
    def work_place(self) -> Path:
        """Unfinished work of this slide, whoever owns it."""
        return Path(self.out) / ".work" / self.slide_id

    def work_folder(self, model_name: str) -> Path:
        """Unfinished work, on the same file system as the results, so that a rename commits."""
        return self.work_place / self.owner / model_name


def key_of(fields: Mapping[str, Any]) -> str:
    """sha256 hex of what decides a result's values: equal key, equal values."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def key_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The fields in which two keys differ, for people: "min_tissue 0.1 -> 0.5, ..."."""
    names = sorted(n for n in {*old, *new} if old.get(n) != new.get(n))
    if "precision" in names and "doubt" in names:
        names.remove("doubt")  # which follows from it
    return ", ".join(f"{n} {_short(old.get(n))} -> {_short(new.get(n))}" for n in names)


def is_of_one_slide(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two keys differ in nothing but one slide's own files: its pixels, or those of its mask or region of interest."""
    differs = {name for name in {*old, *new} if old.get(name) != new.get(name)}
    if "slide" in differs:  # these follow from the file where nobody states them
        differs -= {"slide", "slide_mpp", "reader"}
    if all(str(fields.get("tissue")).startswith(OF_A_FILE) for fields in (old, new)):
        differs.discard("tissue")
    if all(fields.get("roi") for fields in (old, new)):
        differs.discard("roi")
    return not differs


def slug(text: str) -> str:
    """`text` as a name that every file system takes: letters, digits, `.`, `_`, `-`, at most 60."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")[:60] or "x"


def slide_id(relative: str) -> str:
    """Slug of the stem and 8 hex digits of the path below the folder that was given: equal stems stay apart."""
    digest = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{slug(Path(relative).stem)}-{digest}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "..."
