"""A heatmap on disk: an OME-Zarr 0.5 group (Zarr v3) of scores with its pyramid, its label image and all that explains them.

Promise: every shard is written once, whole, by the calling thread, each inner chunk and shard index with its crc32c; equal
input gives equal bytes. NaN, or code 0 of bytes, means not predicted; a chunk or shard of nothing else is not on disk, so that
one is missing by accident shows only in the result's manifest.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from pathology.durable import output_faults
from pathology.encoding import FLOAT32, Encoding
from pathology.errors import UsageError, one_line
from pathology.geometry import Box, HeatmapFrame
from pathology.labels import LABELS_NAME, has_labels, label_attributes, label_block, label_dtype
from pathology.model import DetectionRule, ModelSpec, ReadRule
from pathology.pulse import under_way
from pathology.pyramid import NGFF_VERSION, Level, ShardGather, Window, make_levels, ngff_attributes
from pathology.records import check_fields, read_object

SCHEMA = 2

# Name of the store in the folder of a slide's and model's results.
STORE_NAME = "heatmap.ome.zarr"
# Key of our own attributes beside `ome`.
ATTRIBUTES = "pathology"

ZSTD_LEVEL = 3

# What arrays are opened with, and no others: a codec may unpickle, or make gigabytes of a few bytes.
OWN_CODECS = {"bytes", "zstd", "crc32c"}
MOST_AXES, MOST_PX, MOST_CHUNK_BYTES = 4, 2**31, 2**29
# What zarr raises on metadata that are not what it expects.
NOT_UNDERSTOOD = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)


@dataclass(frozen=True, slots=True)
class HeatmapMeta:
    """All that is written beside the numbers.

    frame        where heatmap pixels lie on the slide
    spec         the model's card: classes, thresholds, units, colours, name, sha256
    tile_px      side of a tile, in px at the model's mpp
    stride_px    distance of neighbouring tiles, likewise
    fingerprint  the slide's
    encoding     how scores are stored
    provenance   parameters, reader, precision, versions that decide values; JSON values only, no time, host or path
    """

    frame: HeatmapFrame
    spec: ModelSpec
    tile_px: int
    stride_px: int
    fingerprint: str
    provenance: dict[str, Any]
    encoding: Encoding = FLOAT32

    def to_json(self) -> dict[str, Any]:
        """JSON values in a fixed order, of which `from_json` makes an equal meta. Raises ValueError for NaN and infinity."""
        fields = {
            "schema": SCHEMA,
            "research_use_only": True,
            "frame": {**asdict(self.frame), "mpp": self.frame.mpp},
            "tile_px": self.tile_px,
            "stride_px": self.stride_px,
            "fingerprint": self.fingerprint,
            "model": asdict(self.spec),
            "provenance": self.provenance,
            "encoding": {**asdict(self.encoding), "not_predicted": 0 if self.encoding.dtype == "uint8" else "NaN"},
        }
        values: dict[str, Any] = json.loads(json.dumps(fields, sort_keys=True, allow_nan=False))
        return values

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> HeatmapMeta:
        """Raises UsageError for another schema version and for values that are not a heatmap's."""
        if values.get("schema") != SCHEMA:
            raise UsageError(
                f"heatmap has schema {values.get('schema')!r}, this version reads {SCHEMA}; open it with a version that does"
            )
        try:
            frame, model = values["frame"], values["model"]
            height, width = frame["shape"]
            check_fields(values, {"tile_px": int, "stride_px": int, "fingerprint": str, "provenance": dict})
            check_fields(frame, {"l0_pixel": (int, float), "slide_mpp": (int, float), "l0_origin": (int, float, list)})
            return HeatmapMeta(
                frame=HeatmapFrame((height, width), frame["l0_origin"], frame["l0_pixel"], frame["slide_mpp"]),
                spec=_spec(model),
                tile_px=values["tile_px"],
                stride_px=values["stride_px"],
                fingerprint=values["fingerprint"],
                provenance=values["provenance"],
                encoding=Encoding(**{name: values["encoding"][name] for name in ("dtype", "low", "high")}),
            )
        except UsageError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UsageError(f"heatmap's own attributes are damaged ({one_line(error)}); make the heatmap again") from error


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """One class over a whole heatmap; None where nothing was predicted.

    predicted_px  heatmap pixels with a score
    present_px    those at or above the class's threshold
    area_mm2      their area
    """

    name: str
    predicted_px: int
    present_px: int
    mean: float | None
    max: float | None
    area_mm2: float | None


