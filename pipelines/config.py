"""What a run computes and how: the only defaults a user sees. Promise: nothing else sets one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pathology.encoding import Dtype
from pathology.errors import UsageError
from pathology.job import Job, ReaderName
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
    batch_size: int | None = 32
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
    stage: Path | None = None
    stage_bytes: int = 64 * 2**30


# Of the memory that is free, a worker's tiles, windows and canvases get this share, and no more than the second by themselves:
# more of it saves no decoding and no inference.
MEMORY_SHARE = 0.25
MEMORY_MOST = 2**30


def default_memory(free: int) -> int:
    """Bytes for a worker where --memory does not say."""
    return max(2**27, min(MEMORY_MOST, int(MEMORY_SHARE * free)))


def make_jobs(slides: Sequence[SlideEntry], models: Sequence[str], settings: Settings, device: str) -> list[Job]:
    """A job for each slide and model, slide by slide. `device` is what `settings.device` came to on this machine.

    Raises UsageError and ModelError for models named twice or not known, and for a precision that is not to be had.
    """
    from pathology.cores import memory_limit_bytes
    from pathology.device import choose_precision
    from pathology.models import is_network

    if len(set(models)) < len(models):
        raise UsageError(f"a model is named twice in {', '.join(models)}; name each once")
    tissue = _file_or_name(settings.tissue)
    precisions = {model: choose_precision(settings.precision, device, is_network(model)) for model in models}
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
            tissue=tissue if slide.mask is None else str(slide.mask.absolute()),
            roi=_path(settings.roi if slide.roi is None else slide.roi),
            blend=settings.blend,
            heatmap_mpp=settings.heatmap_mpp,
            heatmap_dtype=settings.heatmap_dtype,
            device=device,
            batch_size=settings.batch_size or 0,
            threads=settings.threads or 0,
            readers=settings.readers or 0,
            reader=settings.reader,
            fast_decode=settings.fast_decode,
            memory=settings.memory or default_memory(memory_limit_bytes()),
            precision=precisions[model],
            compile=settings.compile,
            on_bad_tile=settings.on_bad_tile,
            overwrite=settings.overwrite,
            strict=settings.strict,
            stage=_path(settings.stage),
            stage_bytes=settings.stage_bytes,
            columns=slide.columns,
        )
        for slide in slides
        for model in models
    ]


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())  # a worker elsewhere has another working directory


def _file_or_name(tissue: str) -> str:
    """A method's name as it is, anything else as the path of a file."""
    from pathology.tissue import METHODS

    if tissue in METHODS:
        return tissue
    path = Path(tissue).absolute()
    if not path.is_file():
        raise UsageError(f"tissue {tissue} is neither {' nor '.join(METHODS)} nor a file; give a mask picture or GeoJSON")
    return str(path)
