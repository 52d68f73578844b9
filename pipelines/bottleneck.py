"""What held a run up, in a line. Promise: it names the stage that took the most, and what a user can do about that one."""

from __future__ import annotations

from collections.abc import Mapping

# From this share on the model is what there is to speed up.
BUSY = 0.8

ADVICE = {
    "read": "storage is the bottleneck: --stage DIR copies slides to a local disk ahead of use",
    "decode": "decoding is the bottleneck: more cores help",
    "resample": "resizing is the bottleneck: more cores help, or a slide resolution that is a whole multiple of the model's",
    "copy": "copying tiles is the bottleneck: a smaller --overlap makes fewer of them",
    "model": "the model is the bottleneck: a GPU or more cores help, a smaller --precision on a GPU, a smaller --overlap",
    "stitch": "stitching is the bottleneck: a smaller --overlap helps",
    "write": "writing is the bottleneck: put --out on a quicker disk",
}
FASTER = ", or --fast-decode where JPEG slides are read coarser than they are"


def bottleneck(stages: Mapping[str, float], working_s: float, run_s: float, fast_decode: bool) -> str:
    """The slowest stage and what helps; "" where nothing was computed.

    stages       seconds by stage, over all threads
    working_s    seconds in which regions were worked on, summed over devices
    run_s        seconds of the whole run, start and ends of slides included, likewise
    fast_decode  whether that was on
    """
    if not any(stages.values()):
        return ""
    others = {stage: seconds for stage, seconds in stages.items() if stage != "model"}
    slowest = "model" if stages["model"] >= BUSY * working_s else max(others, key=lambda stage: others[stage])
    spent = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in stages.items() if seconds >= 0.05)
    busy = stages["model"] / run_s if run_s else 0.0
    more = FASTER if slowest == "decode" and not fast_decode else ""
    return f"seconds over all threads: {spent}; device busy {min(1.0, busy):.0%} of the run; {ADVICE[slowest]}{more}"
