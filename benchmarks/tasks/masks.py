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
    sha256: str


def load() -> Masks:
    """Load all images and masks into memory.

    Raises:
        ValueError: If an image has no mask or the other way round, if a mask has another size than its image, if the
            training masks are all of one class, if a class of validation or test is none of those of training, if the
            masks of a split are all background, or if there are folders beside those that are read.

    """
    path = hub.local(NAME)
    rows = hub.load(NAME) if path is None or not _folders(path) else _paired(path)
    for column in ("image", "mask"):
        hub.column(rows["train"], column)
    splits = {}
    for name, part in rows.items():
        pairs = [_tensors(image, mask) for image, mask in zip(part["image"], part["mask"], strict=True)]
        images, masks = (torch.stack(list(side)) for side in zip(*pairs, strict=True))
        splits[name] = Split(images, masks)
    values = splits["train"].labels.unique().tolist()
    if len(values) < 2:
        raise ValueError(f"masks of train in {path} are {values[0]} all over; they need background and foreground")
    two = len(values) == 2
    background = values[0] if two else 0
    for name, split in splits.items():
        found = split.labels.unique().tolist()
        unknown = [value for value in found if value not in values]
        if unknown:
            told = ", ".join(map(str, values))
            raise ValueError(f"masks of {name} in {path} have the value {unknown[0]}, those of train only {told}")
        if found == [background]:
            raise ValueError(
                f"masks of {name} in {path} are {background} all over, and Dice would be NaN; put some with "
                f"foreground into a folder {name}/ beside train/"
            )
    if two:
        splits = {name: Split(split.images, (split.labels > background).long()) for name, split in splits.items()}
    classes = 2 if two else values[-1] + 1
    sha256 = hub.fingerprint(part for split in splits.values() for part in split)
    train = splits["train"].images
    mean, deviation = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True).clamp_min(1e-3)
    return Masks({n: Split((s.images - mean) / deviation, s.labels) for n, s in splits.items()}, classes, sha256)


def _folders(path: Path) -> list[tuple[str, Path]]:
    """Return the splits that a folder holds as images and masks, and where.

    Raises:
        ValueError: If there are other folders beside them.

    """
    here = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    names: tuple[str, ...] = ("images", "masks")
    found = [("train", path)]
    if not set(names) <= set(here):
        names = ("train", *(name for names in hub.SPLITS.values() for name in names))
        found = [(name, path / name) for name in names if name in here]
        if not any((folder / "images").is_dir() for _, folder in found):
            return []
    others = [name for name in here if name not in names]
    if others:
        raise ValueError(
            f"{path} has folders that are not read: {', '.join(others)}; call them one of {', '.join(names)}, or move "
            "them away"
        )
    return found


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
        # Drawn, not the first ones: in order of their names they may all be one patient's.
        chosen = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(0))[:64]
        return list(train.images[chosen].split(batch))

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
        sharpness_batch=lambda: next(batches(train, min(4, len(train.images)), 0, 1)),
        data=f"{NAME}, a folder",
        data_hash=data.sha256[:12],
    )


TASKS: dict[str, Callable[[], Task]] = {NAME: _task}
