"""Any torch network as a model: uint8 tiles in, float32 scores out, on one device and in one precision.

Promise: in fp32 the scores are those of `(tile - 255 * mean) / (255 * std)` in float32 given to the network as NCHW, then its
activation in float32, with the bits of `folded`, of `quicker`, and of batches as large as `piece_tiles`. Where the card names a
stain input, `tile` is the stained tile. Every model that is a torch network runs through here, whatever it was stored in.

The tiles stay NHWC in memory. Seen as NCHW that is torch's channels_last, which convolutions like best; making it
contiguous would only cost a copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathology.device import CudaQueues, Mark, Queues, check_precision, thread_count
from pathology.errors import ModelError, OutOfMemory
from pathology.job import Precision
from pathology.model import Model, ModelSpec
from pathology.models.checks import made_up_batch
from pathology.models.fold import folded
from pathology.models.objects import Form, log_odds, object_rows
from pathology.models.packed import packed
from pathology.models.pieces import Crew, piece_tiles, twin, usual_batch
from pathology.models.stained import Stainer
from pathology.models.winograd import quicker
from pathology.stain import PARAMETERS

if TYPE_CHECKING:
    import torch

Activation = Literal["softmax", "sigmoid", "none"]
Colour = tuple[float, float, float]

# Their weights go to the tensor units in half precision; autocast would convert them again at every call.
HALVED = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear")

# Batches whose upload, computation and download overlap.
SLOTS = 2


class TorchNetwork:
    """A torch module on one device, called synchronously.

    network      a Module or ScriptModule that takes (B, 3, input_px, input_px) float32 and answers logits or values,
                 (B, C) or (B, C, output_px, output_px), features (B, D), or objects in some `form`
    mean, std    of each channel of 0..1 colours
    activation   over the classes, in float32 whatever the precision
    form         of a detector: how its answer names objects
    precision    bf16 and fp16 compute convolutions and products in that type, norms and sums in float32 (autocast)
    compile      torch.compile the network at its first call
    """

    def __init__(
        self,
        spec: ModelSpec,
        network: torch.nn.Module,
        *,
        mean: Colour = (0.0, 0.0, 0.0),
        std: Colour = (1.0, 1.0, 1.0),
        activation: Activation = "none",
        form: Form = "peaks",
        device: str = "cpu",
        precision: Precision = "fp32",
        compile: bool = False,
    ) -> None:
        import torch

        check_precision(precision, device)
        self.spec = spec
        self.device = torch.device(device)
        self._activation = activation
        self._form: Form = form
        self._pool = 1
        self._dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self._network: Any = network.eval().to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._scripted = isinstance(network, torch.jit.ScriptModule)
        if self._dtype is not None:
            halve(self._network, self._dtype)
        elif not self._scripted:
            self._network = folded(self._network, self._made_up())
            if self.device.type == "cpu" and not compile:
                at_once = piece_tiles(usual_batch(spec.input_px), spec.input_px)
                self._network = packed(quicker(self._network, self._made_up(), at_once), self._made_up(), at_once)
        self._alone = compile or keeps_state(self._network)
        self._compiling = compile
        if compile:
            if self._scripted:
                raise ModelError(f"model {spec.name} is TorchScript, which torch.compile does not take; leave out --compile")
            self._network = torch.compile(self._network, dynamic=False)
        self._shift = 255 * torch.tensor(mean, dtype=torch.float32)
        self._scale = 255 * torch.tensor(std, dtype=torch.float32)
        if self.device.type == "cpu":
            # As long as a row of pixels, so that three numbers are not spread over each pixel apart.
            self._shift, self._scale = self._shift.repeat(spec.input_px), self._scale.repeat(spec.input_px)
        else:
            self._shift, self._scale = (v.to(self.device).view(1, 3, 1, 1) for v in (self._shift, self._scale))
        self._stainer = Stainer(spec.stain, self.device) if spec.stain else None
        self._steady: dict[int, bool] = {}
        self._crew = Crew()
        self._copying = threading.Lock()
        self._own = threading.local()

    def __call__(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """(B, input_px, input_px, 3) uint8 RGB -> float32 of `spec.answer_shape(B)`.

        stains  (B, `stain.PARAMETERS`) float32 where the card names a stain input
        """
        import torch

        if self.device.type != "cpu":
            with torch.inference_mode():
                colours = None if stains is None else torch.from_numpy(stains).to(self.device)
                return _array(self.scores(torch.from_numpy(tiles).to(self.device), colours).cpu())
        size = piece_tiles(len(tiles), self.spec.input_px)
        if size > 1 and size not in self._steady:
            scores = self._try_places(size, tiles, stains)
            if scores is not None:
                return scores
        return self._in_pieces(tiles, stains, size if self._steady.get(size, True) else 1)

    def _in_pieces(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None, size: int) -> NDArray[np.float32]:
        import torch

        scores = np.empty(self.spec.answer_shape(len(tiles)), np.float32)

        def compute(first: int) -> None:
            piece = slice(first, first + size)
            with torch.inference_mode():
                batch = self._normalised(tiles[piece], None if stains is None else stains[piece])
                scores[piece] = self._forward(batch).numpy()

        firsts = range(0, len(tiles), size)
        self._crew.run(compute, firsts, self._alone)
        return scores

    def _try_places(
        self, size: int, given: NDArray[np.uint8], its_stains: NDArray[np.float32] | None
    ) -> NDArray[np.float32] | None:
        """Find out whether a tile has the same bits wherever it lies in a piece of `size`: by made-up tiles in two orders.

        The processor computes sigmoid, SiLU and their like for many numbers at once, and otherwise for the few left at an
        array's end, which belong to the last tiles. Taken for the same: a network that does not take a tile by itself.

        Returns the scores of `given`, if it is what was made up: as it is by who warms the network up.
        """
        tiles, stains = made_up_batch(self.spec, size * thread_count())  # the stains of all are the same
        scores = self._in_pieces(tiles, stains, size)
        self._steady[size] = scores[::-1].tobytes() == self._in_pieces(tiles[::-1].copy(), stains, size).tobytes()
        if not self._steady[size]:
            try:
                self._in_pieces(tiles[:1], None if stains is None else stains[:1], 1)
            except Exception:  # exported for batches of one size
                self._steady[size] = True
        same = np.array_equal(given, tiles) and (its_stains is None or stains is None or np.array_equal(its_stains, stains))
        return scores if same and self._steady[size] else None

    def pool(self, spec: ModelSpec) -> None:
        """Answer maps of `spec.output_px` from now on: means over squares of the network's own pixels, taken on the device."""
        self._pool *= self.spec.output_px // spec.output_px
        self.spec = spec

    def scores(self, tiles: torch.Tensor, stains: torch.Tensor | None = None) -> torch.Tensor:
        """(B, S, S, 3) uint8 on the device -> float32 of `spec.answer_shape(B)` there; for any device but the CPU."""
        import torch

        with torch.inference_mode():
            colours = self._stained(tiles, stains) if self._stainer else tiles.to(torch.float32)
            return self._forward(colours.permute(0, 3, 1, 2).sub_(self._shift).div_(self._scale))

    def _stained(self, tiles: torch.Tensor, stains: torch.Tensor | None) -> torch.Tensor:
        if self._stainer is None or stains is None:
            raise ModelError(f"model {self.spec.name} takes tiles stained as {self.spec.stain}, and was given no stains")
        return self._stainer(tiles, stains)

    def _normalised(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None) -> torch.Tensor:
        """(B, S, S, 3) uint8 -> (B, 3, S, S) float32, in a buffer of this thread that its next call writes over.

        In place, three passes over a piece that stays in the cache: 0.17 ms a 224-px tile on one core, 0.65 ms with new memory,
        0.31 ms for the fastest gather from a table of 256 x 3 values.
        """
        import torch

        if self._stainer:
            stained = self._stained(torch.from_numpy(tiles), None if stains is None else torch.from_numpy(stains))
            stained.view(len(tiles), tiles.shape[1], -1).sub_(self._shift).div_(self._scale)
            return stained.permute(0, 3, 1, 2)
        normal: torch.Tensor | None = getattr(self._own, "normal", None)
        if normal is None or normal.shape != tiles.shape:
            normal = self._own.normal = torch.empty(tiles.shape, dtype=torch.float32)
        count, side = tiles.shape[:2]
        rows = normal.view(count, side, -1)
        rows.copy_(torch.from_numpy(tiles).view(count, side, -1)).sub_(self._shift).div_(self._scale)
        return normal.permute(0, 3, 1, 2)

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) float32 -> the answer, after the activation. ModelError where the network breaks its card."""
        import torch

        try:
            with self._autocast(), self._as_it_is():
                logits = self._network_here()(batch)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"model {self.spec.name}: {self.device} has no memory for a batch of {len(batch)} tiles; "
                "use a smaller --batch-size"
            ) from error
        except Exception as error:
            if not self._compiling:
                raise
            raise ModelError(
                f"model {self.spec.name} cannot be compiled: {type(error).__name__}: {_line(error)}; leave out --compile"
            ) from error
        self._compiling = False
        count, classes, side = len(batch), self.spec.channels, self.spec.output_px * self._pool
        rule = self.spec.detections
        if rule is not None and isinstance(logits, torch.Tensor):
            answer = logits.to(torch.float32)
            if self._form != "peaks":
                return object_rows(answer, self._form, self.spec, rule)
            rank = self._each(log_odds, answer) if self._activation == "softmax" else answer
            return object_rows(self._activated(answer), "peaks", self.spec, rule, rank)
        shapes = [(count, classes, side, side)] + [(count, classes)] * (side == 1)
        if not isinstance(logits, torch.Tensor) or logits.shape not in shapes:
            got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
            maps = f" of {side} x {side} px" if side > 1 else ""
            kind = "features" if self.spec.features else "classes"
            raise ModelError(
                f"model {self.spec.name} answered {got} for {count} tiles, but its card names {classes} {kind}{maps}; "
                "correct the card"
            )
        scores = self._activated(logits.to(torch.float32)).view(count, classes, side, side)
        return scores if self._pool == 1 else torch.nn.functional.avg_pool2d(scores, self._pool)

    def _activated(self, logits: torch.Tensor) -> torch.Tensor:
        if self._activation == "none":
            return logits
        if self._activation == "sigmoid":
            return self._each(lambda tile: tile.sigmoid(), logits)
        return logits.softmax(dim=1) if logits.dim() == 2 else self._each(lambda tile: tile.softmax(dim=1), logits)

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor], answers: torch.Tensor) -> torch.Tensor:
        """`function` of (B, ...) answers: on the CPU of each by itself, so that its bits follow from it alone."""
        import torch

        if self.device.type != "cpu":
            return function(answers)
        return torch.cat([function(answers[at : at + 1]) for at in range(len(answers))])

    def _network_here(self) -> Any:
        """The network for this thread: pieces are computed side by side, and a forward may keep things in its module."""
        if self.device.type != "cpu" or self._scripted or self._alone:
            return self._network
        mine = getattr(self._own, "network", None)
        if mine is None:
            with self._copying:
                mine = self._own.network = twin(self._network)
        return mine

    def _made_up(self) -> torch.Tensor:
        """(1, 3, input_px, input_px) float32 on the device: noise on a ramp."""
        import torch

        shape = (1, 3, self.spec.input_px, self.spec.input_px)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        tile = noise + torch.linspace(-2, 2, noise.numel()).view(shape)
        return tile.to(self.device).contiguous(memory_format=torch.channels_last)

    def _autocast(self) -> AbstractContextManager[Any]:
        import torch

        return nullcontext() if self._dtype is None else torch.autocast(self.device.type, dtype=self._dtype)

    def _as_it_is(self) -> AbstractContextManager[Any]:
        """TorchScript's optimizer rewrites a network after its first calls: the same tile would get other last bits."""
        import torch

        return torch.jit.optimized_execution(False) if self._scripted else nullcontext()  # type: ignore[attr-defined]


