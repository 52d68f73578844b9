"""Small networks that model cards in tests name as their architecture."""

from __future__ import annotations

import torch
from torch import nn


class Small(nn.Module):
    """Two convolutions, a norm, the mean, a linear head."""

    def __init__(self, classes: int = 2, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Fails(Small):
    """Fails whatever it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (1 // 0)


class Pixels(nn.Module):
    """Answers its input's colours: a map of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


def small(classes: int = 2) -> nn.Module:
    """A function that makes a network, where a card should name a class."""
    return Small(classes)


def seeded(classes: int = 2) -> Small:
    """Small, with weights and statistics as if it had been trained."""
    torch.manual_seed(3)
    network = Small(classes).eval()
    assert network.norm.running_mean is not None
    assert network.norm.running_var is not None
    network.norm.running_mean.normal_()
    network.norm.running_var.uniform_(0.5, 2)
    return network
