"""Any torch network as a model: the same bits as by hand, precisions, compiling, overlapping batches on a made-up device."""

from __future__ import annotations

import copy
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from pathology import device
from pathology.errors import EnvironmentFault, ModelError, UsageError
from pathology.model import Model, ModelSpec, QueuedModel
from pathology.models import pieces
from pathology.models.fold import folded
from pathology.models.halving import QueuedHalvingModel, halving
from pathology.models.network import QueuedNetwork, TorchNetwork, halve

SIDE, CLASSES = 24, 3
MEAN, STD = (0.7238, 0.5716, 0.6779), (0.112, 0.1459, 0.1089)

Tiles = NDArray[np.uint8]


class Net(nn.Module):
    """Convolution, norm, linear head."""

    def __init__(self, dense: bool = False, norm: bool = True) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity()
        self.second = nn.Conv2d(8, CLASSES if dense else 16, 3, padding=1)
        self.head = nn.Identity() if dense else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.relu(self.norm(self.first(x)))))  # type: ignore[no-any-return]


class Pair(nn.Module):
    """Answers two things."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def spec(output_px: int = 1, classes: int = CLASSES) -> ModelSpec:
    names = tuple(f"c{i}" for i in range(classes))
    return ModelSpec(name="net", sha256="0", classes=names, mpp=0.5, tile_px=SIDE, input_px=SIDE, output_px=output_px)


def noise(count: int, seed: int = 0) -> Tiles:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def by_hand(network: nn.Module, tiles: Tiles) -> torch.Tensor:
    shift, scale = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    with torch.inference_mode():
        answer: torch.Tensor = network((torch.from_numpy(tiles).permute(0, 3, 1, 2).float() - shift) / scale)
    return answer


def scripted(network: nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        made: torch.jit.ScriptModule = torch.jit.script(network)
        return made


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("piece", [1, 2, 4])
@pytest.mark.parametrize("kind", ["module", "script"])
def test_scores_are_those_by_hand_piece_by_piece(kind: str, piece: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Net(norm=False).eval()
    monkeypatch.setattr(pieces, "PIECE_PX", piece * SIDE**2)
    monkeypatch.setattr(device, "_threads", threads)
    network = scripted(net) if kind == "script" else copy.deepcopy(net)
    model = TorchNetwork(spec(), network, mean=MEAN, std=STD, activation="softmax")
    assert isinstance(model, Model)
    assert not isinstance(model, QueuedModel)
    for seed in (1, 2, 1):
        parts = [by_hand(net, noise(4, seed)[first : first + piece]) for first in range(0, 4, piece)]
        expected = torch.cat(parts).softmax(1).numpy()[:, :, None, None]
        np.testing.assert_array_equal(model(noise(4, seed)), expected)
    assert model(noise(2)).shape == (2, CLASSES, 1, 1)  # another batch size


@pytest.mark.parametrize(
    ("batch_size", "tile_px", "tiles"), [(32, 224, 8), (30, 224, 6), (31, 224, 1), (4, 224, 4), (8, 999, 1)]
)
def test_pieces_are_alike_and_no_larger_than_stated(batch_size: int, tile_px: int, tiles: int) -> None:
    assert pieces.piece_tiles(batch_size, tile_px) == tiles


class Counting(nn.Module):
    """Notes how many threads each of its callers has."""

    seen: ClassVar[dict[str, int]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen[threading.current_thread().name] = torch.get_num_threads()
        return x.mean((2, 3))


def test_threads_that_no_piece_needs_are_shared_among_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_PX", 2 * SIDE**2)
    model, before = TorchNetwork(spec(), Counting()), torch.get_num_threads()
    try:
        for threads, expected in ((1, [1]), (2, [1, 1]), (5, [2, 2])):
            monkeypatch.setattr(device, "_threads", threads)
            Counting.seen.clear()
            for _ in range(20):  # so that no thread is left without a piece by chance
                model(noise(4))
            assert list(Counting.seen.values()) == expected
    finally:
        torch.set_num_threads(before)


class Remembers(nn.Module):
    """Keeps a piece's mean in the module, and looks at it again a little later."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, CLASSES)
        self.kept = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = x.mean((2, 3))
        for _ in range(50):
            x = x.sin()
        return self.head(self.kept)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["module", "script", "hook", "uncopied"])
