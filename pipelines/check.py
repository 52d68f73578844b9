"""What would run, and what would fail. Promise: slides are opened and planned as in a run, nothing is inferred or written, and
none is opened in this process: one that crashes a library, or never comes back, is a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pathology.apart import Apart
from pathology.batch_size import cpu_batch
from pathology.cores import core_count
from pathology.encoding import stored_bytes
from pathology.errors import PathologyError, SlideError, UsageError
from pathology.job import Job, ReaderName
from pathology.job_slide import plan_slide
from pathology.memory import model_peak, run_bound
from pathology.model import ModelSpec
from pathology.plan import Plan
from pathology.process import MODULES, VARIABLES
from pathology.readers import open_slide
from pathology.slide import SlideInfo
from pathology.together import groups
from pipelines.config import Settings, cards, make_jobs, tissue_model
from pipelines.headers import MOST_PROCESSES, headers, processes
from pipelines.room import size
from pipelines.slides import SlideEntry

# Tissue is found on pixels, which may lie on slow storage.
PLAN_DEADLINE_S = 1800.0

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
    if not models:
        yield from _opened(slides, settings)
        return
    if tissue_model(settings) is not None:
        settings = replace(settings, tissue="none")  # not known before the run: the most that it can come to
    specs = cards(models, settings)
    # What is measured runs on the CPU, which has no fp16, and takes no less memory in fp32.
    tried = replace(settings, precision="fp32") if settings.precision == "fp16" else settings
    jobs = [[_with_batch_size(job, specs[job.model]) for job in make_jobs([entry], specs, tried, "cpu")] for entry in slides]
    each = [[specs[job.model] for job in of_slide] for of_slide in jobs]
    peak = 0
    with Apart(min(core_count(), MOST_PROCESSES, len(slides)), PLAN_DEADLINE_S) as apart:
        calls = ((repr(one[0].path.name), (*one, settings)) for one in zip(slides, jobs, each, strict=True))
        answers = apart.results(_look, calls)
        for entry, of_slide, theirs, found in zip(slides, jobs, each, answers, strict=True):
            if isinstance(found, SlideError):
                yield Verdict(entry, reason=found.reason, message=str(found))
                continue
            if isinstance(found, PathologyError):
                raise found
            info, plans = found
            planned = [[(plans[p], theirs[p], of_slide[p]) for p in places] for places in groups(of_slide, theirs)]
            counted = [replace(job, threads=job.threads or core_count()) for job in of_slide]
            peak = peak or model_peak(counted, MODULES["device"], VARIABLES["device"])
            for job in of_slide:
                together = next(group for group in planned if any(job is other for _, _, other in group))
                yield _verdict(entry, info, job, together, peak)


def _opened(slides: Sequence[SlideEntry], settings: Settings) -> Iterator[Verdict]:
    with Apart(processes(len(slides))) as apart:
        seen = headers(apart, slides, settings.slide_mpp, settings.force, settings.reader)
        for entry, found in zip(slides, seen, strict=True):
            if isinstance(found, SlideError):
                yield Verdict(entry, reason=found.reason, message=str(found))
            else:
                yield Verdict(entry, found)


def look(path: Path, slide_mpp: float | None, force: bool, reader: ReaderName) -> SlideInfo:
    """What is known of a slide, which is opened in a process apart. Raises SlideError."""
    with Apart(1) as apart:
        info: SlideInfo = apart.call(repr(path.name), _info, path, slide_mpp, force, reader)
    return info


def _info(path: Path, slide_mpp: float | None, force: bool, reader: ReaderName) -> SlideInfo:
    with open_slide(path, slide_mpp, force=force, reader=reader) as slide:
        return slide.info


def _look(
    entry: SlideEntry, jobs: Sequence[Job], specs: Sequence[ModelSpec], settings: Settings
) -> tuple[SlideInfo, dict[int, Plan]]:
    """What is known of a slide, and the plan of each job by its place among them."""
    mpp = entry.slide_mpp if entry.slide_mpp is not None else settings.slide_mpp
    plans: dict[int, Plan] = {}
    with open_slide(entry.path, mpp, force=settings.force, reader=settings.reader) as slide:
        for places in groups(jobs, specs):
            together = [specs[place] for place in places]
            plans |= {p: plan_slide(jobs[p], slide, specs[p], together)[1] for p in places}
        return slide.info, plans


def _with_batch_size(job: Job, spec: ModelSpec) -> Job:
    """The job as a run on this CPU has it."""
    return replace(job, batch_size=job.batch_size or cpu_batch(spec, job.threads or core_count(), job.memory))


def _verdict(
    entry: SlideEntry, info: SlideInfo, job: Job, together: Sequence[tuple[Plan, ModelSpec, Job]], peak: int
) -> Verdict:
    plan, spec = next((plan, spec) for plan, spec, other in together if other is job)
    stored = stored_bytes(spec, job.heatmap_dtype, plan.frame.shape, len(plan.tiles))
    memory = run_bound(together, peak, core_count())
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


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines with aligned columns; the first row is the head. Columns that are empty throughout are left out."""
    if len(rows) < 2:
        raise UsageError("a table needs a row below its head")
    kept = [i for i in range(len(rows[0])) if any(r[i] for r in rows[1:])]
    widths = {i: max(len(r[i]) for r in rows) for i in kept[:-1]}
    for r in rows:
        yield "  ".join([*(r[i].ljust(widths[i]) for i in kept[:-1]), r[kept[-1]]]).rstrip()
