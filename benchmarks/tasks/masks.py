"""Segmentation of one's own images: a folder of images and one of masks, with a U-Net of 1.9 M parameters.

In `$WCR_OPTIM_DATA/masks` lie `images/` and `masks/` with files of the same names, the masks with the class of a pixel
as its gray value (two values, such as 0 and 255, count as background and foreground); or `train/`, `validation/` and
`test/`, each with these two folders; or whatever else `datasets` reads with the columns image and mask. Splits that are
not there are drawn image by image: give them where several images show one patient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.tasks import Task, hub
from benchmarks.tasks.digits import Split
from benchmarks.tasks.networks import UNet
from benchmarks.tasks.segmentation import batches, overlap

if TYPE_CHECKING:
    from datasets import DatasetDict
    from PIL.Image import Image

NAME = "masks"
SIDE = 256
WIDTHS = (32, 64, 128, 256)
BATCH = 16
EPOCHS = 100
ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


class Masks(NamedTuple):
    """Splits of images, shape (n, 3, SIDE, SIDE), normalized over the training images, and masks, (n, SIDE, SIDE)."""

    splits: dict[str, Split]
    classes: int


def load() -> Masks:
    """Load all images and masks into memory.

    Raises:
        ValueError: If an image has no mask or the other way round, if a mask has another size than its image, or if a
            class of validation or test is none of those of training.

    """
    path = hub.local(NAME)
    rows = hub.load(NAME) if path is None or not _folders(path) else _paired(path)
    values = sorted({int(v) for mask in rows["train"]["mask"] for v in np.unique(np.array(mask.convert("L")))})
    two = len(values) == 2
    splits = {}
    for name, part in rows.items():
        pairs = [_tensors(image, mask) for image, mask in zip(part["image"], part["mask"], strict=True)]
        images, masks = (torch.stack(list(side)) for side in zip(*pairs, strict=True))
        if two:
            masks = (masks > values[0]).long()
        splits[name] = Split(images, masks)
    classes = 2 if two else values[-1] + 1
    for name, split in splits.items():
        if split.labels.max() >= classes:
            raise ValueError(
                f"masks of {name} have class {int(split.labels.max())}, those of train only 0 to {classes - 1}"
            )
    train = splits["train"].images
    mean, deviation = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True).clamp_min(1e-3)
    return Masks({n: Split((s.images - mean) / deviation, s.labels) for n, s in splits.items()}, classes)


def _folders(path: Path) -> list[tuple[str, Path]]:
    """Return the splits that a folder holds as images and masks, and where."""
    if (path / "images").is_dir() and (path / "masks").is_dir():
        return [("train", path)]
    names = ("train", *(name for names in hub.SPLITS.values() for name in names))
    return [(name, path / name) for name in names if (path / name / "images").is_dir()]


def _paired(path: Path) -> DatasetDict:
    datasets = hub.imported()
    splits = {}
    for name, folder in _folders(path):
        images, masks = (
            {f.stem: str(f) for f in sorted((folder / kind).glob("*")) if f.suffix.lower() in ENDINGS}
            for kind in ("images", "masks")
        )
        odd = sorted(images.keys() ^ masks.keys())
        if odd or not images:
            told = f"{len(odd)} names are in only one of them, the first {odd[0]!r}" if odd else "there are no images"
            raise ValueError(f"{folder} needs a mask for each image, images/NAME.png and masks/NAME.png: {told}")
        rows = datasets.Dataset.from_dict({"image": list(images.values()), "mask": [masks[stem] for stem in images]})
        splits[name] = rows.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
    return hub.with_all_splits(splits, path)


def _tensors(image: Image, mask: Image) -> tuple[Tensor, Tensor]:
    if image.size != mask.size:
        raise ValueError(f"an image of {image.size} pixels has a mask of {mask.size}")
    pixels = np.array(image.convert("RGB").resize((SIDE, SIDE)), dtype=np.float32) / 255
    # Nearest: a gray value between two classes is a third one.
    classes = np.array(mask.convert("L").resize((SIDE, SIDE), resample=0), dtype=np.int64)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(classes)


def _task() -> Task:
    data = load()
    train = data.splits["train"]
    batch = min(BATCH, len(train.images))

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return UNet(3, data.classes, WIDTHS)

    def evaluate(network: nn.Module, split: str) -> Mapping[str, float]:
        return overlap(network, data.splits[split], first_class=1)

    def calibration() -> list[Tensor]:
        return list(train.images[:64].split(batch))

    return Task(
        name=NAME,
        suite="segmentation",
        metric="dice",
        best=max,
        steps=EPOCHS * max(1, len(train.images) // batch),
        model=model,
        batches=lambda seed, steps, scale: batches(train, min(batch * scale, len(train.images)), seed, steps),
        loss=lambda network, batch: cross_entropy(network(batch[0]), batch[1]),
        evaluate=evaluate,
        calibration=calibration,
        data=f"{NAME}, a folder",
    )


TASKS: dict[str, Callable[[], Task]] = {NAME: _task}
