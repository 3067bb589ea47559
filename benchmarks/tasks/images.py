"""Image classification on real data sets: CIFAR-10 and -100, SVHN, Tiny-ImageNet, a folder of one's own.

Each with ResNet-18 (11.2 M parameters), ResNet-20 (0.27 M) and a small vision transformer (2.7 M), as in
`cifar10_resnet18`. Data come as `benchmarks.tasks.hub` says, a folder of one's own as `images/train/CLASS/*.png`. The
recipe of the SAM literature: 200 epochs, batches of 128, images moved and mirrored at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from benchmarks.tasks import Task, epochs, hub
from benchmarks.tasks.digits import Split
from benchmarks.tasks.networks import ResNet, VisionTransformer
from wcr_optim.pruning.batchnorm import norms_with_statistics

BATCH = 128
EPOCHS = 200
CALIBRATION = 1024  # images for BatchNorm's statistics


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: Of the tasks and of the local folder.
        side: Height and width that images are brought to.
        hub: Name on the hub, None for a folder of one's own.
        config: Of the data set on the hub.
        mirrored: Whether an image's mirror image is of the same class.
    """

    name: str
    side: int
    hub: str | None
    config: str | None = None
    mirrored: bool = True


SOURCES = (
    Source("cifar10", 32, "uoft-cs/cifar10"),
    Source("cifar100", 32, "uoft-cs/cifar100"),
    Source("svhn", 32, "ufldl-stanford/svhn", "cropped_digits", mirrored=False),
    Source("tiny_imagenet", 64, "zh-plus/tiny-imagenet"),
    Source("images", 64, None),
)


class Images(NamedTuple):
    """Splits of images, shape (n, 3, side, side), uint8, and what normalizes them, shape (3, 1, 1)."""

    splits: dict[str, Split]
    classes: int
    mean: Tensor
    deviation: Tensor
    sha256: str = ""

    def normalized(self, images: Tensor) -> Tensor:
        """Return images as numbers of mean 0 and standard deviation 1 in each channel, over the training images."""
        return (images.float() - self.mean.to(images.device)) / self.deviation.to(images.device)


