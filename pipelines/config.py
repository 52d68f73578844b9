"""What a run computes and how: the only defaults a user sees. Promise: nothing else sets one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pathology.encoding import Dtype
from pathology.errors import UsageError
from pathology.job import Job, ReaderName
from pathology.model import ModelSpec
from pathology.stitch import Blend
from pipelines.slides import SlideEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of `pathology run` that decide jobs. None: chosen by the machine."""

    out: Path
    slide_mpp: float | None = None
    force: bool = False
    overlap: float = 0.0
    min_tissue: float = 0.1
    tissue: str = "otsu"
    roi: Path | None = None
    blend: Blend = "hann"
    heatmap_mpp: float | None = None
    heatmap_dtype: Dtype | Literal["auto"] = "auto"
    device: str = "auto"
    batch_size: int | Literal["auto"] | None = None
    readers: int | None = None
    reader: ReaderName = "auto"
    fast_decode: bool = False
    memory: int | None = None
    threads: int | None = None
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    compile: bool = False
    on_bad_tile: Literal["mask", "fail"] = "mask"
    overwrite: bool = False
    strict: bool = False
    hash_input: bool = False
    stage: Path | None = None
    stage_bytes: int = 64 * 2**30


# What stands before a model's name in `--tissue`.
TISSUE_MODEL = "model:"

# Of the memory that is free, a worker's tiles, windows and canvases get this share, and no more than the second by themselves:
# more of it saves no decoding and no inference.
MEMORY_SHARE = 0.25
MEMORY_MOST = 2**30


def default_memory(free: int) -> int:
    """Bytes for a worker where --memory does not say."""
    return max(2**27, min(MEMORY_MOST, int(MEMORY_SHARE * free)))


def cards(models: Sequence[str], settings: Settings) -> dict[str, ModelSpec]:
    """By the models' references, their cards as a run has them. UsageError, ModelError for models named twice or not known."""
    from pathology.models import load_spec
    from pathology.models.pool import pooled_spec

    if len(set(models)) < len(models):
        raise UsageError(f"a model is named twice in {', '.join(models)}; name each once")
    return {model: pooled_spec(load_spec(model), settings.heatmap_mpp) for model in models}


def make_jobs(slides: Sequence[SlideEntry], models: Mapping[str, ModelSpec], settings: Settings, device: str) -> list[Job]:
    """A job for each slide and model, slide by slide.

    models  by their references, their `cards`
    device  what `settings.device` came to on this machine

    Raises UsageError for a precision that is not to be had.
    """
    from pathology.cores import memory_limit_bytes
    from pathology.device import choose_precision
    from pathology.models import precisions

    found = _tissue(settings)
    chosen = {model: choose_precision(settings.precision, device, precisions(model), model) for model in models}
    return [
        Job(
            slide=str(slide.path),
            slide_id=slide.slide_id,
            root=str(slide.root),
            model=model,
            out=str(settings.out.absolute()),
            slide_mpp=slide.slide_mpp if slide.slide_mpp is not None else settings.slide_mpp,
            force=settings.force,
            overlap=settings.overlap,
            min_tissue=settings.min_tissue,
            tissue=found(slide) if slide.mask is None else str(slide.mask.absolute()),
            roi=_path(settings.roi if slide.roi is None else slide.roi),
            blend=settings.blend,
            heatmap_mpp=settings.heatmap_mpp,
            heatmap_dtype=settings.heatmap_dtype,
            device=device,
            batch_size=_batch_size(settings, models[model], device),
            threads=settings.threads or 0,
            readers=settings.readers or 0,
            reader=settings.reader,
            fast_decode=settings.fast_decode,
            memory=settings.memory or default_memory(memory_limit_bytes()),
            precision=chosen[model],
            compile=settings.compile,
            on_bad_tile=settings.on_bad_tile,
            overwrite=settings.overwrite,
            strict=settings.strict,
            hash_input=settings.hash_input,
            stage=_path(settings.stage),
            stage_bytes=settings.stage_bytes,
            columns=slide.columns,
        )
        for slide in slides
        for model in models
    ]


def _batch_size(settings: Settings, spec: ModelSpec, device: str) -> int:
    """Tiles of a batch; 0: the worker is to find it."""
    from pathology.cores import core_count
    from pathology.models.pieces import usual_batch

    cores = settings.threads or core_count() if device == "cpu" else 1
    return 0 if settings.batch_size == "auto" else settings.batch_size or usual_batch(spec.input_px, cores)


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())  # a worker elsewhere has another working directory


def _tissue(settings: Settings) -> Callable[[SlideEntry], str]:
    """What says where a slide's tissue is: a method's name as it is, a file, or the folder of another model's result."""
    from pathology.models import load_spec
    from pathology.tissue import METHODS

    if settings.tissue in METHODS:
        return lambda _: settings.tissue
    if (model := tissue_model(settings)) is not None:
        name, slides = load_spec(model).name, (tissue_out(settings) / "slides").absolute()
        return lambda slide: str(slides / slide.slide_id / name)
    path = Path(settings.tissue).absolute()
    if not path.is_file() and not (path / "manifest.json").is_file():
        raise UsageError(
            f"tissue {settings.tissue} is neither {' nor '.join(METHODS)} nor a file or a result's folder; "
            f"give a mask picture, GeoJSON, or {TISSUE_MODEL}NAME"
        )
    return lambda _: str(path)


def tissue_model(settings: Settings) -> str | None:
    """The model that `--tissue model:NAME` names."""
    if not settings.tissue.startswith(TISSUE_MODEL):
        return None
    if settings.tissue == TISSUE_MODEL:
        raise UsageError(f"tissue {TISSUE_MODEL} names no model; write {TISSUE_MODEL}NAME")
    return settings.tissue.removeprefix(TISSUE_MODEL)


def tissue_out(settings: Settings) -> Path:
    """Where a tissue model's results go: an output of its own, for it looks at slides otherwise."""
    return settings.out / "tissue"


def tissue_settings(settings: Settings, spec: ModelSpec) -> Settings:
    """How tissue is looked for by a model of that card: everywhere, and as it answers."""
    raster = spec.tile_px // math.gcd(spec.tile_px, spec.output_px)  # strides that keep neighbours' answers on one raster
    stride = (spec.tile_px - spec.margins_px) // raster * raster
    if not stride:
        raise UsageError(f"model {spec.name} has margins of {spec.margins_px} px, which leave no stride; it cannot find tissue")
    return replace(
        settings,
        out=tissue_out(settings),
        tissue="none",
        overlap=spec.tile_px - stride,
        min_tissue=0.0,
        heatmap_mpp=None,
        heatmap_dtype="auto",
        precision="fp32",
        compile=False,
    )