def test_pieces_of_a_network_that_keeps_things_do_not_mix(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_PX", SIDE**2)
    monkeypatch.setattr(device, "_threads", 4)
    torch.manual_seed(0)
    network: nn.Module = Remembers().eval()
    tiles = noise(16)
    expected = by_hand(network, tiles).numpy()[:, :, None, None]
    made: nn.Module = scripted(network) if kind == "script" else network
    if kind == "hook":
        kept: list[torch.Tensor] = []
        made = nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(1), copy.deepcopy(network.head))
        made[2].register_forward_hook(lambda _, __, answer: kept.append(answer))
        made[3].register_forward_pre_hook(lambda _, __: (time.sleep(0.002), kept.pop(0))[1])
    elif kind == "uncopied":
        made.lock = threading.Lock()  # type: ignore[assignment]
    model = TorchNetwork(spec(), made, mean=MEAN, std=STD)
    for _ in range(5):
        np.testing.assert_allclose(model(tiles), expected, atol=1e-5)
    if kind == "module":
        copies = {id(model._network_here())}
        assert copies  # the weights of a copy are the network's own
        assert model._network_here().head.weight is model._network.head.weight


# Norms folded into convolutions


def test_norms_are_folded_and_scores_stay(net: Net) -> None:
    given(net.norm)
    model = TorchNetwork(spec(), copy.deepcopy(net), mean=MEAN, std=STD)
    assert isinstance(model._network.norm, nn.Identity)
    expected = by_hand(net, noise(4)).numpy()[:, :, None, None]
    np.testing.assert_allclose(model(noise(4)), expected, atol=1e-5)
    assert isinstance(net.norm, nn.BatchNorm2d)


class Twice(nn.Module):
    """Its convolution serves two answers, of which one is normed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, CLASSES, 3, padding=1), nn.BatchNorm2d(CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y  # type: ignore[no-any-return]


class Again(Twice):
    """It calls its convolution once with the norm and once without."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) + self.conv(x.flip(-1))  # type: ignore[no-any-return]


class Weighs(Twice):
    """It looks at the convolution's weights by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) * self.conv.weight.sum()  # type: ignore[no-any-return]


class Decides(Twice):
    """What it computes depends on values, so it cannot be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) if x.mean() > 0 else x  # type: ignore[no-any-return]


class Listened(Twice):
    """Somebody looks at what its convolution answers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(lambda *_: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


class Looks(Twice):
    """It treats norms in a way of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.conv, self.norm):
            x = layer(x)
            if isinstance(layer, nn.BatchNorm2d):
                x = torch.relu(x)
        return x


class Aside(Twice):
    """It calls its convolution through a list, where no module is looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.conv]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layers[0](x))  # type: ignore[no-any-return]


class Alias(Twice):
    """Its convolution has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(self.conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.stem(x))  # type: ignore[no-any-return]


class Biased(Twice):
    """What it does depends on whether the convolution has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CLASSES, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        return y if self.conv.bias is None else -y  # type: ignore[no-any-return]


class Reads(Twice):
    """It reads the norm's statistics."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) * self.norm.num_features  # type: ignore[no-any-return]


class Collects(Twice):
    """It keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return self.norm(self.conv(self.seen[0]))  # type: ignore[no-any-return]


class Trains(Twice):
    """Its norm stays in training mode."""

    def train(self, mode: bool = True) -> Trains:
        super().train(mode)
        self.norm.train()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


class Patched(Twice):
    """Its norm does more than a norm."""

    def __init__(self) -> None:
        super().__init__()
        plain = self.norm.forward
        self.norm.forward = lambda x: plain(x).relu()  # type: ignore[method-assign]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "kind", [Twice, Again, Weighs, Decides, Listened, Looks, Aside, Alias, Biased, Reads, Collects, Trains, Patched]
)
def test_a_norm_is_left_where_folding_would_change_more_than_last_bits(kind: type[Twice]) -> None:
    torch.manual_seed(2)
    network = kind().eval()
    given(network.norm)
    tiles = torch.rand(2, 3, SIDE, SIDE)
    untouched = copy.deepcopy(network.state_dict())
    assert folded(network, tiles) is network
    assert all(torch.equal(value, untouched[key]) for key, value in network.state_dict().items() if "running" not in key)
    assert isinstance(network.norm, nn.BatchNorm2d)
    answer = network(tiles)
    assert isinstance(answer, torch.Tensor)


def given(norm: nn.Module) -> None:
    """Statistics and weights as training leaves them."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)


