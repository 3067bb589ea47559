import pytest
import torch
import triton_interpreter  # noqa: F401  (before anything imports Triton, which reads its variable once)


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
