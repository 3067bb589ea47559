"""Peak memory of real processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from the kernel of Linux")


def measure(*options):
    command = [sys.executable, "-m", "benchmarks.pruning", "--threads", "1", *options]
    return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)


def test_masks_and_their_application_take_a_quarter_of_the_weights_and_choose_as_torch_does():
    ours = measure("--measure", "wcr_optim", "--mib", "48")
    assert ours["extra_bytes"] <= 0.25 * 48 * 2**20
    theirs = measure("--measure", "torch", "--mib", "48")
    assert theirs["extra_bytes"] > 5 * ours["extra_bytes"]
    assert theirs["masks"] == ours["masks"]


def test_a_stream_takes_little_more_than_its_masks_and_two_tensors():
    found = measure("--measure", "stream", "--stream", "1e8")
    assert found["weights"] == 100_663_296
    assert found["kept"] == found["weights"] - round(0.95 * found["weights"])
    few = 64 * 2**20  # a sixth of the weights
    assert found["extra_bytes"] <= found["mask_bytes"] + 2 * found["tensor_bytes"] + few
