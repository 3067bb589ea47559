"""Segmentation with a small U-Net with BatchNorm: mosaics of textures with exact masks, and stained tissue.

Mosaics: brick, grass and gravel from scikit-image, laid out as Voronoi cells around random points. Training mosaics are
cut from other regions of the photographs than validation's and test's.

Tissue: scikit-image's immunohistochemical image of colon tissue, in which a brown stain (DAB) marks a protein. The
labels are those of a classical method, not of a pathologist: colour deconvolution (Ruifrok & Johnston 2001), smoothing
and Otsu's threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.tasks import Task, epochs
from benchmarks.tasks.digits import Split
from benchmarks.tasks.networks import UNet
from benchmarks.tasks.textures import photograph, window

TEXTURES = ("brick", "grass", "gravel")
SIDE = 48
POINTS = (3, 7)  # of a mosaic: fewest and most Voronoi cells
MOSAICS = {"train": 320, "validation": 60, "test": 60}
# Rows of the photographs, 512 by 512 pixels; the 16 between two parts belong to none.
ROWS = {"train": slice(0, 288), "validation": slice(304, 400), "test": slice(416, 512)}
TILES = {"train": 320, "validation": 0, "test": 0}


def voronoi(classes: int, generator: torch.Generator) -> Tensor:
    """Draw a mask, shape (SIDE, SIDE): each pixel has the class of the nearest of a few random points."""
    count = int(torch.randint(POINTS[0], POINTS[1] + 1, (), generator=generator))
    points = SIDE * torch.rand(count, 2, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    pixels = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)) + 0.5
    return labels[torch.cdist(pixels, points).argmin(1)].view(SIDE, SIDE)


@cache
def mosaics() -> dict[str, Split]:
    """Make the same mosaics at every call; each texture has mean 0 and standard deviation 1 in each window."""
    photographs = [photograph(name) for name in TEXTURES]
    generator = torch.Generator().manual_seed(0)
    made = {}
    for part, count in MOSAICS.items():
        images, masks = [], []
        for _ in range(count):
            mask = voronoi(len(TEXTURES), generator)
            windows = torch.stack([window(image[ROWS[part]], SIDE, generator) for image in photographs])
            windows = windows - windows.mean((1, 2), keepdim=True)
            windows = windows / windows.std((1, 2), keepdim=True)
            images.append(windows.gather(0, mask.unsqueeze(0)))
            masks.append(mask)
        made[part] = Split(torch.stack(images), torch.stack(masks))
    return made


@cache
def tissue() -> dict[str, Split]:
    """Cut training tiles at random places, the same at every call; validation and test are a strip each."""
    from skimage import color, data, filters

    image = data.immunohistochemistry()
    stain = filters.gaussian(color.rgb2hed(image)[..., 2], sigma=1)
    mask = torch.from_numpy((stain > filters.threshold_otsu(stain)).astype(np.int64))
    both = torch.cat([torch.from_numpy(image).permute(2, 0, 1) / 255.0, mask.float().unsqueeze(0)])
    generator = torch.Generator().manual_seed(0)
    made = {}
    for part, rows in ROWS.items():
        strip = both[:, rows]
        tiles = [window(strip, SIDE, generator) for _ in range(TILES[part])] or [strip]
        images, masks = torch.stack(tiles).split([3, 1], dim=1)
        made[part] = Split(images.contiguous(), masks.squeeze(1).long())
    return made


def turned(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bring a whole batch into one of the eight orientations of a square, at random."""
    quarters = int(torch.randint(4, (), generator=generator))
    images, masks = images.rot90(quarters, (-2, -1)), masks.rot90(quarters, (-2, -1))
    if torch.randint(2, (), generator=generator):
        images, masks = images.flip(-1), masks.flip(-1)
    return images.contiguous(), masks.contiguous()


def batches(split: Split, batch: int, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of whole epochs, each turned at random."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for images, masks in epochs(*split, batch, seed, steps):
        yield turned(images, masks, generator)


@torch.no_grad()
def overlap(network: nn.Module, split: Split, first_class: int = 0, batch: int = 16) -> dict[str, float]:
    """Return Dice and intersection over union over all pixels of a split, the mean of the classes, in percent.

    Args:
        network: Maps images to logits of each pixel.
        split: Images (n, c, h, w) and masks (n, h, w).
        first_class: 1 leaves the background out (default: 0).
        batch: Images at a time (default: 16).

    """
    device = next(network.parameters()).device
    counts: Tensor | int = 0  # row: true class, column: predicted class
    for images, masks in zip(split.images.split(batch), split.labels.split(batch), strict=True):
        logits = network(images.to(device)).cpu()
        classes = logits.shape[1]
        pairs = classes * masks + logits.argmax(1)
        counts = counts + torch.bincount(pairs.flatten(), minlength=classes**2).view(classes, classes)
    assert isinstance(counts, Tensor)
    both = counts.diag().double()
    either = counts.sum(0) + counts.sum(1) - both
    dice, iou = 2 * both / (counts.sum(0) + counts.sum(1)), both / either
    found = {"dice": dice, "iou": iou}
    return {name: 100 * _mean(values[first_class:]) for name, values in found.items()}


def _mean(values: Tensor) -> float:
    # A class that is nowhere and was predicted nowhere says nothing: 0 / 0.
    return values.nanmean().item() if not values.isnan().all() else math.nan


def _task(name: str, data: dict[str, Split], channels: int, classes: int, first_class: int, source: str) -> Task:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return UNet(channels, classes)

    def evaluate(network: nn.Module, split: str) -> Mapping[str, float]:
        return overlap(network, data[split], first_class)

    return Task(
        name=name,
        suite="segmentation",
        metric="dice",
        best=max,
        steps=300,
        model=model,
        batches=lambda seed, steps, scale: batches(data["train"], 8 * scale, seed, steps),
        loss=lambda network, batch: cross_entropy(network(batch[0]), batch[1]),
        evaluate=evaluate,
        calibration=lambda: [data["train"].images[::10]],
        data=source,
    )


TASKS: dict[str, Callable[[], Task]] = {
    "mosaics": lambda: _task("mosaics", mosaics(), 1, len(TEXTURES), 0, "scikit-image: brick, grass, gravel"),
    "tissue": lambda: _task("tissue", tissue(), 3, 2, 1, "scikit-image: immunohistochemistry, stain-separation labels"),
}
