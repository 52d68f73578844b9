"""What a model is to the rest: a frozen description and a function from uint8 tiles to scores.

Promise: everything that decides how tiles are cut for a model is in its `ModelSpec`, readable without loading weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast, runtime_checkable

from pathology.errors import ModelError

if TYPE_CHECKING:  # the command's start waits for what it imports
    import numpy as np
    from numpy.typing import NDArray

# "": RGB; else what the network is given instead: see `pathology.stain.parameters`.
StainInput = Literal["", "macenko", "eosin-haematoxylin-od"]
# Names of models are folders beside and above files that end so.
RESERVED_ENDINGS = (".png", ".json", ".geojson", ".csv", ".parquet", ".zarr", ".tmp")
# Columns of a table of tiles beside their scores.
PLACE_COLUMNS = ("minx", "miny", "width", "height", "coverage")

Output = Literal["classes", "map", "detections", "features"]


@dataclass(frozen=True, slots=True)
class ReadRule:
    """How a tile's pixels are taken from the slide before the model sees them.

    level     "best": the coarsest level still at least as fine as the model's mpp; "0": always level 0
    margin    True: pixels just outside the tile take part in the resize (no seams between neighbours);
              False: the tile is cut out first, then resized alone, as torchvision-style transforms do
    filter    "area": exact area mean at whole-number ratios, antialiased bilinear elsewhere;
              "bilinear", "bicubic": Pillow's antialiased filters
    """

    level: Literal["best", "0"] = "best"
    margin: bool = True
    filter: Literal["area", "bilinear", "bicubic"] = "area"


@dataclass(frozen=True, slots=True)
class DetectionRule:
    """What a detector answers, and when two of its answers are one object.

    most       most objects of a tile
    vertices   points of an object's outline: 0 for a point, 2 for a box (two opposite corners), 3 and more for a contour
    nms_px     of points: one closer than this to a better one, in grid px, is the same object
    nms_iou    of boxes and contours (their boxes): one that shares this of their union with a better one is the same object
    margin_px  input px from a tile's edges in which its objects, maybe cut, count only where no other tile sees them whole
    """

    most: int = 1024
    vertices: int = 0
    nms_px: float = 4.0
    nms_iou: float = 0.5
    margin_px: int = 0

    def __post_init__(self) -> None:
        if self.most < 1 or self.vertices < 0 or self.vertices == 1 or self.margin_px < 0:
            raise ModelError(
                f"detections: most {self.most}, {self.vertices} vertices, margin {self.margin_px} px do not fit; "
                "most is 1 or more, vertices 0, 2 or more, a margin 0 or more"
            )
        if not (0 < self.nms_px < float("inf") and 0 < self.nms_iou <= 1):
            raise ModelError(
                f"detections: nms_px {self.nms_px}, nms_iou {self.nms_iou} do not fit; use more than 0 px, and a share up to 1"
            )

    @property
    def columns(self) -> int:
        """Numbers of one object in a model's answer: y, x, class, score, then y, x of each vertex."""
        return 4 + 2 * self.vertices


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model's card: names and numbers only.

    name         the folder its results go to; letters, digits, `-`, `_`, `.`
    sha256       hex digest of what decides its answers (weights, or source for a built-in)
    classes      one name per output channel; none for features
    mpp          um per pixel of the grid on which `tile_px` and strides are counted
    tile_px      side of a tile in pixels at `mpp`
    input_px     side of the array the model is given, in pixels (= tile_px unless the model resizes)
    output_px    side of its answer per tile: 1 for a tile classifier, up to tile_px for a dense map; of a detector, into how
                  many pixels a side the heatmap of density divides a tile
    stain        what is made of RGB by the slide's own stains before the network sees it; "": nothing
    margin_px    pixels from the edges of a dense answer that count only where no other tile answers: where padding is seen
    scores       "probability" (0..1, columns `prob_<class>`) or "value" (any number, columns `<class>`)
    units        of a value, for people ("nuclei per mm2"); "" for probabilities
    threshold    a class counts as present at or above this score, one number per class
    colors       "#rrggbb" per class for viewers
    display      (low, high) score range of colour scales
    read         how pixels are taken from the slide
    features     length of the vector that an embedding model answers for a tile; 0: it answers scores
    detections   what a detector answers; None: it is none
    """

    name: str
    sha256: str
    classes: tuple[str, ...]
    mpp: float
    tile_px: int
    input_px: int
    output_px: int = 1
    scores: Literal["probability", "value"] = "probability"
    units: str = ""
    threshold: tuple[float, ...] = ()
    colors: tuple[str, ...] = ()
    display: tuple[float, float] = (0.0, 1.0)
    read: ReadRule = ReadRule()
    margin_px: int = 0
    features: int = 0
    detections: DetectionRule | None = None
    stain: StainInput = ""

    def __post_init__(self) -> None:
        if self.features < 0 or (self.features and (self.classes or self.output_px != 1 or self.detections)):
            raise ModelError(
                f"model {self.name}: a vector of {self.features} features a tile has no classes, maps or detections; "
                "state either features or the others"
            )
        if self.detections and (self.output_px < 2 or 2 * self.detections.margin_px >= self.input_px or self.margin_px):
            raise ModelError(
                f"model {self.name}: detections need an output of 2 px or more for their density, and a margin of their own "
                f"that leaves something of {self.input_px} px; correct output_px or the margin"
            )
        if self.name.casefold().endswith(RESERVED_ENDINGS):
            raise ModelError(
                f"model {self.name}: a name that ends in {self.name.rpartition('.')[2]} would be taken for one of a result's "
                "files; choose another"
            )
        if taken := sorted(set(self.columns()) & set(PLACE_COLUMNS)):
            raise ModelError(f"model {self.name}: class {taken[0]} is also a column of a tile's place; rename the class")
        if (not self.classes and not self.features) or len(set(self.classes)) != len(self.classes):
            raise ModelError(f"model {self.name}: classes {self.classes} must be one or more different names")
        if not 0.05 <= self.mpp <= 100:
            raise ModelError(f"model {self.name}: mpp {self.mpp} um/px is outside 0.05..100; correct it in the model's card")
        if self.tile_px < 1 or self.input_px < 1 or not 1 <= self.output_px <= max(self.tile_px, self.input_px):
            raise ModelError(
                f"model {self.name}: tile {self.tile_px}, input {self.input_px}, output {self.output_px} px do not fit; "
                "all must be at least 1 and the output no larger than the tile"
            )
        if not 0 <= 2 * self.margin_px < self.output_px:
            raise ModelError(
                f"model {self.name}: margin {self.margin_px} px leaves nothing of an answer of {self.output_px} px; "
                "make it smaller"
            )
        for field in ("threshold", "colors"):
            values = getattr(self, field)
            if values and len(values) != len(self.classes):
                raise ModelError(
                    f"model {self.name}: {len(values)} values in {field} for {len(self.classes)} classes; give one each"
                )
        if not self.threshold and self.classes:
            object.__setattr__(self, "threshold", (0.5,) * len(self.classes))

    @property
    def output(self) -> Output:
        """What kind of answer the model gives for a tile."""
        if self.features:
            return "features"
        if self.detections:
            return "detections"
        return "classes" if self.output_px == 1 else "map"

    @property
    def channels(self) -> int:
        """Numbers per pixel of an answer: a score a class, or the features."""
        return self.features or len(self.classes)

    @property
    def margins_px(self) -> int:
        """Grid px by which neighbouring tiles must overlap, so that each one's margins lie inside another's."""
        if self.detections:
            return math.ceil(2 * self.detections.margin_px * self.tile_px / self.input_px)
        return math.ceil(2 * self.margin_px * self.tile_px / self.output_px)

    def answer_shape(self, batch: int) -> tuple[int, ...]:
        """The shape of the answer for so many tiles; a detector may answer fewer objects, up to the second number."""
        if self.detections:
            return batch, self.detections.most, self.detections.columns
        return batch, self.channels, self.output_px, self.output_px

    def columns(self) -> tuple[str, ...]:
        """One table column per class: `prob_<class>` for probabilities, `<class>` otherwise."""
        return tuple(f"prob_{c}" if self.scores == "probability" else c for c in self.classes)


@runtime_checkable
class Model(Protocol):
    """Loaded and ready on its device. Called from one thread of a process at a time."""

    @property
    def spec(self) -> ModelSpec: ...

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, input_px, input_px, 3) uint8 RGB -> float32 of `spec.answer_shape(B)`.

        Scores (B, C, output_px, output_px), activation applied; features (B, D, 1, 1); objects (B, N, columns), y, x and the
        outline in continuous px of the input, the class by its number, and NaN in all of a row that is no object.
        """
        ...


