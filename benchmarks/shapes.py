"""Networks of the usual sizes, with random weights, and a small training batch for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A network and what it is trained on.

    Attributes:
        label: Name in tables.
        build: Makes the network, from a configuration alone.
        batch: Makes a batch of so many examples.
        examples: Of a batch on the CPU and on a GPU.
        described: The batch in words, given the number of examples.
    """

    label: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    examples: dict[str, int]
    described: str

    def describe(self, device: str) -> str:
        """Name the batch."""
        return self.described.format(self.examples[device])


def _images(count: int) -> Batch:
    return {"pixel_values": torch.randn(count, 3, 224, 224), "labels": torch.randint(1000, (count,))}


def _tokens(length: int, vocabulary: int) -> Callable[[int], Batch]:
    def batch(count: int) -> Batch:
        tokens = torch.randint(vocabulary, (count, length))
        return {"input_ids": tokens, "labels": tokens}

    return batch


def _from(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        network: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**sizes))
        return network

    return build


LLAMA_1B = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
IMAGES = "{} images of 224 x 224"
SHAPES = {
    "resnet50": Shape(
        "ResNet-50",
        _from("ResNetForImageClassification", "ResNetConfig", num_labels=1000),
        _images,
        {"cpu": 4, "cuda": 64},
        IMAGES,
    ),
    "vit_b": Shape(
        "ViT-B/16",
        _from("ViTForImageClassification", "ViTConfig", num_labels=1000),
        _images,
        {"cpu": 4, "cuda": 64},
        IMAGES,
    ),
    "gpt2_small": Shape(
        "GPT-2 small",
        _from("GPT2LMHeadModel", "GPT2Config"),
        _tokens(128, 50_257),
        {"cpu": 1, "cuda": 64},
        "{} x 128 tokens",
    ),
    "llama_1b": Shape(
        "Llama-1B",
        _from("LlamaForCausalLM", "LlamaConfig", **LLAMA_1B),
        _tokens(512, 128_256),
        {"cpu": 1, "cuda": 8},
        "{} x 512 tokens",
    ),
}
