"""Arguments that must be numbers: errors that name the argument and what was given."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def check_number(name: str, value: Any) -> float:
    """Return a number as a float; raise TypeError unless it is one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def check_share(name: str, share: Any) -> float:
    """Return a share of all weights as a float in [0, 1]."""
    number = check_number(name, share)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {share!r}")
    return number


def check_whole(name: str, value: Any) -> int:
    """Return a whole number as an int; raise TypeError unless it is one."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def check_count(name: str, count: Any) -> int:
    """Return a positive whole number."""
    number = check_whole(name, count)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {count!r}")
    return number