@dataclass(frozen=True, slots=True)
class HeatmapSummary:
    """Statistics of level 0, one per class in the model's order."""

    classes: tuple[ClassSummary, ...]


def write_heatmap(path: Path, meta: HeatmapMeta, read: Callable[[Box], NDArray[np.float32]]) -> HeatmapSummary:
    """Write the store at `path`, replacing what an interrupted write may have left there, and sum it up.

    `read(box)` gives the (C, h, w) float32 scores of a box in heatmap px, NaN where not predicted. It is called once per
    shard of level 0, in row-major order. Memory: about one shard per level. Files are not synced to disk here.
    Raises EnvironmentFault where the disk is full or gone.
    """
    encoding = meta.encoding
    levels = make_levels(len(meta.spec.classes), meta.frame.shape)
    attributes = {"ome": ngff_attributes(meta.frame, meta.spec, len(levels), _window(meta)), ATTRIBUTES: meta.to_json()}
    tallies = [_Tally(name, threshold) for name, threshold in zip(meta.spec.classes, meta.spec.threshold, strict=True)]
    with output_faults(path):
        if path.exists():
            shutil.rmtree(path)
        group = zarr.create_group(LocalStore(path), zarr_format=3, attributes=attributes)
        arrays = [
            _array(group, str(k), (level.shape, level.chunk, level.shard), ("c", "y", "x"), encoding.dtype, encoding.fill)
            for k, level in enumerate(levels)
        ]
        labels = _label_arrays(group, meta, levels) if has_labels(meta.spec) else []

        def put(level: int, box: Box, block: NDArray[np.float32]) -> None:
            with under_way("write"):
                arrays[level][:, *box.slices()] = encoding.encode(block)
                if labels:
                    labels[level][box.slices()] = label_block(block, meta.spec)

        gathers = [ShardGather(level) for level in levels[1:]]
        for shard in levels[0].shard_boxes():
            box, block = shard, _checked(read(shard), shard, len(tallies))
            for tally, scores in zip(tallies, block, strict=True):
                tally.add(scores)
            put(0, box, block)
            for k, gather in enumerate(gathers, start=1):
                whole = gather.add(box, block)
                if whole is None:
                    break
                box, block = whole
                put(k, box, block)
    return HeatmapSummary(tuple(tally.summary(meta.frame.mpp) for tally in tallies))


def _array(
    group: zarr.Group,
    name: str,
    cut: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    axes: tuple[str, ...],
    dtype: str,
    fill: float,
) -> zarr.Array[Any]:
    """A new array of `cut` (shape, chunk, shard)."""
    shape, chunk, shard = cut
    return group.create_array(
        name,
        shape=shape,
        chunks=chunk,
        shards=shard,
        dtype=dtype,
        fill_value=fill,
        compressors=codecs(),
        dimension_names=axes,
        config={"write_empty_chunks": False},  # not left to the user's zarr settings: it decides which files there are
    )


def _label_arrays(group: zarr.Group, meta: HeatmapMeta, levels: Sequence[Level]) -> list[zarr.Array[Any]]:
    """The arrays of the label image, a level each, cut as the heatmap's."""
    group.create_group("labels", attributes={"ome": {"version": NGFF_VERSION, "labels": [LABELS_NAME]}})
    attributes = {"ome": label_attributes(meta.frame, meta.spec, levels)}
    image = group.create_group(f"labels/{LABELS_NAME}", attributes=attributes)
    return [
        _array(image, str(k), (level.shape[1:], level.chunk[1:], level.shard[1:]), ("y", "x"), label_dtype(meta.spec), 0)
        for k, level in enumerate(levels)
    ]


