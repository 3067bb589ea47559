"""Textures: from which of scikit-image's photographs a small gray patch was cut; a CNN with BatchNorm.

Every photograph is divided into cells with gaps between them; whole cells belong to training, validation or test, so
that no pixel is in two of them, and no two patches of different parts touch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.tasks import Task, epochs
from benchmarks.tasks.digits import Split, accuracy
from benchmarks.tasks.networks import convolution

PHOTOGRAPHS = (
    "brick",
    "cell",
    "chelsea",
    "clock",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "page",
    "retina",
    "text",
)
SIDE = 24
CELL, GAP = 56, 8
PATCHES = {"train": 300, "validation": 100, "test": 100}  # of each photograph


def photograph(name: str) -> Tensor:
    """Return one of scikit-image's photographs in gray, shape (h, w), in [0, 1].

    Raises:
        ImportError: If scikit-image is not installed.

    """
    try:
        from skimage import color, data
    except ImportError as error:
        raise ImportError("this task needs scikit-image: pip install 'wcr_optim[bench]'") from error
    image = getattr(data, name)()
    gray = color.rgb2gray(image) if image.ndim == 3 else image / 255
    return torch.from_numpy(gray.astype(np.float32))


def part(row: int, column: int) -> str:
    """Return what the cell of a photograph belongs to: of any five in a row or column three are of training."""
    return {0: "validation", 1: "test"}.get((2 * row + column) % 5, "train")


def cells(image: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the cells of an image, shape (CELL, CELL), and the part that each belongs to."""
    for row in range((image.shape[0] + GAP) // (CELL + GAP)):
        for column in range((image.shape[1] + GAP) // (CELL + GAP)):
            top, left = row * (CELL + GAP), column * (CELL + GAP)
            yield part(row, column), image[top : top + CELL, left : left + CELL]


def window(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Cut a square window at a random place, the same from all leading dimensions."""
    top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in image.shape[-2:])
    return image[..., top : top + side, left : left + side]


@cache
def load() -> dict[str, Split]:
    """Cut the same patches at random places of the cells at every call; as many of each photograph."""
    generator = torch.Generator().manual_seed(0)
    images: dict[str, list[Tensor]] = {name: [] for name in PATCHES}
    for name in PHOTOGRAPHS:
        of_part: dict[str, list[Tensor]] = {name: [] for name in PATCHES}
        for where, cell in cells(photograph(name)):
            of_part[where].append(cell)
        for where, count in PATCHES.items():
            for which in torch.randint(len(of_part[where]), (count,), generator=generator):
                images[where].append(window(of_part[where][which], SIDE, generator))
    labels = torch.arange(len(PHOTOGRAPHS))
    return {
        where: Split(torch.stack(images[where]).unsqueeze(1), labels.repeat_interleave(count))
        for where, count in PATCHES.items()
    }


def cnn() -> nn.Module:
    """Four 3x3 convolutions with BatchNorm and three poolings between, a linear classifier; 99 k parameters."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [convolution(inputs, outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16),
        nn.MaxPool2d(2),
        *block(16, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, len(PHOTOGRAPHS)),
    )


def flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image at random: left to right, top to bottom, both or neither."""
    choice = torch.randint(4, (len(images), 1, 1, 1), generator=generator)
    images = torch.where(choice % 2 == 1, images.flip(-1), images)
    return torch.where(choice >= 2, images.flip(-2), images)


def batches(split: Split, batch: int, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of whole epochs, every patch mirrored at random anew."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for images, labels in epochs(*split, batch, seed, steps):
        yield flipped(images, generator), labels


def _task() -> Task:
    data = load()

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return cnn()

    return Task(
        name="textures",
        suite="vision",
        metric="accuracy",
        best=max,
        steps=500,
        model=model,
        batches=lambda seed, steps, scale: batches(data["train"], 64 * scale, seed, steps),
        loss=lambda network, batch: cross_entropy(network(batch[0]), batch[1]),
        evaluate=lambda network, split: accuracy(network, data[split]),
        calibration=lambda: [data["train"].images[::8]],
        lr={"sgd": 0.05, "adamw": 3e-3},
        data="scikit-image's photographs",
    )


TASKS: dict[str, Callable[[], Task]] = {"textures": _task}
