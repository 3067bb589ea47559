"""The FSDP2 example, and what it promises: kill -9 at any moment, go on, end with the same weights bit for bit."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch.distributed.checkpoint import FileSystemWriter
from torch.multiprocessing.spawn import ProcessException

from examples import fsdp2

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

STEPS, EVERY = 32, 4
SCRIPT = Path(fsdp2.__file__)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def options(folder, output):
    numbers = ["--steps", str(STEPS), "--every", str(EVERY)]
    return [*numbers, "--checkpoint", str(folder), "--output", str(output)]


def train(rank, folder, output):
    fsdp2.run(fsdp2.arguments(options(folder, output)), torch.device("cpu"))


def _killed_in_a_step(rank, folder, output):
    """Rank 1 dies before its backward has sent anything; rank 0 waits for it, or finds the line dead."""
    draw = fsdp2.batch

    def batch(text, step, of):
        if rank == 1 and step == 10:
            die()
        return draw(text, step, of)

    fsdp2.batch = batch
    train(rank, folder, output)


def _killed_in_a_save(rank, folder, output):
    """All ranks die when the third checkpoint's data is written and its index is not."""
    write = FileSystemWriter.write_data

    def write_data(self, plan, planner):
        future = write(self, plan, planner)
        if len(list(folder.glob("step-*"))) == 2 and (folder / "step-000008").exists():
            future.wait()
            die()
        return future

    FileSystemWriter.write_data = write_data
    train(rank, folder, output)


def saved(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same_weights(found, expected):
    a, b = (torch.load(path, weights_only=True) for path in (found, expected))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    output = folder / "weights.pt"
    run_processes(train, 2, folder / "checkpoints", output)
    assert saved(folder / "checkpoints") == [f"step-{STEPS - EVERY:06d}", f"step-{STEPS:06d}"]
    weights = torch.load(output, weights_only=True)
    zeros = {name: (w == 0).float().mean().item() for name, w in weights.items()}
    assert all(0.6 < share < 0.95 for name, share in zeros.items() if name.startswith("blocks") and "norm" not in name)
    assert zeros["head.weight"] == 0.0
    return output


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (_killed_in_a_step, ["step-000004", "step-000008"]),
        (_killed_in_a_save, ["partial", "step-000004", "step-000008"]),
    ],
)
def test_killed_and_resumed_it_ends_as_if_undisturbed(body, left, undisturbed, tmp_path):
    folder, output = tmp_path / "checkpoints", tmp_path / "weights.pt"
    with pytest.raises(ProcessException):
        run_processes(body, 2, folder, output)
    assert saved(folder) == left
    assert not output.exists()
    run_processes(train, 2, folder, output)
    assert_same_weights(output, undisturbed)


def workers(agent):
    """Processes that torchrun has started, in their order."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return sorted(int(child) for child in children if str(SCRIPT) in Path(f"/proc/{child}/cmdline").read_text())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_torchrun_restarts_a_killed_rank(undisturbed, tmp_path):
    folder, output, log = tmp_path / "checkpoints", tmp_path / "weights.pt", tmp_path / "log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "--monitor-interval", "0.1", str(SCRIPT), *options(folder, output)]
    # Else the restarted ranks find the addresses of the dead ones in the store that they shared with torchrun.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with log.open("w") as file:
        agent = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        while not (folder / "step-000008").exists():
            assert agent.poll() is None, log.read_text()
            time.sleep(0.01)
        os.kill(workers(agent.pid)[1], signal.SIGKILL)
        assert agent.wait(200) == 0, log.read_text()
    finally:
        agent.terminate()  # which it passes on
        agent.wait(60)
    text = log.read_text()
    assert re.search(r"resumed from step (8|12|16|20|24|28)\n", text), text
    assert "bits per byte on other files: dense" in text
    assert_same_weights(output, undisturbed)
