"""Segmentation of one's own images: a folder of images and one of masks, with a U-Net of 1.9 M parameters.

In `$WCR_OPTIM_DATA/masks` lie `images/` and `masks/` with files of the same names, the masks with the class of a pixel
as its gray value or index of a palette (two values, such as 0 and 255, count as background and foreground); or
`train/`, `validation/` and `test/`, each with these two folders; or whatever else `datasets` reads with the columns
image and mask. Splits that are not there are drawn image by image: give them where several images show one patient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
VALUES = 64  # that one mask may have
LOSSY = ("JPEG", "MPO")  # Pillow's names of formats that change values
ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

Palette = dict[int, tuple[int, ...]]
"""The colour of each index that masks have used so far."""


class Masks(NamedTuple):
    """Splits of images, shape (n, 3, SIDE, SIDE), normalized over the training images, and masks, (n, SIDE, SIDE)."""

    splits: dict[str, Split]
    classes: int
    sha256: str


def load() -> Masks:
    """Load all images and masks into memory.

    Of two values in the training masks the lower one is the background. Of more, each is a class, in their order after
    the background, 0, whether that is there or not.

    Raises:
        ValueError: If an image has no mask or the other way round, if two have one name, if a mask has another size
            than its image, if an image has more than 8 bits, if a mask has values that can be no classes, if the
            training masks are all of one class, if a class of validation or test is none of those of training, if the
            masks of a split are all background, or if there are folders beside those that are read.

    """
    path = hub.local(NAME)
    rows = hub.load(NAME) if path is None or not _folders(path) else _paired(path)
    for column in ("image", "mask"):
        hub.column(rows["train"], column)
    # Without colours a palette is a way to save gray values. Whether there are any takes a look at all masks: one that
    # shows two gray classes of a coloured palette only would be read by gray values otherwise.
    palette: Palette | None = {} if any(_is_coloured(mask) for part in rows.values() for mask in part["mask"]) else None
    splits = {}
    for name, part in rows.items():
        pairs = [
            _tensors(image, mask, f"{NAME} {name}: row {row}", palette)
            for row, (image, mask) in enumerate(zip(part["image"], part["mask"], strict=True))
        ]
        images, masks = (torch.stack(list(side)) for side in zip(*pairs, strict=True))
        splits[name] = Split(images, masks)
    values = splits["train"].labels.unique()
    told = values.tolist()
    if len(told) < 2:
        raise ValueError(f"masks of train in {path} are {told[0]} all over; they need background and foreground")
    classes = told if len(told) == 2 else sorted({0, *told})
    background = classes[0]
    for name, split in splits.items():
        unknown = torch.isin(split.labels, values, invert=True)
        if unknown.any():
            row = int(unknown.flatten(1).any(1).int().argmax())
            value, where = int(split.labels[row][unknown[row]][0]), hub.called(rows[name][row]["mask"], f"row {row}")
            raise ValueError(
                f"masks of {name} in {path} have the value {value} ({where}), those of train only "
                f"{', '.join(map(str, told))}"
            )
        if bool((split.labels == background).all()):
            raise ValueError(
                f"masks of {name} in {path} are {background} all over, and Dice would be NaN; put some with "
                f"foreground into a folder {name}/ beside train/"
            )
    order = torch.tensor(classes)
    splits = {name: Split(split.images, torch.searchsorted(order, split.labels)) for name, split in splits.items()}
    sha256 = hub.fingerprint(part for split in splits.values() for part in split)
    train = splits["train"].images
    mean, deviation = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True).clamp_min(1e-3)
    return Masks({n: Split((s.images - mean) / deviation, s.labels) for n, s in splits.items()}, len(classes), sha256)


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
        images, masks = (_by_name(folder / kind) for kind in ("images", "masks"))
        odd = sorted(images.keys() ^ masks.keys())
        if odd or not images:
            told = f"{len(odd)} names are in only one of them, the first {odd[0]!r}" if odd else "there are no images"
            raise ValueError(f"{folder} needs a mask for each image, images/NAME.png and masks/NAME.png: {told}")
        rows = datasets.Dataset.from_dict({"image": list(images.values()), "mask": [masks[stem] for stem in images]})
        splits[name] = rows.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
    return hub.with_all_splits(splits, path)


def _by_name(folder: Path) -> dict[str, str]:
    """Return the paths of a folder's images by their names without endings.

    Raises:
        ValueError: If two have the same.

    """
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*")):
        if file.suffix.lower() in ENDINGS:
            other = found.setdefault(file.stem, str(file))
            if other != str(file):
                raise ValueError(f"{other} and {file} have one name; keep one of them, or give them different names")
    return found


def _is_coloured(mask: Any) -> bool:
    """Say whether a mask has a palette of which it uses a colour that is not gray."""
    if getattr(mask, "mode", None) != "P":
        return False
    channels = np.array(mask.convert("RGB"))
    return bool((channels != channels[..., :1]).any())


def _tensors(image: object, mask: object, where: str, palette: Palette | None) -> tuple[Tensor, Tensor]:
    from PIL.Image import fromarray

    image, mask = hub.rgb(image, f"{where} of the column image"), hub.checked(mask, f"{where} of the column mask")
    if image.size != mask.size:
        raise ValueError(f"an image of {image.size} pixels has a mask of {mask.size}: {hub.called(mask, where)}")
    pixels = np.array(image.resize((SIDE, SIDE)), dtype=np.float32) / 255
    values = fromarray(_values(mask, hub.called(mask, f"{where} of the column mask"), palette))
    # Nearest: a value between two classes is a third one.
    labels = np.array(values.resize((SIDE, SIDE), resample=0), dtype=np.int64)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(labels)


def _values(mask: Image, where: str, palette: Palette | None) -> np.ndarray:
    """Return the values of a mask's pixels, int32: indices of a palette if masks have a coloured one, or gray values.

    Raises:
        ValueError: If they can be no classes.

    """
    if palette is not None and mask.mode != "P":
        raise ValueError(f"{where} has no palette (Pillow's mode {mask.mode}), and others have; save all masks alike")
    if palette is not None:
        values = _indices(mask, where, palette)
    elif mask.mode.startswith(("I", "F")):
        values = np.array(mask)
        if not ((values >= 0) & (values < 2**16) & (values == np.floor(values))).all():
            raise ValueError(f"{where} has values other than whole numbers from 0 to 65535, which can be no classes")
    else:
        channels = np.array(mask.convert("RGB"))
        values = channels[..., 0]
        if (channels != values[..., None]).any():
            raise ValueError(f"{where} has colours; save the class of a pixel as its gray value or index of a palette")
    count = len(np.unique(values))
    if mask.format in LOSSY or count > VALUES:
        raise ValueError(
            f"{where} ({mask.format}, {count} values) cannot be read as classes: JPEG and smooth resizing add values "
            f"between those that were drawn. Save masks as PNG, with {VALUES} values at most"
        )
    return values.astype(np.int32)


def _indices(mask: Image, where: str, palette: Palette) -> np.ndarray:
    """Return the indices of a mask with a palette, and add its colours to the palette of all masks.

    Raises:
        ValueError: If an index has another colour than in a mask before: programs that choose a palette for each file
            number the same class differently.

    """
    indices = np.array(mask)
    values, first = np.unique(indices, return_index=True)
    colours = np.array(mask.convert("RGB")).reshape(-1, 3)[first]
    for value, colour in zip(values.tolist(), map(tuple, colours.tolist()), strict=True):
        if palette.setdefault(value, colour) != colour:
            raise ValueError(
                f"{where} has the colour {colour} at index {value} of its palette, a mask before it "
                f"{palette[value]}; give all masks one palette, or save classes as gray values"
            )
    return indices


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