def test_every_grey_level_of_every_channel_is_normalised_as_stated() -> None:
    ramp = np.zeros((1, 16, 16, 3), np.uint8)
    ramp[...] = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    card = ModelSpec(
        name="same", sha256="0", classes=("r", "g", "b"), mpp=0.5, tile_px=16, input_px=16, output_px=16, scores="value"
    )
    model = TorchNetwork(card, nn.Identity(), mean=MEAN, std=STD)
    mean, std = np.float32(255) * np.float32(MEAN), np.float32(255) * np.float32(STD)
    expected = ((ramp.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2)
    answer = model(ramp)
    np.testing.assert_array_equal(answer, expected)
    model(255 - ramp)
    np.testing.assert_array_equal(answer, expected)  # a network that answers its input does not lose it to the next batch


def test_the_network_is_given_channels_last_without_a_copy_each_time(net: Net) -> None:
    seen: list[torch.Tensor] = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model = TorchNetwork(spec(), net)
    seen.clear()  # what folding was tried on
    for seed in range(3):
        model(noise(2, seed))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert len({x.data_ptr() for x in seen}) == 1
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in net.parameters() if p.ndim == 4)
    assert not seen[0].requires_grad
    assert not net.training


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_a_dense_network_answers_maps(activation: Literal["softmax", "sigmoid", "none"]) -> None:
    torch.manual_seed(1)
    network = Net(dense=True, norm=False).eval()
    model = TorchNetwork(spec(SIDE), copy.deepcopy(network), mean=MEAN, std=STD, activation=activation)
    logits = by_hand(network, noise(2))
    expected = {"softmax": logits.softmax(1), "sigmoid": logits.sigmoid(), "none": logits}[activation]
    np.testing.assert_array_equal(model(noise(2)), expected.numpy())


