import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in one order, so that runs in other processes can be compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
