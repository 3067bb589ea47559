"""Two ranks, each with half of every batch, train as one process does: both passes, the target, pruned validation."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import small_batch, small_net
from torch import nn

from wcr_optim import SAM, SSAM, WCR, SparsityTarget, pruning

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Return what both ranks ended with."""
    pytest.importorskip("pytorch_lightning")
    path = tmp_path_factory.mktemp("ranks") / "ended"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, HERE / "lightning_ranks.py", str(rank), path],
            env={**shared, "LOCAL_RANK": str(rank), "NODE_RANK": "0"},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    return [torch.load(f"{path}.{rank}", weights_only=True) for rank in range(2)]


def alone(optimizer):
    """Train on whole batches by a plain loop; return the network and the target."""
    net = small_net()
    optimizer = WCR(optimizer(torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9), rho=0.2), form="scale_free")
    target = SparsityTarget(optimizer, 0.5, 100, every=1)

    def loss_of(step):
        x, y = small_batch(step)
        return nn.functional.mse_loss(net(x), y)

    for _ in range(2):
        for first in range(0, 6, 2):

            def closure(steps=(first, first + 1)):
                optimizer.zero_grad()
                losses = [loss_of(step) / 2 for step in steps]
                for loss in losses:
                    loss.backward()
                return sum(losses).detach()

            loss = optimizer.gather(closure)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            target.step(loss)
    return net, target, loss_of


@pytest.mark.parametrize("name", ["sam", "ssam"])
def test_as_one_process(ended, name):
    net, target, loss_of = alone({"sam": SAM, "ssam": SSAM}[name])
    for rank in ended:
        for key, value in net.state_dict().items():
            torch.testing.assert_close(rank[name]["weights"][key], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor(rank[name]["history"]), torch.tensor(target.history), rtol=1e-4, atol=0)
        found = rank[name]["metrics"]
        for sparsity in (0, 0.5):
            with pruning.applied(net, pruning.magnitude_masks(net, sparsity)), torch.no_grad():
                expected = (loss_of(1000) + loss_of(1001)).item() / 2
            assert found[f"val_loss_at_{sparsity:g}"] == pytest.approx(expected, rel=1e-4)
        assert found["val_loss_at_0"] == pytest.approx(found["val_loss"], rel=1e-6)
        assert 0 < found["concentration/mean"] < 1
    first, second = (rank[name]["weights"] for rank in ended)
    assert all(torch.equal(first[key], second[key]) for key in first)