def load(source: Source) -> Images:
    """Load all images of a data set into memory; labels that are text count in the order of the alphabet.

    Raises:
        ValueError: If an image is something else or has more than 8 bits, if a label is missing, or if one of
            validation or test is none of those of training; where the data set itself names its classes, a class of
            which training has no image is no error, as long as training has one of a later class.

    """
    rows = hub.load(source.name, source.hub, source.config)
    image = hub.column(rows["train"], "img", "image")
    label = hub.column(rows["train"], "label", "fine_label", "labels")
    named = isinstance(rows["train"].features[label], hub.imported().ClassLabel)
    labels = _indices(source.name, label, {name: list(part[label]) for name, part in rows.items()}, named=named)
    splits = {}
    for name, part in rows.items():
        pictures = [
            _pixels(picture, source.side, f"{source.name} {name}: row {row} of the column {image}")
            for row, picture in enumerate(part[image])
        ]
        splits[name] = Split(torch.stack(pictures), torch.tensor(labels[name], dtype=torch.long))
    train = splits["train"]
    classes = int(train.labels.max()) + 1
    for name, split in splits.items():
        if split.labels.min() < 0 or split.labels.max() >= classes:
            found = sorted(split.labels.unique().tolist())
            raise ValueError(f"labels of {source.name} {name} must lie in [0, {classes - 1}] as in train, got {found}")
    some = train.images[:: max(1, len(train.images) // 10_000)].double()
    mean, deviation = some.mean((0, 2, 3)), some.std((0, 2, 3)).clamp_min(1e-3)
    sha256 = hub.fingerprint(part for split in splits.values() for part in split)
    return Images(splits, classes, mean.float().view(3, 1, 1), deviation.float().view(3, 1, 1), sha256)


def _indices(name: str, column: str, labels: Mapping[str, list[Any]], *, named: bool) -> dict[str, list[int]]:
    """Return the labels of each split as indices of classes; `named` are those whose names the data set lists."""
    kind = str if isinstance(labels["train"][0], str) else int
    for split, values in labels.items():
        for row, value in enumerate(values):
            if not isinstance(value, kind):
                raise ValueError(
                    f"{name} {split}: row {row} has {value!r} in the column {column}; make labels all whole numbers "
                    "or all text, and leave out rows that have none"
                )
    if named:
        return dict(labels)
    indices = {label: index for index, label in enumerate(sorted(set(labels["train"])))}
    for split, values in labels.items():
        for row, value in enumerate(values):
            if value not in indices:
                raise ValueError(
                    f"{name} {split}: row {row} has {value!r} in the column {column}, which no row of train has; "
                    f"those have {', '.join(map(str, indices))}"
                )
    if kind is int:
        return dict(labels)
    return {split: [indices[value] for value in values] for split, values in labels.items()}


def _pixels(picture: object, side: int, where: str) -> Tensor:
    from PIL.Image import Resampling

    pixels = hub.rgb(picture, where)
    if pixels.size != (side, side):
        pixels = pixels.resize((side, side), Resampling.BILINEAR)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def shifted(images: Tensor, generator: torch.Generator, *, mirrored: bool) -> Tensor:
    """Move each image by up to an eighth of its side, what is moved in being black, and mirror every other one."""
    count, _, height, width = images.shape
    margin = height // 8
    padded = pad(images, [margin] * 4)
    top, left = torch.randint(2 * margin + 1, (2, count, 1, 1), generator=generator)
    rows, columns = top + torch.arange(height).view(1, -1, 1), left + torch.arange(width).view(1, 1, -1)
    if mirrored:
        mirror = torch.randint(2, (count, 1, 1), generator=generator) == 1
        columns = torch.where(mirror, columns.flip(-1), columns)
    return padded[torch.arange(count).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2).contiguous()


def batches(images: Images, batch: int, seed: int, steps: int, *, mirrored: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalized batches of whole epochs, every image moved and mirrored at random anew."""
    generator = torch.Generator().manual_seed(1000 + seed)
    train = images.splits["train"]
    for chosen, labels in epochs(*train, min(batch, len(train.images)), seed, steps):
        yield images.normalized(shifted(chosen, generator, mirrored=mirrored)), labels


@torch.no_grad()
def accuracy(network: nn.Module, images: Images, split: str, batch: int = 1000) -> float:
    """Return the share of a split's images classified right, in percent."""
    device = next(network.parameters()).device
    right = 0
    for chosen, labels in zip(*(part.split(batch) for part in images.splits[split]), strict=True):
        logits = network(images.normalized(chosen.to(device)))
        right += int((logits.argmax(1) == labels.to(device)).sum())
    return 100 * right / len(images.splits[split].labels)


@dataclass(frozen=True)
class Network:
    """A network: how it is built of (classes, side), and the settings of its bases."""

    build: Callable[[int, int], nn.Module]
    lr: dict[str, float]
    weight_decay: dict[str, float]


NETWORKS = {
    "resnet18": Network(
        lambda classes, side: ResNet(3, classes, (64, 128, 256, 512), 2),
        {"sgd": 0.1, "adamw": 1e-3},
        {"sgd": 5e-4, "adamw": 5e-2},
    ),
    "resnet20": Network(
        lambda classes, side: ResNet(3, classes, (16, 32, 64), 3),
        {"sgd": 0.1, "adamw": 3e-3},
        {"sgd": 1e-4, "adamw": 1e-2},
    ),
    "vit": Network(
        lambda classes, side: VisionTransformer(3, classes, side, patch=side // 8),
        {"adamw": 1e-3},
        {"adamw": 5e-2},
    ),
}


def _task(source: Source, name: str) -> Task:
    images, network = load(source), NETWORKS[name]
    count = len(images.splits["train"].images)

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return network.build(images.classes, source.side)

    def calibration() -> list[Tensor]:
        # Drawn, not the first ones: those of a folder are all of one class.
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:CALIBRATION]
        return [images.normalized(part) for part in images.splits["train"].images[chosen].split(BATCH)]

    return Task(
        name=f"{source.name}_{name}",
        suite="vision",
        metric="accuracy",
        best=max,
        steps=EPOCHS * max(1, count // BATCH),
        model=model,
        batches=lambda seed, steps, scale: batches(images, BATCH * scale, seed, steps, mirrored=source.mirrored),
        loss=lambda network, batch: cross_entropy(network(batch[0]), batch[1]),
        evaluate=lambda network, split: accuracy(network, images, split),
        calibration=calibration if norms_with_statistics(model(0)) else None,
        lr=network.lr,
        weight_decay=network.weight_decay,
        sharpness_batch=lambda: next(batches(images, BATCH, 0, 1, mirrored=source.mirrored)),
        data=source.hub or f"{source.name}, a folder",
        data_hash=images.sha256[:12],
    )


TASKS: dict[str, Callable[[], Task]] = {
    f"{source.name}_{name}": partial(_task, source, name) for source in SOURCES for name in NETWORKS
}
