import pytest
import torch
import triton_interpreter  # noqa: F401  (before anything imports Triton, which reads its variable once)


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


DEFAULTS = {
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
    "another device": lambda: torch.set_default_device("meta"),
}


@pytest.fixture(params=DEFAULTS)
def set_default(request):
    """Change torch's default dtype or device, when called, for the rest of a test."""
    yield DEFAULTS[request.param]
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
