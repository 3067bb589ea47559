"""Handwritten digits: scikit-learn's 1,797 real 8x8 images in ten classes; two networks with BatchNorm, and an MLP."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.tasks import Task, epochs
from benchmarks.tasks.networks import ResNet

NAME = "digits_cnn"


class Split(NamedTuple):
    """Images, shape (n, 1, 8, 8), in [0, 1], and labels, shape (n,)."""

    images: Tensor
    labels: Tensor


@cache
def load() -> dict[str, Split]:
    """Split the images into train (1,078), validation (269) and test (450), always the same, stratified by class."""
    digits = load_digits()
    rest_x, test_x, rest_y, test_y = train_test_split(
        digits.images, digits.target, test_size=450, stratify=digits.target, random_state=0
    )
    train_x, validation_x, train_y, validation_y = train_test_split(
        rest_x, rest_y, test_size=269, stratify=rest_y, random_state=0
    )
    return {
        name: Split(torch.tensor(x / 16.0, dtype=torch.float32).unsqueeze(1), torch.tensor(y))
        for name, x, y in [
            ("train", train_x, train_y),
            ("validation", validation_x, validation_y),
            ("test", test_x, test_y),
        ]
    }


def cnn() -> nn.Module:
    """Three 3x3 convolutions with BatchNorm, global average pooling and a linear classifier; 94 k parameters."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def mlp() -> nn.Module:
    """Two hidden layers of 256 units, no normalization; 85 k parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def resnet() -> nn.Module:
    """Three residual blocks of 16, 32 and 64 channels; 78 k parameters."""
    return ResNet(1, 10, widths=(16, 32, 64), blocks=1)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of images classified right, in percent."""
    device = next(model.parameters()).device
    return 100 * (model(split.images.to(device)).argmax(1).cpu() == split.labels).double().mean().item()


def _task(name: str, build: Callable[[], nn.Module], calibrated: bool, steps: int = 640, adamw: float = 1e-3) -> Task:
    data = load()

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return build()

    return Task(
        name=name,
        suite="vision",
        metric="accuracy",
        best=max,
        steps=steps,
        model=model,
        batches=lambda seed, steps, scale: epochs(*data["train"], 64 * scale, seed, steps),
        loss=lambda network, batch: cross_entropy(network(batch[0]), batch[1]),
        evaluate=lambda network, split: accuracy(network, data[split]),
        calibration=(lambda: [data["train"].images]) if calibrated else None,
        goals=(0.9, 0.95, 0.97, 0.98),
        lr={"sgd": 0.1, "adamw": adamw},
        data="scikit-learn load_digits",
    )


TASKS: dict[str, Callable[[], Task]] = {
    "digits_mlp": lambda: _task("digits_mlp", mlp, calibrated=False),
    "digits_cnn": lambda: _task("digits_cnn", cnn, calibrated=True),
    "digits_resnet": lambda: _task("digits_resnet", resnet, calibrated=True, steps=400, adamw=4e-3),
}
