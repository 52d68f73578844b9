"""What would run, and what would fail. Promise: slides are opened and planned as in a run, nothing is inferred or written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pathology.batch_size import cpu_batch
from pathology.cores import core_count
from pathology.encoding import choose_encoding
from pathology.errors import SlideError, UsageError
from pathology.job import Job
from pathology.memory import model_peak, run_bound
from pathology.model import ModelSpec
from pathology.models import load_spec
from pathology.models.pool import pooled_spec
from pathology.plan import Plan
from pathology.process import MODULES
from pathology.readers import open_slide
from pathology.slide import Slide, SlideInfo
from pathology.slide_worker import plan_slide
from pathology.together import groups
from pipelines.config import Settings, make_jobs, tissue_model
from pipelines.slides import SlideEntry

COLUMNS = (
    "id",
    "model",
    "px",
    "mpp",
    "from",
    "tissue mm2",
    "tiles",
    "regions",
    "again",
    "heatmap",
    "memory",
    "read with",
    "verdict",
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One slide and model: what would be computed, or why it cannot be. Everything but `slide` may be unknown.

    memory_bytes  of the run for this slide, all models that read it together
    read_with     names of the other models whose tiles are read with this one's
    """

    slide: SlideEntry
    info: SlideInfo | None = None
    spec: ModelSpec | None = None
    plan: Plan | None = None
    heatmap_bytes: int = 0
    memory_bytes: int = 0
    read_with: tuple[str, ...] = ()
    reason: str = ""
    message: str = ""


def check(slides: Sequence[SlideEntry], models: Sequence[str], settings: Settings) -> Iterator[Verdict]:
    """A verdict for each slide and model; without a model, for each slide. Raises ModelError for a model that cannot run."""
    if tissue_model(settings) is not None:
        settings = replace(settings, tissue="none")  # not known before the run: the most that it can come to
    specs = {ref: pooled_spec(load_spec(ref), settings.heatmap_mpp) for ref in models}
    peak = 0
    for entry in slides:
        try:
            mpp = entry.slide_mpp if entry.slide_mpp is not None else settings.slide_mpp
            with open_slide(entry.path, mpp, force=settings.force, reader=settings.reader) as slide:
                if not models:
                    yield Verdict(entry, slide.info)
                jobs = make_jobs([entry], models, settings, "cpu") if models else []
                jobs = [_with_batch_size(job, specs[job.model]) for job in jobs]
                planned = _planned(jobs, [specs[job.model] for job in jobs], slide)
                if planned and not peak:
                    tried = [replace(job, threads=job.threads or core_count()) for job in jobs]
                    peak = model_peak(tried, MODULES["device"])
                for job in jobs:
                    together = next(group for group in planned if any(job is other for _, _, other in group))
                    yield _verdict(entry, slide.info, job, together, peak)
        except SlideError as error:
            yield Verdict(entry, reason=error.reason, message=str(error))


def _planned(jobs: Sequence[Job], specs: Sequence[ModelSpec], slide: Slide) -> list[list[tuple[Plan, ModelSpec, Job]]]:
    """The jobs of a slide by what is run together."""
    planned = []
    for places in groups(jobs, specs):
        together = [specs[place] for place in places]
        planned.append([(plan_slide(jobs[p], slide, specs[p], together)[1], specs[p], jobs[p]) for p in places])
    return planned


def _with_batch_size(job: Job, spec: ModelSpec) -> Job:
    """The job as a run on this CPU has it."""
    return replace(job, batch_size=job.batch_size or cpu_batch(spec, job.threads or core_count(), job.memory))


def _verdict(
    entry: SlideEntry, info: SlideInfo, job: Job, together: Sequence[tuple[Plan, ModelSpec, Job]], peak: int
) -> Verdict:
    plan, spec = next((plan, spec) for plan, spec, other in together if other is job)
    height, width = plan.frame.shape
    pyramid = 4 / 3 if max(height, width) > 256 else 1.0
    dtype = np.dtype(choose_encoding(spec, job.heatmap_dtype).dtype)
    stored = int(len(plan.tiles) * spec.features * 4 or height * width * len(spec.classes) * pyramid * dtype.itemsize)
    memory = run_bound(together, peak, job.readers or core_count())
    others = tuple(other.name for _, other, _ in together if other is not spec)
    return Verdict(entry, info, spec, plan, stored, memory, others)


def row(verdict: Verdict) -> tuple[str, ...]:
    """The verdict as text, one field per column of `COLUMNS`."""
    info, plan, spec = verdict.info, verdict.plan, verdict.spec
    if info is None:
        return (verdict.slide.slide_id, *[""] * 11, f"FAILS {verdict.reason}: {verdict.message}")
    facts = (f"{info.shape[1]} x {info.shape[0]}", f"{info.mpp:.4g}", info.mpp_source)
    if plan is None or spec is None:
        return (verdict.slide.slide_id, "", *facts, *[""] * 7, "opens")
    return (
        verdict.slide.slide_id,
        spec.name,
        *facts,
        f"{plan.tissue_mm2:.2f}",
        str(len(plan.tiles)),
        str(len(plan.regions)),
        f"{plan.recompute_share:.0%}",
        size(verdict.heatmap_bytes),
        size(verdict.memory_bytes),
        ", ".join(verdict.read_with),
        "runs" if len(plan.tiles) else "runs, no tissue",
    )


def facts(verdict: Verdict) -> dict[str, object]:
    """The verdict as JSON values."""
    info, plan, spec = verdict.info, verdict.plan, verdict.spec
    values: dict[str, object] = {"slide": str(verdict.slide.path), "id": verdict.slide.slide_id, "runs": info is not None}
    if info is None:
        return values | {"reason": str(verdict.reason), "message": verdict.message}
    values |= {"shape": info.shape, "mpp": info.mpp, "mpp_source": info.mpp_source, "reader": info.reader}
    if plan is None or spec is None:
        return values
    return values | {
        "model": spec.name,
        "tissue_mm2": plan.tissue_mm2,
        "tiles": len(plan.tiles),
        "regions": len(plan.regions),
        "forward_passes": plan.forward_passes,
        "recompute_share": plan.recompute_share,
        "heatmap_shape": plan.frame.shape,
        "heatmap_bytes": verdict.heatmap_bytes,
        "memory_bytes": verdict.memory_bytes,
        "read_with": verdict.read_with,
    }


def size(count: float) -> str:
    """Bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines with aligned columns; the first row is the head. Columns that are empty throughout are left out."""
    if len(rows) < 2:
        raise UsageError("a table needs a row below its head")
    kept = [i for i in range(len(rows[0])) if any(r[i] for r in rows[1:])]
    widths = {i: max(len(r[i]) for r in rows) for i in kept[:-1]}
    for r in rows:
        yield "  ".join([*(r[i].ljust(widths[i]) for i in kept[:-1]), r[kept[-1]]]).rstrip()