@pytest.mark.parametrize(
    ("network", "card", "message"),
    [
        (Net(), spec(classes=2), r"net answered \(4, 3\) for 4 tiles, but its card names 2 classes; correct the card"),
        (Net(), spec(SIDE), r"answered \(4, 3\) for 4 tiles, but its card names 3 classes of 24 x 24 px"),
        (Net(dense=True), spec(), r"answered \(4, 3, 24, 24\)"),
        (Pair(), spec(), "answered a tuple for 4 tiles"),
    ],
)
def test_networks_that_break_their_card_are_refused(network: nn.Module, card: ModelSpec, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        TorchNetwork(card, network)(noise(4))


def test_a_full_device_is_no_fault_of_the_slide() -> None:
    class Full(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with pytest.raises(EnvironmentFault, match="no memory for a batch of 4 tiles; use a smaller --batch-size"):
        TorchNetwork(spec(), Full())(noise(4))


# Precision


class Squeezed(nn.Module):
    """A few numbers a tile through an activation that the processor computes for many at once."""

    def __init__(self, classes: int, inner: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, inner, 3), nn.Linear(inner, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.silu(self.first(x).mean(dim=(2, 3))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [3, 8, 24])
@pytest.mark.parametrize(("classes", "inner"), [(5, 8), (7, 6), (1, 6), (3, 1)])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_tiles_bits_do_not_depend_on_its_place(
    count: int, classes: int, inner: int, activation: Literal["sigmoid", "softmax"]
) -> None:
    torch.manual_seed(1)
    model = TorchNetwork(spec(classes=classes), Squeezed(classes, inner), activation=activation)
    tiles = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    first = model(tiles)
    for shift in range(1, count):
        assert np.roll(model(np.roll(tiles, shift, axis=0)), -shift, axis=0).tobytes() == first.tobytes()


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_maps_bits_do_not_depend_on_its_place(activation: Literal["sigmoid", "softmax"]) -> None:
    torch.manual_seed(1)
    side = 15
    network = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Conv2d(3, CLASSES, 1))
    model = TorchNetwork(spec(side), network, activation=activation)
    tiles = np.random.default_rng(0).integers(0, 256, (7, SIDE, SIDE, 3), np.uint8)
    assert model(tiles[::-1].copy())[::-1].tobytes() == model(tiles).tobytes()


@pytest.mark.parametrize("kind", ["module", "script"])
def test_bf16_is_autocast_and_its_activation_is_float32(net: Net, kind: str) -> None:
    network = scripted(copy.deepcopy(net)) if kind == "script" else copy.deepcopy(net)
    model = TorchNetwork(spec(), network, mean=MEAN, std=STD, activation="softmax", precision="bf16")
    tiles = noise(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = by_hand(net, tiles)
    assert logits.dtype == torch.bfloat16
    scores = model(tiles)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores[..., 0, 0], logits.float().softmax(1).numpy())
    reference = TorchNetwork(spec(), net, mean=MEAN, std=STD, activation="softmax")(tiles)
    assert 0 < np.abs(scores - reference).max() < 0.01
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-6)


def test_only_weights_that_autocast_would_convert_are_halved(net: Net) -> None:
    class Own(nn.Conv2d):
        """Its weights may be reckoned with before they are used."""

    network = nn.Sequential(copy.deepcopy(net), Own(3, 3, 1))
    halve(network, torch.bfloat16)
    kinds = {name: p.dtype for name, p in network.named_parameters()}
    assert {n for n, dtype in kinds.items() if dtype == torch.float32} == {"0.norm.weight", "0.norm.bias", "1.weight", "1.bias"}


def test_fp16_on_the_cpu_is_refused(net: Net) -> None:
    with pytest.raises(UsageError, match="use --precision bf16 or fp32"):
        TorchNetwork(spec(), net, precision="fp16")


# Compiling


def test_torchscript_cannot_be_compiled(net: Net) -> None:
    with pytest.raises(ModelError, match=r"net is TorchScript, which torch\.compile does not take; leave out --compile"):
        TorchNetwork(spec(), scripted(net), compile=True)


def test_a_failed_compilation_is_one_line_and_no_fallback(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(network: nn.Module, **_: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(batch: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("\n  no C++ compiler here\n  a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    model = TorchNetwork(spec(), net, compile=True)
    for _ in range(2):
        with pytest.raises(ModelError) as caught:
            model(noise(1))
        assert str(caught.value) == ("model net cannot be compiled: RuntimeError: no C++ compiler here; leave out --compile")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its own parts
def test_a_compiled_network_gives_its_scores(net: Net) -> None:
    model = TorchNetwork(spec(), copy.deepcopy(net), mean=MEAN, std=STD, activation="softmax", compile=True)
    first = model(noise(4))
    np.testing.assert_allclose(first[..., 0, 0], by_hand(net, noise(4)).softmax(1), atol=1e-5)
    np.testing.assert_array_equal(model(noise(4)), first)


# Overlapping batches


class FakeMark:
    def __init__(self, queue: FakeQueue, place: int) -> None:
        self.queue, self.place = queue, place

    def synchronize(self) -> None:
        self.queue.reach(self.place)


class FakeQueue:
    """Does nothing before it is waited for, and then no more than that needs; an eager one does all at once."""

    def __init__(self, name: str, log: list[str], eager: bool) -> None:
        self.name, self.log, self.eager = name, log, eager
        self.work: list[Callable[[], object] | FakeMark] = []
        self.done = 0

    def run(self, work: Callable[[], object]) -> None:
        self.work.append(work)
        if self.eager:
            self.reach(len(self.work))

    def after(self, mark: FakeMark) -> None:  # type: ignore[override]  # its own marks only
        self.work.append(mark)

    def mark(self) -> FakeMark:
        return FakeMark(self, len(self.work))

    def reach(self, place: int) -> None:
        while self.done < place:
            work = self.work[self.done]
            self.done += 1
            if isinstance(work, FakeMark):
                work.synchronize()
            else:
                work()
                self.log.append(self.name)


class FakeQueues:
    """A device that is the CPU: the order in which its queues work is the most unkind that the marks allow."""

    def __init__(self, eager: tuple[str, ...] = ()) -> None:
        self.log: list[str] = []
        self.pins: list[tuple[int, ...]] = []
        self.memories: list[tuple[int, ...]] = []
        self.upload, self.compute, self.download = (
            FakeQueue(name, self.log, name in eager) for name in ("upload", "compute", "download")
        )

    def memory(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        self.memories.append(shape)
        return torch.full(shape, 77, dtype=getattr(torch, dtype))

    def pinned(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        self.pins.append(shape)
        return torch.full(shape, 99, dtype=getattr(torch, dtype))


class OnFakeDevice(TorchNetwork):
    """A network whose tensors on the device are the CPU's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(spec(), network, mean=MEAN, std=STD, activation="softmax")
        self._shift, self._scale = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))


EAGER = [(), ("upload",), ("upload", "compute"), ("compute",), ("download",), ("upload", "compute", "download")]


@pytest.mark.parametrize("eager", EAGER, ids=lambda e: "+".join(e) or "lazy")
def test_overlapping_batches_give_the_plain_scores(net: Net, eager: tuple[str, ...]) -> None:
    plain = TorchNetwork(spec(), copy.deepcopy(net), mean=MEAN, std=STD, activation="softmax")
    queues = FakeQueues(eager)
    model = QueuedNetwork(OnFakeDevice(net), queues)
    assert isinstance(model, QueuedModel)
    staging = [model.staging(4) for _ in range(3)]
    assert all((array == 0).all() for array in staging)
    expected, answers, taken = [], [], []
    for number in range(9):
        array = staging[number % 3]
        array[...] = noise(4, number)
        expected.append(plain(array))
        answers.append(model.submit(array))
        if len(answers) == 3:
            taken.append(answers.pop(0).result())
    taken += [answer.result() for answer in answers]
    for found, wanted in zip(taken, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert [queues.log.count(name) for name in ("upload", "compute", "download")] == [9, 9, 9]
    assert queues.memories == [(4, SIDE, SIDE, 3)] * 2  # two batches of device memory, however many pass through


def test_nothing_waits_on_the_host_but_a_result(net: Net) -> None:
    queues = FakeQueues()
    model = QueuedNetwork(OnFakeDevice(net), queues)
    arrays = [model.staging(2) for _ in range(4)]
    answers = [model.submit(array) for array in arrays]
    assert queues.log == []
    answers[0].result()
    assert queues.log == ["upload", "compute", "download"]
    answers[3].result()
    assert queues.log.count("compute") == 4


def test_memory_of_a_slot_is_written_only_after_what_read_it(net: Net) -> None:
    """Results that nobody takes guard their slots all the same: the third upload waits for the first computation."""
    queues = FakeQueues(eager=("upload",))
    model = QueuedNetwork(OnFakeDevice(net), queues)
    for _ in range(2):
        model.submit(noise(2))
    assert queues.log == ["upload", "upload"]
    model.submit(noise(2))
    assert queues.log == ["upload", "upload", "compute", "upload"]


def test_another_batch_size_waits_for_the_old_slots(net: Net) -> None:
    queues = FakeQueues()
    model = QueuedNetwork(OnFakeDevice(net), queues)
    first = model.submit(noise(4))
    np.testing.assert_array_equal(
        model(noise(2)), TorchNetwork(spec(), net, mean=MEAN, std=STD, activation="softmax")(noise(2))
    )
    assert queues.log[:3] == ["upload", "compute", "download"]
    assert first.result().shape == (4, CLASSES, 1, 1)


def test_a_device_that_fills_up_is_asked_for_less(net: Net) -> None:
    class Filling(nn.Module):
        """Finds memory for a first batch of any size, and for no more than two tiles after it."""

        def __init__(self, loaded: nn.Module) -> None:
            super().__init__()
            self.net = loaded

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            if len(sizes) > 1 and len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
            answer: torch.Tensor = self.net(x)
            return answer

    sizes: list[int] = []
    device = OnFakeDevice(copy.deepcopy(net))
    device._network = Filling(device._network)  # once it is loaded, with its norms folded
    queues = FakeQueues(eager=("upload", "compute"))
    model = halving(QueuedNetwork(device, queues))
    assert isinstance(model, QueuedHalvingModel)
    arrays = [model.staging(5) for _ in range(3)]
    for number, array in enumerate(arrays):
        array[...] = noise(5, number)
    answers = [model.submit(array) for array in arrays]
    plain = TorchNetwork(spec(), net, mean=MEAN, std=STD, activation="softmax")
    assert sizes == [5, 5, 2, 2, 2, 2, 2, 2]
    np.testing.assert_array_equal(answers[0].result(), plain(noise(5, 0)))
    for number in (1, 2):
        padded = np.concatenate([noise(5, number), np.zeros((1, SIDE, SIDE, 3), np.uint8)])
        by_twos = np.concatenate([plain(padded[first : first + 2]) for first in (0, 2, 4)])
        np.testing.assert_array_equal(answers[number].result(), by_twos[:5])
    assert model.sizes.answered() == {5: 1, 2: 2}
