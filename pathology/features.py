"""Feature vectors of a slide's tiles on disk: a Zarr group of (n, D) vectors and the tiles' places.

Promise: equal input gives equal bytes; every chunk has its crc32c; rows are in row-major order of the tiles.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore

from pathology.durable import output_faults
from pathology.errors import UsageError, one_line
from pathology.pulse import beat
from pathology.records import check_fields, read_object
from pathology.store import ATTRIBUTES, HeatmapMeta, codecs, open_array

# Name of the store in the folder of a slide's and model's results.
STORE_NAME = "features.zarr"
# Rows of a chunk.
CHUNK_ROWS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Features on disk, opened for reading by `open_features`.

    path     the store
    meta     the model's card, fingerprint of the slide, tile_px, stride_px, provenance
    vectors  (n, D) float32 Zarr array, a row a tile
    origins  (n, 2) float64 Zarr array: y, x of the tiles' outer corners in continuous level-0 px
    l0_tile  side of a tile in level-0 px
    """

    path: Path
    meta: HeatmapMeta
    vectors: zarr.Array[Any]
    origins: zarr.Array[Any]
    l0_tile: float


def write_features(path: Path, meta: HeatmapMeta, origins: NDArray[np.float64], vectors: Iterator[NDArray[np.float32]]) -> None:
    """Write the store at `path`, replacing what an interrupted write may have left there.

    origins  (n, 2) float64 y, x
    vectors  (m, D) float32 blocks, n rows in all, in the order of `origins`

    Memory: a block and a chunk. Files are not synced to disk here. Raises EnvironmentFault where the disk is full or gone.
    """
    count, length = len(origins), meta.spec.features
    l0_tile = meta.tile_px * meta.spec.mpp / meta.frame.slide_mpp
    with output_faults(path):
        if path.exists():
            shutil.rmtree(path)
        group = zarr.create_group(
            LocalStore(path), zarr_format=3, attributes={ATTRIBUTES: {**meta.to_json(), "l0_tile": l0_tile}}
        )
        rows = max(1, min(CHUNK_ROWS, count))
        options: dict[str, Any] = {"compressors": codecs(), "config": {"write_empty_chunks": True}}
        places = group.create_array(
            "origins", shape=(count, 2), chunks=(rows, 2), dtype=np.float64, dimension_names=("tile", "l0_yx"), **options
        )
        array = group.create_array(
            "vectors", shape=(count, length), chunks=(rows, length), dtype=np.float32, dimension_names=("tile", "f"), **options
        )
        if count:
            places[...] = origins
        at, waiting = 0, np.empty((0, length), np.float32)
        for block in vectors:
            beat()
            waiting = np.concatenate([waiting, block])
            whole = len(waiting) // rows * rows
            if whole:
                array[at : at + whole] = waiting[:whole]
                at, waiting = at + whole, waiting[whole:]
        if at + len(waiting) != count:
            raise ValueError(f"{at + len(waiting)} vectors for {count} tiles")
        if len(waiting):
            array[at:] = waiting


def open_features(path: str | Path) -> Features:
    """The features at `path`: a features.zarr, or the folder of a slide's and model's results that holds one.

    Reads no vectors. Raises UsageError for what holds none, is damaged, or has another schema version.
    """
    path = Path(path)
    store = path / STORE_NAME if (path / STORE_NAME).is_dir() else path
    try:
        own = read_object(store / "zarr.json")["attributes"][ATTRIBUTES]
        check_fields(own, {"l0_tile": (int, float)})
        l0_tile = float(own["l0_tile"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UsageError(
            f"{path} holds no features ({one_line(error)}); give a {STORE_NAME}, or the result folder that holds one"
        ) from None
    vectors, origins = (open_array(store, name) for name in ("vectors", "origins"))
    meta = HeatmapMeta.from_json(own)
    if vectors.dtype != np.float32 or vectors.shape != (origins.shape[0], meta.spec.features) or origins.shape[1:] != (2,):
        raise UsageError(f"features {store} are damaged: {vectors.dtype} {vectors.shape}; make them again")
    return Features(store, meta, vectors, origins, l0_tile)
