"""Run a test's body in several gloo processes on this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(body: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Call body(rank, *arguments) in every process; fail if one does."""
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{os.path.join(folder, 'rendezvous')}"
        mp.start_processes(_process, (body, world_size, rendezvous, arguments), nprocs=world_size, start_method="spawn")


def _process(
    rank: int, body: Callable[..., None], world_size: int, rendezvous: str, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        torch.manual_seed(0)
        body(rank, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
