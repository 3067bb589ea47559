"""Language-model fine-tuning: byte-level Llama-shaped transformers on the Python standard library's source.

Pre-trained on the library's single modules and fine-tuned on some of its packages; both split by file. Embeddings and
lm_head stay dense. `language` takes half a minute on one core; `language_25m` wants a CUDA device.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.devices import mixed_precision
from benchmarks.tasks import Task

CACHE = Path("results/cache")
FINETUNING_PACKAGES = ("asyncio", "concurrent", "email", "http", "importlib", "multiprocessing", "unittest", "xml")


@dataclass(frozen=True)
class Size:
    """A transformer, how it is pre-trained and how it is fine-tuned.

    Attributes:
        name: Of the task.
        width: Of the residual stream.
        inner: Width inside of the feed-forward networks.
        layers: Number of blocks.
        heads: Of each attention.
        context: Bytes of a window.
        batch: Windows of a fine-tuning step.
        steps: Of fine-tuning.
        lr: Peak learning rate of fine-tuning.
        pretraining_batch: Windows of a pre-training step.
        pretraining_steps: Of pre-training.
        pretraining_lr: Peak learning rate of pre-training.
        evaluated: Windows that a split is measured on.
        compiled: As the task's.
    """

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    context: int
    batch: int
    steps: int
    lr: float
    pretraining_batch: int
    pretraining_steps: int
    pretraining_lr: float
    evaluated: int
    compiled: bool = False


SMALL = Size("language", 96, 256, 3, 4, 64, 8, 400, 1e-3, 16, 2500, 2e-3, 384)  # 0.38 M parameters, 0.33 M prunable
LARGE = Size("language_25m", 512, 1408, 8, 8, 512, 16, 300, 3e-4, 64, 1000, 1e-3, 384, True)  # 25.96 M, 25.69 M
SHARPNESS_BYTES = 2048


class Corpus(NamedTuple):
    """Bytes of each part, shape (n,), uint8, and the hash of all of them."""

    pretrain: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor
    sha256: str


@cache
def load() -> Corpus:
    """Read the running interpreter's standard library; files go to a part by the hash of their name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[bytes]] = {"pretrain": [], "train": [], "validation": [], "test": []}
    for path in sorted(root.glob("*.py")):
        parts["pretrain"].append(path.read_bytes())
    for package in FINETUNING_PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            share = hashlib.sha256(str(path.relative_to(root)).encode()).digest()[0] / 256
            part = "train" if share < 0.7 else "validation" if share < 0.85 else "test"
            parts[part].append(path.read_bytes())
    texts = {name: b"\n".join(files) for name, files in parts.items()}
    digest = hashlib.sha256(b"\0".join(texts.values())).hexdigest()
    tensors = {name: torch.frombuffer(bytearray(text), dtype=torch.uint8) for name, text in texts.items()}
    return Corpus(**tensors, sha256=digest)


def model(size: Size = SMALL) -> nn.Module:
    """Build a Llama-shaped transformer over bytes.

    Raises:
        ImportError: If transformers is not installed.

    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ImportError(f"task {size.name} needs transformers: pip install 'wcr_optim[bench]'") from error
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def batches(text: Tensor, context: int, batch: int, seed: int, steps: int) -> Iterator[Tensor]:
    """Draw windows of context + 1 bytes at random places, shape (batch, context + 1)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - context - 1, (batch, 1), generator=generator)
        yield text[starts + torch.arange(context + 1)].long()


def loss(network: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the next byte, in nats."""
    logits = network(windows[:, :-1]).logits
    return cross_entropy(logits.reshape(-1, 256), windows[:, 1:].reshape(-1))


@torch.no_grad()
def likelihood(network: nn.Module, text: Tensor, context: int, count: int) -> dict[str, float]:
    """Return bits per byte, and perplexity over bytes, on windows spread evenly over a text, the same at every call."""
    starts = torch.linspace(0, len(text) - context - 1, count).long().unsqueeze(1)
    windows = text[starts + torch.arange(context + 1)].long().to(next(network.parameters()).device)
    nats = sum(loss(network, part).item() * len(part) for part in windows.split(64)) / count
    return {"bits_per_byte": nats / math.log(2), "perplexity": math.exp(min(nats, 700.0))}


def pretrained(seed: int, folder: Path, size: Size = SMALL) -> nn.Module:
    """Pre-train, on a CUDA device where there is one, or load what an earlier call left in a folder.

    Args:
        seed: Of the initial weights and of the batches.
        folder: Where networks are kept, under names that tell size, corpus, steps and seed.
        size: What to train (default: SMALL)

    Returns:
        The network, on the CPU.

    Raises:
        ValueError: If what is in the folder cannot be read, such as a file that was cut short.

    """
    path = folder / f"{size.name}-{load().sha256[:12]}-{size.pretraining_steps}-{seed}.pt"
    torch.manual_seed(seed)
    network = model(size)
    if path.exists():
        try:
            network.load_state_dict(torch.load(path, weights_only=True))
        except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
            said = str(error).partition("\n")[0]
            raise ValueError(f"{path} cannot be read ({said}); delete it, and the network is trained anew") from error
        return network
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=size.pretraining_lr, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, size.pretraining_steps)
    windows = batches(load().pretrain, size.context, size.pretraining_batch, seed, size.pretraining_steps)
    for batch in windows:
        optimizer.zero_grad()
        with mixed_precision(device):
            of_batch = loss(network, batch.to(device))
        of_batch.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        warm_up.step() if warm_up.last_epoch < 100 else cosine.step()
    network.cpu()
    folder.mkdir(parents=True, exist_ok=True)
    incomplete = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(network.state_dict(), incomplete)
    os.replace(incomplete, path)
    return network


def _task(size: Size) -> Task:
    corpus = load()
    return Task(
        name=size.name,
        suite="language",
        metric="bits_per_byte",
        best=min,
        steps=size.steps,
        model=lambda seed: pretrained(0, CACHE, size),
        batches=lambda seed, steps, scale: batches(corpus.train, size.context, size.batch * scale, 1000 + seed, steps),
        loss=loss,
        evaluate=lambda network, split: likelihood(network, getattr(corpus, split), size.context, size.evaluated),
        exclude=("lm_head",),
        goals=(0.5, 0.7, 0.8),
        tolerance=0.05,
        sharpness_batch=lambda: next(batches(corpus.train, size.context, SHARPNESS_BYTES // size.context, 1000, 1)),
        compiled=size.compiled,
        lr={"adamw": size.lr},
        weight_decay={"adamw": 1e-2},
        data="Python standard library",
        data_hash=corpus.sha256[:12],
    )


TASKS: dict[str, Callable[[], Task]] = {size.name: partial(_task, size) for size in (SMALL, LARGE)}
