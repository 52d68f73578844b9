"""Convolutions whose weights are laid out beforehand: the same bits, and left alone where it might not be so."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import networks
from pathology import device
from pathology.model import ModelSpec
from pathology.models.checks import warm_up
from pathology.models.network import TorchNetwork
from pathology.models.packed import packed

SIDE = 96  # one picture of a smaller side torch convolves by itself


def tiles(count: int, seed: int = 0, side: int = SIDE) -> torch.Tensor:
    made = torch.randn((count, 3, side, side), generator=torch.Generator().manual_seed(seed))
    return made.to(memory_format=torch.channels_last)


def ready(network: nn.Module) -> nn.Module:
    return network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def count_packed(network: nn.Module) -> int:
    return sum(type(module).__name__ == "Packed" for module in network.modules())


def convolutions() -> nn.Module:
    """Of every kind that is packed: strided, dilated, in groups, depthwise, of sides that differ, without bias."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, stride=2, padding=3),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(16, 32, 3, padding=1, groups=4),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.Conv2d(32, 8, (1, 3), padding=(0, 1)),
        nn.Conv2d(8, 4, 1),
    )


@pytest.mark.parametrize("made", [convolutions, networks.tiny, networks.resnet18, functools.partial(networks.make, "unet")])
def test_packed_convolutions_give_the_same_bits_in_batches_of_any_size(made: Any) -> None:
    torch.manual_seed(1)
    network = ready(made())
    ours = packed(network, tiles(1), 4)
    assert count_packed(network) == 0
    there = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert count_packed(ours) >= there // 3 > 0  # those of the largest pictures, at least
    with torch.inference_mode():
        for count in (1, 2, 4, 5):
            given = tiles(count, count)
            assert torch.equal(ours(given), network(given))
        assert torch.equal(ours(tiles(2, side=2 * SIDE)), network(tiles(2, side=2 * SIDE)))


def test_weights_other_than_of_convolutions_are_shared_and_those_can_be_looked_at() -> None:
    network = ready(networks.tiny())
    ours = packed(network, tiles(1), 8)
    assert ours[-1].weight is network[-1].weight  # type: ignore[index]
    assert torch.equal(ours[0].weight, network[0].weight)  # type: ignore[index]
    assert isinstance(ours[0], nn.Conv2d)  # type: ignore[index]


def test_what_is_no_number_is_passed_on() -> None:
    network = ready(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True)))
    ours = packed(network, tiles(1), 2)
    given = tiles(2)
    given[1, 2, 5, 5] = float("nan")
    with torch.inference_mode():
        theirs, answer = network(given), ours(given)
    assert int(theirs.isnan().sum()) == int(answer.isnan().sum()) == 9 * 8


def test_what_is_packed_does_not_depend_on_how_many_threads_torch_has() -> None:
    before = torch.get_num_threads()
    network, found = ready(networks.resnet50()), set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.add(count_packed(packed(network, tiles(1), 8)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


class One(nn.Module):
    """A convolution, and what a forward may do with it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class Weighs(One):
    """It looks at the weights by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * self.conv.weight.sum()  # type: ignore[no-any-return]


class Again(One):
    """It calls its convolution with pictures of two sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)[..., ::2, ::2] + self.conv(x[..., ::2, ::2])  # type: ignore[no-any-return]


class Decides(One):
    """What it computes depends on values; the made-up tile may never have come by."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.mean() > 0 else torch.nn.functional.conv2d(x, self.conv.weight)


class Contiguous(One):
    """It hands on pictures in the other layout."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.contiguous()).flatten(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Weighs, Again, Decides, Contiguous])
def test_a_forward_of_any_kind_finds_its_convolution_as_it_was(kind: type[One]) -> None:
    torch.manual_seed(2)
    network = ready(kind())
    ours = packed(network, tiles(1, side=2 * SIDE) + 1, 2)
    assert count_packed(ours) == 1
    with torch.inference_mode():
        for given in (tiles(2, 3), tiles(1, 4, 2 * SIDE) + 1, tiles(2, 4) - 1):
            assert torch.equal(ours(given), network(given))


class Asks(One):
    """It wants no other class of convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if type(self.conv) is nn.Conv2d else -self.conv(x)


class Fails(One):
    """It fails on a made-up tile."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not so")


class Listened(One):
    """Somebody looks at what its convolution answers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(lambda *_: None)


class Patched(One):
    """Its convolution does more than one."""

    def __init__(self) -> None:
        super().__init__()
        plain = self.conv.forward
        self.conv.forward = lambda input: plain(input).relu()  # type: ignore[method-assign]


class Own(nn.Conv2d):
    """A convolution of its author's."""


class Subclass(One):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Own(3, 4, 3, padding=1)


class Reflects(One):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")


class Same(One):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")


@pytest.mark.parametrize("kind", [Asks, Fails, Listened, Patched, Subclass, Reflects, Same])
def test_what_might_not_be_the_same_is_left_as_it_is(kind: type[One]) -> None:
    torch.manual_seed(3)
    network = ready(kind())
    before = copy.deepcopy(network.state_dict())
    ours = packed(network, tiles(1), 2)
    assert count_packed(ours) == count_packed(network) == 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Counts(nn.Module):
    """Notes how many tiles each of its calls is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, SIDE)
        self.asked: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(x))
        return self.conv(x).flatten(1)  # type: ignore[no-any-return]

    def __deepcopy__(self, known: dict[int, Any]) -> Counts:
        return self  # its calls are counted wherever they are made


SPEC = ModelSpec(name="net", sha256="0", classes=("a", "b", "c"), mpp=0.5, tile_px=SIDE, input_px=SIDE, output_px=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler
def test_a_model_has_its_convolutions_packed_where_that_gains_anything() -> None:
    assert count_packed(TorchNetwork(SPEC, One())._network) == 1
    assert count_packed(TorchNetwork(SPEC, One(), precision="bf16")._network) == 0  # autocast would have to know of it
    assert count_packed(TorchNetwork(SPEC, One(), compile=True)._network) == 0  # the compiler does so itself


def test_warming_a_model_up_computes_made_up_tiles_twice_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_threads", 1)
    network = Counts()
    model = TorchNetwork(SPEC, network, activation="softmax")
    network.asked.clear()
    warm_up(model, 4)
    assert network.asked == [4, 4]  # in two orders: a tile's place must not matter
    given = np.random.default_rng(1).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)
    scores = model(given)
    assert network.asked == [4, 4, 4]
    np.testing.assert_array_equal(model(given[::-1].copy()), scores[::-1])
