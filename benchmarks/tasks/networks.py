"""The networks of the tasks: a residual network for small images and a U-Net, both with BatchNorm; a transformer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution that keeps height and width, or divides them by the stride, and its BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class Residual(nn.Module):
    """Two 3x3 convolutions around which the input is added; where the shape changes, through a 1x1 convolution.

    He et al., "Deep Residual Learning for Image Recognition", 2016, the basic block.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, stride=stride)
        self.second = convolution(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        return relu(self.second(relu(self.first(x))) + self.shortcut(x))


class ResNet(nn.Sequential):
    """A residual network for images of 8 to 64 pixels: a 3x3 stem, stages of blocks, global average, classifier.

    ResNet-20 of the CIFAR literature is ``ResNet(3, 10, (16, 32, 64), 3)``, ResNet-18 with its stem for small images
    ``ResNet(3, 10, (64, 128, 256, 512), 2)``.

    Args:
        channels: Of the images.
        classes: Number of logits.
        widths: Channels of each stage; every stage but the first halves height and width.
        blocks: Residual blocks of each stage.
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int], blocks: int) -> None:
        stages = [
            Residual(before if block == 0 else width, width, stride=2 if block == 0 and stage > 0 else 1)
            for stage, (before, width) in enumerate(itertools.pairwise([widths[0], *widths]))
            for block in range(blocks)
        ]
        super().__init__(
            convolution(channels, widths[0]),
            nn.ReLU(),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], classes),
        )


class UNet(nn.Module):
    """A U-Net: widths double while height and width halve, then back up, with what each level saw concatenated.

    Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015; here with padded
    convolutions, BatchNorm, and bilinear upsampling, which has no weights.

    Args:
        channels: Of the images.
        classes: Number of logits of a pixel.
        widths: Channels of each level, from the full resolution down.
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int] = (8, 16, 32, 64)) -> None:
        super().__init__()
        self.down = nn.ModuleList(_twice(a, b) for a, b in itertools.pairwise([channels, *widths]))
        self.up = nn.ModuleList(_twice(a + b, b) for a, b in itertools.pairwise(widths[::-1]))
        self.classifier = nn.Conv2d(widths[0], classes, 1)
        self.pool = nn.MaxPool2d(2)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels, h, w) to logits (n, classes, h, w); h and w divisible by 2 ** (levels - 1)."""
        seen: list[Tensor] = []
        for level in self.down:
            x = level(self.pool(x) if seen else x)
            seen.append(x)
        for level, beside in zip(self.up, seen[-2::-1], strict=True):
            x = level(torch.cat([self.upsample(x), beside], dim=1))
        return self.classifier(x)


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(convolution(inputs, outputs), nn.ReLU(), convolution(outputs, outputs), nn.ReLU())


class VisionTransformer(nn.Module):
    """A small vision transformer: patches, a class token, learned positions, blocks with the norm before.

    Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; DeiT-Tiny's width with half its depth by default, 2.7 M
    parameters.

    Args:
        channels: Of the images.
        classes: Number of logits.
        side: Height and width of the images.
        patch: Height and width of a patch.
        width: Of a token.
        depth: Number of blocks.
        heads: Of each attention.
    """

    def __init__(
        self, channels: int, classes: int, side: int, patch: int, width: int = 192, depth: int = 6, heads: int = 3
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        # The encoder's blocks are copies of one another, and equal weights would start them all alike.
        for parameter in self.blocks.parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels, side, side) to logits (n, classes)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1) + self.pos_embed
        return self.classifier(self.blocks(tokens)[:, 0])
