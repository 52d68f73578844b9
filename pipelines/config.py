"""What a run computes and how: the only defaults a user sees. Promise: nothing else sets one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pathology.errors import UsageError
from pathology.job import Job
from pipelines.slides import SlideEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of `pathology run` that decide jobs. None: chosen by the machine."""

    out: Path
    slide_mpp: float | None = None
    force: bool = False
    overlap: float = 0.0
    min_tissue: float = 0.1
    tissue: Literal["otsu", "none"] = "otsu"
    device: str = "auto"
    batch_size: int = 32
    readers: int | None = None
    threads: int | None = None
    on_bad_tile: Literal["mask", "fail"] = "mask"
    overwrite: bool = False
    strict: bool = False


def make_jobs(slides: Sequence[SlideEntry], models: Sequence[str], settings: Settings, device: str) -> list[Job]:
    """A job for each slide and model, slide by slide. `device` is what `settings.device` came to on this machine."""
    from pathology.cores import core_count

    if len(set(models)) < len(models):
        raise UsageError(f"a model is named twice in {', '.join(models)}; name each once")
    cores = core_count()
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
            tissue=settings.tissue,
            device=device,
            batch_size=settings.batch_size,
            threads=settings.threads or cores,
            readers=settings.readers or cores,
            on_bad_tile=settings.on_bad_tile,
            overwrite=settings.overwrite,
            strict=settings.strict,
            columns=slide.columns,
        )
        for slide in slides
        for model in models
    ]
