"""Types of arguments for argparse's `type=`, each of which says what it takes, and what else is checked beforehand."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeVar

import torch

T = TypeVar("T")


def prepare_for_pictures(*folders: Path) -> None:
    """Make sure before a command's work that it can write its tables and pictures after it.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If one of the folders cannot be made or written to.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("the pictures at the end need matplotlib: pip install 'wcr_optim[bench]'")
    prepare_folders(*folders)


def prepare_folders(*folders: Path) -> None:
    """Make sure before a command's work that it can write into folders after it.

    Raises:
        OSError: If one of them cannot be made or written to.
    """
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def number(text: str) -> float:
    """Read a finite number that is not negative, such as a strength."""
    value = float(text)
    if not 0.0 <= value < math.inf:
        raise ArgumentTypeError(f"must be finite and not negative, got {text}")
    return value


def sparsity(text: str) -> float:
    """Read a share of weights."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return value


def device(text: str) -> str:
    """Read the kind of a device that is here: cpu or cuda."""
    if text not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"unknown {text!r}; choose of cpu, cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise ArgumentTypeError("there is no CUDA device here; leave it out to take the CPU")
    return text


def names(text: str) -> list[str]:
    """Read a comma-separated list of names, each of which counts once."""
    found = list(dict.fromkeys(name for name in text.split(",") if name))
    if not found:
        raise ArgumentTypeError("name at least one")
    return found


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return the type of a comma-separated list of known names."""
    allowed = list(known)

    def chosen(text: str) -> list[str]:
        for name in names(text):
            if name not in allowed:
                raise ArgumentTypeError(f"unknown {name!r}; choose of {', '.join(allowed)}")
        return names(text)

    return chosen


def listed(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Return the type of a comma-separated list, whose entries are of one type and count once."""

    def entries(text: str) -> list[T]:
        return list(dict.fromkeys(kind(entry) for entry in text.split(",")))

    entries.__name__ = getattr(kind, "__name__", "entries")  # which argparse names in its own errors
    return entries
