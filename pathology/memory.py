"""How much memory a worker takes for a plan. Promise: pure arithmetic that follows what the code holds, printed by `check`."""

from __future__ import annotations

from pathology.batches import tiles_ahead
from pathology.model import ModelSpec
from pathology.plan import REGIONS_AT_ONCE, Plan, region_bytes

# Of a job's memory, for decoded tiles of the slides that are open: 1 / CACHE_SHARE.
CACHE_SHARE = 8


def memory_bound(plan: Plan, spec: ModelSpec, *, batch_size: int, readers: int, regions: int = REGIONS_AT_ONCE) -> int:
    """Most bytes that one worker holds for `regions` regions at once, beyond libraries, the model and decoded tiles.

    Canvases, each with the bands on their way to disk; tiles handed in and not yet answered (two batches a region), read
    ahead, and the batch; as many answers as tiles handed in; and a source window for each reader, as RGB with mask, and as
    Pillow's four bytes a pixel.
    """
    tile = spec.input_px**2 * 3
    answer = len(spec.classes) * spec.output_px**2 * 4
    window = (plan.grid.l0_tile + 8) ** 2 * (3 + 1 + 4)
    batches = (2 * regions + 1) * batch_size
    read_ahead = regions * tiles_ahead(spec.input_px, readers)
    return int(
        regions * region_bytes(plan, len(spec.classes)) + batches * (tile + answer) + read_ahead * tile + readers * window
    )
