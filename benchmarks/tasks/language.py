"""Language-model fine-tuning: a byte-level Llama-shaped transformer on the Python standard library's source.

Pre-trained on the library's single modules and fine-tuned on some of its packages; both split by file. Embeddings and
lm_head stay dense.
"""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.tasks import Task

CACHE = Path("results/cache")
NAME = "language"
CONTEXT = 64
BATCH = 8
PRETRAINING_STEPS = 2500
PRETRAINING_BATCH = 16
FINETUNING_PACKAGES = ("asyncio", "concurrent", "email", "http", "importlib", "multiprocessing", "unittest", "xml")
EVALUATED_WINDOWS = 384


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


def model() -> nn.Module:
    """Three Llama blocks of width 96: 0.38 M parameters, 0.33 M of them prunable."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def batches(text: Tensor, steps: int, seed: int, batch: int = BATCH) -> Iterator[Tensor]:
    """Draw windows of CONTEXT + 1 bytes at random places, shape (batch, CONTEXT + 1)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT - 1, (batch, 1), generator=generator)
        yield text[starts + torch.arange(CONTEXT + 1)].long()


def loss(network: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the next byte, in nats."""
    logits = network(windows[:, :-1]).logits
    return cross_entropy(logits.reshape(-1, 256), windows[:, 1:].reshape(-1))


@torch.no_grad()
def bits_per_byte(network: nn.Module, text: Tensor) -> float:
    """Return bits per byte on windows spread evenly over a text, the same ones at every call."""
    starts = torch.linspace(0, len(text) - CONTEXT - 1, EVALUATED_WINDOWS).long().unsqueeze(1)
    windows = text[starts + torch.arange(CONTEXT + 1)].long().to(next(network.parameters()).device)
    nats = [loss(network, part).item() for part in windows.split(64)]
    return sum(nats) / len(nats) / math.log(2)


def pretrained(seed: int, folder: Path) -> nn.Module:
    """Pre-train, or load what an earlier call with the same seed and corpus left in a folder."""
    path = folder / f"language-{load().sha256[:12]}-{seed}.pt"
    torch.manual_seed(seed)
    network = model()
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAINING_STEPS)
    for windows in batches(load().pretrain, PRETRAINING_STEPS, seed, PRETRAINING_BATCH):
        optimizer.zero_grad()
        loss(network, windows).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        warm_up.step() if warm_up.last_epoch < 100 else cosine.step()
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(network.state_dict(), partial)
    os.replace(partial, path)
    return network


def _task() -> Task:
    corpus = load()
    return Task(
        name=NAME,
        suite="language",
        metric="bits_per_byte",
        best=min,
        steps=400,
        model=lambda seed: pretrained(0, CACHE),
        batches=lambda seed, steps, scale: batches(corpus.train, steps, 1000 + seed, BATCH * scale),
        loss=loss,
        evaluate=lambda network, split: bits_per_byte(network, getattr(corpus, split)),
        exclude=("lm_head",),
        goals=(0.5, 0.7, 0.8),
        tolerance=0.05,
        lr={"adamw": 1e-3},
        weight_decay={"adamw": 1e-2},
        data=f"Python standard library, sha256 {corpus.sha256[:12]}",
    )


TASKS: dict[str, Callable[[], Task]] = {NAME: _task}
