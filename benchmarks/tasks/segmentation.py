"""Segmentation with a small U-Net with BatchNorm: mosaics of textures with exact masks, and stained tissue.

Mosaics: brick, grass and gravel from scikit-image, laid out as Voronoi cells around random points. Training mosaics are
cut from other regions of the photographs than validation's and test's.

Tissue: scikit-image's immunohistochemical image of colon tissue, in which a brown stain (DAB) marks a protein and a
blue one (haematoxylin) the nuclei. The labels are those of a classical method, not of a pathologist: colour
deconvolution (Ruifrok & Johnston 2001), smoothing and Otsu's threshold of each stain. The network sees the image in
gray, so that it has to go by shape and surroundings. Dice and IoU are the means over nuclei and stain.
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
from benchmarks.tasks.textures import cells, photograph, window

TEXTURES = ("brick", "grass", "gravel")
SIDE = 48
POINTS = (3, 7)  # of a mosaic: fewest and most Voronoi cells
MOSAICS = {"train": 320, "validation": 60, "test": 60}
# Rows of the photographs, 512 by 512 pixels; the 16 between two parts belong to none.
ROWS = {"train": slice(0, 288), "validation": slice(304, 400), "test": slice(416, 512)}
TILES = 320  # of the tissue, for training


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


def stains(image: np.ndarray) -> Tensor:
    """Label the pixels of a stained image, shape (h, w, 3): 2 where DAB is, else 1 where haematoxylin is, else 0."""
    from skimage import color, filters

    separated = color.rgb2hed(image)
    haematoxylin, dab = (filters.gaussian(separated[..., channel], sigma=1) for channel in (0, 2))
    stained = [stain > filters.threshold_otsu(stain) for stain in (haematoxylin, dab)]
    return torch.from_numpy(np.where(stained[1], 2, stained[0].astype(np.int64)))


@cache
def tissue() -> dict[str, Split]:
    """Divide the image into cells as the photographs of `textures`; training tiles are cut from its own at random."""
    from skimage import data

    both = torch.stack([photograph("immunohistochemistry"), stains(data.immunohistochemistry()).float()])
    of_part: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for where, cell in cells(both):
        of_part[where].append(cell)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(of_part["train"]), (TILES,), generator=generator)
    of_part["train"] = [window(of_part["train"][cell], SIDE, generator) for cell in chosen]
    made = {}
    for where, tiles in of_part.items():
        images, masks = torch.stack(tiles).split(1, dim=1)
        made[where] = Split(images.contiguous(), masks.squeeze(1).long())
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


def _task(
    name: str, data: dict[str, Split], channels: int, classes: int, batch: int, first_class: int, source: str
) -> Task:
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
        batches=lambda seed, steps, scale: batches(data["train"], batch * scale, seed, steps),
        loss=lambda network, batch: cross_entropy(network(batch[0]), batch[1]),
        evaluate=evaluate,
        calibration=lambda: [data["train"].images[::10]],
        lr={"sgd": 0.1, "adamw": 4e-3},
        data=source,
    )


TASKS: dict[str, Callable[[], Task]] = {
    "mosaics": lambda: _task("mosaics", mosaics(), 1, len(TEXTURES), 8, 0, "scikit-image: brick, grass, gravel"),
    "tissue": lambda: _task(
        "tissue", tissue(), 1, 3, 8, 1, "scikit-image: immunohistochemistry, stain-separation labels"
    ),
}