def _window(meta: HeatmapMeta) -> Window:
    """(min, max, start, end) of what is stored: for viewers."""
    low, high = meta.spec.display
    if meta.encoding.dtype != "uint8":
        return low, high, low, high
    start, end = meta.encoding.encode(np.array([low, high], np.float32)).tolist()
    return 0, 255, start, end


def open_array(store: Path, name: str) -> zarr.Array[Any]:
    """An array of a store that this program wrote, for reading; nothing of it is read but its metadata.

    Raises UsageError for metadata that are damaged, name codecs that are not ours, or chunks larger than we write.
    """
    try:
        _check_array(read_object(store / name / "zarr.json"))
        return zarr.open_array(LocalStore(store / name, read_only=True), mode="r", zarr_format=3)
    except NOT_UNDERSTOOD as error:
        raise UsageError(f"{store} is damaged: array {name} cannot be opened ({one_line(error)}); make it again") from error


def _check_array(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError for more than a reader should be given."""
    if len(metadata["shape"]) > MOST_AXES or max(metadata["shape"], default=0) > MOST_PX:
        raise ValueError(f"its shape is {metadata['shape']}")
    chunk, stages = metadata["chunk_grid"]["configuration"]["chunk_shape"], metadata["codecs"]
    if stages[0]["name"] == "sharding_indexed":
        inside = stages[0]["configuration"]
        chunk, stages = inside["chunk_shape"], [*inside["codecs"], *inside["index_codecs"], *stages[1:]]
    if unknown := {stage["name"] for stage in stages} - OWN_CODECS:
        raise ValueError(f"its codecs are {', '.join(sorted(map(str, unknown)))}")
    if math.prod(chunk) * 8 > MOST_CHUNK_BYTES:
        raise ValueError(f"its chunks are {chunk}")


def codecs() -> list[ZstdCodec | Crc32cCodec]:
    """What chunks go through. crc32c guards the compressed bytes, header included; zstd alone passes most flipped bits on."""
    return [ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()]


def _checked(block: NDArray[np.float32], box: Box, classes: int) -> NDArray[np.float32]:
    if block.dtype != np.float32 or block.shape != (classes, *box.shape):
        raise ValueError(f"scores of {box} are {block.dtype} {block.shape}; they must be float32 {(classes, *box.shape)}")
    return block


class _Tally:
    """Running statistics of one class."""

    def __init__(self, name: str, threshold: float) -> None:
        self._name = name
        self._threshold = np.float32(threshold)  # scores are float32: 0.7 must count as at or above 0.7
        self._predicted = 0
        self._present = 0
        self._sum = 0.0
        self._max = -np.inf

    def add(self, scores: NDArray[np.float32]) -> None:
        values = scores[~np.isnan(scores)]
        if values.size:
            self._predicted += values.size
            self._present += int(np.count_nonzero(values >= self._threshold))
            self._sum += float(values.sum(dtype=np.float64))
            self._max = max(self._max, float(values.max()))

    def summary(self, mpp: float) -> ClassSummary:
        if not self._predicted:
            return ClassSummary(self._name, 0, 0, None, None, None)
        area_mm2 = self._present * mpp**2 / 1e6
        return ClassSummary(self._name, self._predicted, self._present, self._sum / self._predicted, self._max, area_mm2)


def _spec(model: Mapping[str, Any]) -> ModelSpec:
    rules: dict[str, Any] = {"read": ReadRule(**model["read"])}
    if model.get("detections"):
        rules["detections"] = DetectionRule(**model["detections"])
    return ModelSpec(**{**{k: _tuple(v) for k, v in model.items()}, **rules})


def _tuple(value: Any) -> Any:
    """JSON has no tuples; the model's card has no lists."""
    return tuple(value) if isinstance(value, list) else value