@runtime_checkable
class StainedModel(Protocol):
    """A model whose card names a stain input: it is given the stains of each tile's slide as well."""

    @property
    def spec(self) -> ModelSpec: ...

    def __call__(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32]) -> NDArray[np.float32]:
        """As `Model`; `stains`: (B, `stain.PARAMETERS`) float32."""
        ...


def answer(model: Model, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """What `model` answers to tiles, with their stains where it takes such."""
    return model(tiles) if stains is None else cast(StainedModel, model)(tiles, stains)


class Answer(Protocol):
    """Scores that a model is still working on."""

    def result(self) -> NDArray[np.float32]:
        """What the model's call would have returned, waited for."""
        ...


@runtime_checkable
class QueuedModel(Model, Protocol):
    """A model on a device that works by itself: several batches may be on their way, answered in the order they went in."""

    def staging(self, batch_size: int) -> NDArray[np.uint8]:
        """(batch_size, input_px, input_px, 3) uint8 zeros, in memory from which batches go up quickest."""
        ...

    def submit(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None = None) -> Answer:
        """Begin with a batch, which must stay as it is until its result was taken. From one thread at a time."""
        ...


def begin(model: QueuedModel, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None) -> Answer:
    """`answer`, begun."""
    return model.submit(tiles) if stains is None else model.submit(tiles, stains)
