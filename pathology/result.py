"""Reading a finished heatmap: scores as dask or numpy arrays, what they mean, and where they lie on the slide.

Promise: opening reads metadata only and refuses what this version did not write; a changed bit in the scores raises when
it is read. A shard that is gone reads as not predicted: the manifest's hashes show it (`pathology verify`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pathology.errors import EnvironmentFault, UsageError
from pathology.geometry import Box, HeatmapFrame
from pathology.labels import LABELS_NAME, has_labels
from pathology.model import ModelSpec
from pathology.records import read_object
from pathology.store import ATTRIBUTES, STORE_NAME, HeatmapMeta, open_array

# Each is half the one before.
MOST_LEVELS = 32

if TYPE_CHECKING:
    import dask.array as da


@dataclass(frozen=True, slots=True, eq=False)
class Heatmap:
    """A heatmap on disk, opened for reading by `open_heatmap`.

    path    the store
    attrs   this project's own attributes, as written (schema, frame, model, fingerprint, provenance, ...)
    meta    the same as values
    arrays  the Zarr arrays, (classes, height, width), level 0 first, as stored: `meta.encoding` tells scores of them
    """

    path: Path
    attrs: dict[str, Any]
    meta: HeatmapMeta
    arrays: tuple[zarr.Array[Any], ...]

    @property
    def spec(self) -> ModelSpec:
        """The model's card: scores, units, thresholds, display range, colours, name."""
        return self.meta.spec

    @property
    def classes(self) -> tuple[str, ...]:
        """One name per channel."""
        return self.spec.classes

    @property
    def frame(self) -> HeatmapFrame:
        """Where the pixels of level 0 lie on the slide."""
        return self.meta.frame

    @property
    def levels(self) -> tuple[da.Array, ...]:
        """(classes, height, width) float32 lazy arrays, NaN where not predicted; each level half the one before."""
        import dask.array as da

        decode = self.meta.encoding.decode
        lazy = (da.from_array(array, chunks=array.chunks, name=False) for array in self.arrays)  # type: ignore[no-untyped-call]
        return tuple(array.map_blocks(decode, dtype=np.float32) for array in lazy)

    @property
    def labels(self) -> tuple[da.Array, ...]:
        """(height, width) lazy arrays, a level each: 1 + the number of the likeliest class, 0: none. () where not stored."""
        import dask.array as da

        return tuple(da.from_array(array, chunks=array.chunks, name=False) for array in self.label_arrays)  # type: ignore[no-untyped-call]

    @property
    def label_arrays(self) -> tuple[zarr.Array[Any], ...]:
        """The Zarr arrays of the same."""
        levels = range(len(self.arrays) if has_labels(self.spec) else 0)
        return tuple(open_array(self.path, f"labels/{LABELS_NAME}/{k}") for k in levels)

    def level_shape(self, level: int) -> tuple[int, int]:
        """(height, width) of a level in px."""
        _, height, width = self._array(level).shape
        return height, width

    def level_frame(self, level: int) -> HeatmapFrame:
        """Where the pixels of a lower level lie on the slide: the same corner, pixels 2^level as large."""
        frame = self.frame
        return HeatmapFrame(self.level_shape(level), frame.l0_origin, frame.l0_pixel * 2**level, frame.slide_mpp)

    def level0_to_heatmap(self, y: float, x: float) -> tuple[float, float]:
        """Continuous level-0 px of the slide -> continuous px of heatmap level 0; works on arrays as well."""
        return self.frame.level0_to_heatmap(y, x)

    def heatmap_to_level0(self, y: float, x: float) -> tuple[float, float]:
        """Continuous px of heatmap level 0 -> continuous level-0 px of the slide; works on arrays as well."""
        return self.frame.heatmap_to_level0(y, x)

    def read(self, level: int, box: Box) -> NDArray[np.float32]:
        """(classes, h, w) float32 of `box`, in px of the level, NaN where not predicted.

        Raises UsageError for a box that is not inside the level, EnvironmentFault where a checksum does not fit.
        """
        array = self._array(level)
        height, width = self.level_shape(level)
        if box.intersect(Box(0, 0, height, width)) != box:
            raise UsageError(f"{box} reaches out of level {level} of {height} x {width} px; ask for a part of it")
        try:
            return self.meta.encoding.decode(np.asarray(array[:, *box.slices()]))
        except ValueError as error:
            raise EnvironmentFault(
                f"heatmap {self.path} is damaged at level {level} ({error}); make it again, and look after the disk"
            ) from error

    def _array(self, level: int) -> zarr.Array[Any]:
        if not 0 <= level < len(self.arrays):
            raise UsageError(f"level {level} does not exist; this heatmap has levels 0 to {len(self.arrays) - 1}")
        return self.arrays[level]


def open_heatmap(path: str | Path) -> Heatmap:
    """The heatmap at `path`: a heatmap.ome.zarr, or the folder of a slide's and model's results that holds one.

    Reads no pixels. Raises UsageError for what is no heatmap, is damaged, or has another schema version.
    """
    path = Path(path)
    store = path / STORE_NAME if (path / STORE_NAME).is_dir() else path
    try:
        root = read_object(store / "zarr.json")
        attributes = root["attributes"]
        own, levels = attributes[ATTRIBUTES], len(attributes["ome"]["multiscales"][0]["datasets"])
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} is no heatmap; give a {STORE_NAME}, or the result folder that holds one") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UsageError(f"{path} is no heatmap that this program wrote: its zarr.json lacks the attributes of one") from None
    if levels > MOST_LEVELS:
        raise UsageError(f"{path} is no heatmap that this program wrote: it lists {levels} levels")
    if not isinstance(own, dict):
        raise UsageError(f"{path} is no heatmap that this program wrote: its attributes `{ATTRIBUTES}` are no object")
    meta = HeatmapMeta.from_json(own)
    shape = (len(meta.spec.classes), *meta.frame.shape)
    arrays: list[zarr.Array[Any]] = []
    for level in range(levels):
        array, dtype = open_array(store, str(level)), meta.encoding.dtype
        if array.shape != shape or array.dtype != dtype:
            raise UsageError(
                f"heatmap {store} is damaged: level {level} is {array.dtype} {array.shape}, not {dtype} {shape}; make it again"
            )
        arrays.append(array)
        shape = (shape[0], (shape[1] + 1) // 2, (shape[2] + 1) // 2)
    return Heatmap(store, own, meta, tuple(arrays))