class QueuedNetwork:
    """A network on a device with queues of its own: a batch uploads while another is computed and a third downloads.

    Device memory of a slot is written again only after the computation that read it; the queues wait for each other, the host
    waits for nothing but a result.
    """

    def __init__(self, network: TorchNetwork, queues: Queues) -> None:
        self.spec = network.spec
        self._network = network
        self._queues = queues
        self._slots: list[_Slot] = []
        self._count = 0

    def pool(self, spec: ModelSpec) -> None:
        """As the network's own."""
        self._network.pool(spec)
        self.spec = spec

    def __call__(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """(B, input_px, input_px, 3) uint8 RGB -> float32 of `spec.answer_shape(B)`, waited for."""
        return self.submit(tiles, stains).result()

    def staging(self, batch_size: int) -> NDArray[np.uint8]:
        """(batch_size, input_px, input_px, 3) uint8 zeros that the device can fetch by itself."""
        side = self.spec.input_px
        array: NDArray[np.uint8] = self._queues.pinned((batch_size, side, side, 3), "uint8").zero_().numpy()
        return array

    def submit(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None = None) -> Download:
        """Enqueue a batch. It must stay as it is until the result has been taken; from one thread at a time."""
        import torch

        upload, compute, download = self._queues.upload, self._queues.compute, self._queues.download
        slot = self._slot(tiles.shape)
        source = torch.from_numpy(tiles)
        answer = self._queues.pinned(self.spec.answer_shape(len(tiles)), "float32")

        def fetch() -> None:
            slot.tiles.copy_(source, non_blocking=True)
            if slot.stains is not None and stains is not None:  # a few numbers a tile, taken over before this returns
                slot.stains.copy_(torch.from_numpy(stains), non_blocking=True)

        def forward() -> None:
            slot.scores = self._network.scores(slot.tiles, slot.stains).contiguous()

        if slot.computed is not None:
            upload.after(slot.computed)
        upload.run(fetch)
        compute.after(upload.mark())
        if slot.downloaded is not None:
            compute.after(slot.downloaded)  # the scores before these, whose memory is let go of
        compute.run(forward)
        slot.computed = compute.mark()
        download.after(slot.computed)
        download.run(lambda: answer.copy_(slot.scores, non_blocking=True))
        slot.downloaded = download.mark()
        return Download(answer, slot.downloaded)

    def _slot(self, shape: tuple[int, ...]) -> _Slot:
        """The slot whose turn it is; all anew for another shape, once the old ones are done with."""
        if not self._slots or self._slots[0].tiles.shape != shape:
            for slot in self._slots:
                if slot.downloaded is not None:
                    slot.downloaded.synchronize()
            self._slots = [_Slot(self._queues.memory(shape, "uint8"), self._stains(shape[0])) for _ in range(SLOTS)]
        self._count += 1
        return self._slots[self._count % SLOTS]

    def _stains(self, batch_size: int) -> torch.Tensor | None:
        return self._queues.memory((batch_size, PARAMETERS), "float32") if self.spec.stain else None


class _Slot:
    """Device memory of one batch on its way, and the marks after which it may be used again."""

    def __init__(self, tiles: torch.Tensor, stains: torch.Tensor | None) -> None:
        self.tiles = tiles
        self.stains = stains
        self.scores: Any = None
        self.computed: Mark | None = None
        self.downloaded: Mark | None = None


class Download:
    """Scores on their way to the host."""

    def __init__(self, answer: torch.Tensor, done: Mark) -> None:
        self._answer = answer
        self._done = done

    def result(self) -> NDArray[np.float32]:
        """The answer, float32, once it is there."""
        self._done.synchronize()
        return _array(self._answer)


def on_its_device(network: TorchNetwork) -> Model:
    """`network` as it runs best on its device: with queues on CUDA, as it is elsewhere."""
    return QueuedNetwork(network, CudaQueues(network.device)) if network.device.type == "cuda" else network


def halve(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert once the weights that autocast to `dtype` would convert at every call; the same bits come out."""
    for module in network.modules():
        # Exact types only: a subclass may do arithmetic of its own on its weights, which autocast would do in float32.
        kind = getattr(module, "original_name", None) or (
            type(module).__name__ if type(module).__module__.startswith("torch.nn.") else ""
        )
        if kind in HALVED:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def keeps_state(network: torch.nn.Module) -> bool:
    """Whether pieces of a batch must not be computed side by side: a script sets attributes, somebody listens, or no copies."""
    import torch

    if isinstance(network, torch.jit.ScriptModule):
        return bool(network.inlined_graph.findAllNodes("prim::SetAttr", True))  # type: ignore[attr-defined]
    if any(module._forward_hooks or module._forward_pre_hooks for module in network.modules()):
        return True
    try:
        twin(network)
    except Exception:  # whatever its author keeps in it
        return True
    return False


def _array(scores: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = scores.numpy()
    return array


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
