"""Large convolutions in fewer multiplications: the scores of the usual way, and left alone where it might not be so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import networks
from pathology import device
from pathology.model import ModelSpec
from pathology.models import winograd
from pathology.models.network import TorchNetwork
from pathology.models.packed import packed
from pathology.models.winograd import CHANNELS, quicker

SIDE = 14

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")  # type: ignore[no-untyped-call]


def pictures(count: int, height: int = SIDE, width: int = SIDE, channels: int = CHANNELS, seed: int = 0) -> torch.Tensor:
    made = torch.randn((count, channels, height, width), generator=torch.Generator().manual_seed(seed))
    return made.to(memory_format=torch.channels_last)


def ready(network: nn.Module) -> nn.Module:
    return network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def count_replaced(network: nn.Module) -> int:
    return sum(type(module).__name__ == "Winograd" for module in network.modules())


def one(**other: Any) -> nn.Module:
    torch.manual_seed(1)
    return ready(
        nn.Sequential(nn.Conv2d(**{"in_channels": CHANNELS, "out_channels": CHANNELS, "kernel_size": 3, "padding": 1, **other}))
    )


@pytest.mark.parametrize(("height", "width"), [(14, 14), (7, 7), (9, 4), (2, 5), (1, 1), (50, 60)])
@pytest.mark.parametrize(("outputs", "bias"), [(CHANNELS, True), (CHANNELS + 44, False)])
def test_answers_are_as_near_to_the_exact_ones_as_the_usual(height: int, width: int, outputs: int, bias: bool) -> None:
    network = one(out_channels=outputs, bias=bias)
    ours = quicker(network, pictures(1, height, width), 4)
    assert (count_replaced(ours), count_replaced(network)) == (1, 0)
    for count in (0, 1, 2, 5):  # of the largest pictures, one is computed after the other
        given = pictures(count, height, width, seed=count)
        with torch.inference_mode():
            answer, usual = ours(given), network(given)
            exact = nn.functional.conv2d(given.double(), *(v.double() for v in network.parameters()), padding=1)  # type: ignore[misc]
        assert answer.shape == usual.shape
        assert answer.permute(0, 2, 3, 1).is_contiguous()  # what comes after may look at it as other shapes
        if count:
            assert (answer - exact).abs().max() <= 1e-5 * exact.abs().max()
            assert not torch.equal(answer, usual)  # it is another way


def test_other_sides_than_those_of_the_made_up_tile_are_right_as_well() -> None:
    network = one()
    ours = quicker(network, pictures(1), 2)
    for given in (pictures(3, 5, 30), pictures(1, 80, 80), pictures(2).contiguous()):
        with torch.inference_mode():
            torch.testing.assert_close(ours(given), network(given), rtol=0, atol=1e-5)


def test_the_number_of_products_is_16_of_36(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, rows, plain = quicker(one(), pictures(1), 8), [], winograd._product

    def count(pixels: torch.Tensor, *others: Any) -> torch.Tensor:
        rows.append(pixels[..., 0].numel())
        return plain(pixels, *others)

    monkeypatch.setattr(winograd, "_product", count)
    with torch.inference_mode():
        ours(pictures(8))
    assert rows == [8 * SIDE**2 // 4] * 16  # the usual way takes 9 rows for each pixel
    assert sum(rows) * 36 == 16 * 9 * 8 * SIDE**2


UNFIT = {
    "few channels": {"in_channels": CHANNELS - 1},
    "few classes": {"out_channels": CHANNELS - 1},
    "strided": {"stride": 2},
    "dilated": {"dilation": 2, "padding": 2},
    "in groups": {"in_channels": 2 * CHANNELS, "out_channels": 2 * CHANNELS, "groups": 2},
    "1 x 1": {"kernel_size": 1, "padding": 0},
    "5 x 5": {"kernel_size": 5, "padding": 2},
    "without border": {"padding": 0},
    "border of its own": {"padding_mode": "reflect"},
}


@pytest.mark.parametrize("how", UNFIT.values(), ids=UNFIT.keys())
def test_other_convolutions_are_left_as_they_are(how: dict[str, Any]) -> None:
    network = one(**how)
    assert quicker(network, pictures(1, channels=how.get("in_channels", CHANNELS)), 4) is network


def test_pictures_too_large_for_the_caches_are_computed_the_usual_way() -> None:
    network = one()
    assert quicker(network, pictures(1, 60, 60), 4) is network


class Fails(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not so")


class Asks(nn.Sequential):
    """It wants no other class of convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self[0](x)
        return answer if type(self[0]) is nn.Conv2d else -answer


