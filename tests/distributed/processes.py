"""Run a test's body in several gloo processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes are forked from a server that has imported what they all need: importing torch takes longer than any test.
multiprocessing.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.optim",
        "torch.distributed.tensor.parallel",
        "torch.multiprocessing",
        "wcr_optim",
    ]
)


def run_processes(body: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Call body(rank, *arguments) in every process; fail if one does, by a warning too."""
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{os.path.join(folder, 'rendezvous')}"
        todo = (body, world_size, rendezvous, arguments)
        mp.start_processes(_process, todo, nprocs=world_size, start_method="forkserver")


def run_in_turn(rank: int, bodies: tuple[Callable[[int], None], ...]) -> None:
    """Call several bodies in the same processes."""
    for body in bodies:
        torch.manual_seed(0)
        body(rank)


def _process(
    rank: int, body: Callable[..., None], world_size: int, rendezvous: str, arguments: tuple[Any, ...]
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    # Ranks that disagree on what to exchange fail instead of waiting for each other.
    patience = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=patience)
    try:
        torch.manual_seed(0)
        body(rank, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