@pytest.mark.parametrize("kind", [Fails, Asks])
def test_a_forward_that_does_not_take_it_keeps_its_own(kind: type[nn.Sequential]) -> None:
    network = kind(*one())  # type: ignore[arg-type]
    assert quicker(network, pictures(1), 4) is network
    assert count_replaced(network) == 0


def test_what_does_not_answer_alike_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "WEIGHTS", (*winograd.WEIGHTS[:3], (0.0, 0.0, 1.001)))
    network = one()
    assert quicker(network, pictures(1), 4) is network


def test_weights_can_be_looked_at_and_all_others_are_shared() -> None:
    network = ready(networks.resnet18())
    ours = quicker(network, torch.randn(1, 3, 224, 224), 8)
    assert count_replaced(ours) == 6
    theirs, mine = dict(network.named_parameters()), dict(ours.named_parameters())
    assert theirs.keys() == mine.keys()
    assert all(mine[name] is theirs[name] for name in theirs)


def test_what_is_no_number_is_passed_on() -> None:
    ours = quicker(one(), pictures(1), 4)
    given = pictures(2)
    given[1, 0, 5, 5] = float("nan")
    with torch.inference_mode():
        lost = ours(given).isnan()
    assert lost[1, :, 4:7, 4:7].all()
    assert not lost[0].any()


SPEC = ModelSpec(name="net", sha256="0", classes=("a", "b"), mpp=0.5, tile_px=224, input_px=224, output_px=1)


def test_a_model_takes_it_in_float32_with_the_same_bits_whatever_threads_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    network, before = networks.resnet18().eval(), torch.get_num_threads()
    tiles = np.random.default_rng(0).integers(0, 256, (16, 224, 224, 3), np.uint8)
    with torch.inference_mode():
        plain = network(torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255).numpy()
    answers = []
    try:
        for threads in (1, 2):  # as many as pieces, or fewer
            monkeypatch.setattr(device, "_threads", threads)
            torch.set_num_threads(threads)
            model = TorchNetwork(SPEC, network)
            assert count_replaced(model._network) == 6
            answers += [model(tiles)[..., 0, 0], model(tiles[::-1].copy())[::-1, :, 0, 0]]
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(answers[0], other) for other in answers[1:])
    assert abs(answers[0] - plain).max() < 1e-5


class Turns(nn.Sequential):
    """It sets its convolution otherwise at every other call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self[0].dilation = self[0].padding = (1, 1) if x.mean() > 0 else (2, 2)  # type: ignore[assignment]
        answer: torch.Tensor = self[0](x)
        return answer


def test_a_convolution_that_is_set_otherwise_meanwhile_does_what_it_is_set_to() -> None:
    network = Turns(*one())  # type: ignore[arg-type]
    ours = quicker(network, pictures(1) + 1, 4)
    assert count_replaced(ours) == 1
    for given in (pictures(2) - 1, pictures(2) + 1):
        with torch.inference_mode():
            torch.testing.assert_close(ours(given), network(given), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler
def test_a_model_does_not_take_it_in_other_precisions_or_compiled() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 16, 16), *one(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 2)
    )
    assert count_replaced(TorchNetwork(SPEC, network)._network) == 1
    assert count_replaced(TorchNetwork(SPEC, network, precision="bf16")._network) == 0
    assert count_replaced(TorchNetwork(SPEC, network, compile=True)._network) == 0


def test_the_rest_is_packed_around_it() -> None:
    network = ready(networks.resnet18())
    tile = torch.randn(1, 3, 224, 224).to(memory_format=torch.channels_last)
    ours = packed(quicker(network, tile, 8), tile, 8)
    assert count_replaced(ours) == 6
    assert sum(type(module).__name__ == "Packed" for module in ours.modules()) > 0
