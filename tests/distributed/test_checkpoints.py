"""torch.distributed.checkpoint: a run goes on bit for bit, and on another number of ranks up to rounding."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layouts import Laid, by_rows, full, network
from processes import run_processes
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from wcr_optim import SAM, SSAM, WCR, CrAM, SparsityTarget

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

METHODS = {
    "driven": lambda base: WCR(base, 1e-3, form="scale_free"),
    "sam": lambda base: WCR(SAM(base, interval=3), 1e-2),
    "ssam": lambda base: WCR(SSAM(base), 1e-2),
    "ssam_plain": lambda base: WCR(SSAM(base), 1e-2),
    "cram": lambda base: CrAM(WCR(base, 1e-2)),
    "latent": lambda base: WCR(base, 0.3, form="per_unit", latent_weights=True),
}


class Run:
    """A training run with everything that its checkpoint holds."""

    def __init__(self, method, laid):
        self.method, self.laid = method, laid
        groups = [{"params": list(layer.parameters())} for layer in laid.net if list(layer.parameters())]
        self.optimizer = METHODS[method](torch.optim.AdamW(groups, lr=1e-2))
        scope = {"scope": "layer", "total_steps": 40, "every": 3}
        self.target = SparsityTarget(self.optimizer, 0.7, **scope) if method == "driven" else None

    def steps(self, numbers):
        for step in numbers:
            closure = self.laid.closure(self.optimizer, step)
            if self.method in ("driven", "ssam_plain"):
                loss = closure()
                self.optimizer.step()
            else:
                loss = self.optimizer.step(closure)
            if self.target is not None:
                self.target.step(loss)

    def state(self):
        model, optimizer = get_state_dict(self.laid.net, self.optimizer)
        return {"model": model, "optimizer": optimizer, **({"target": self.target.state_dict()} if self.target else {})}

    def save(self, folder):
        dcp.save(self.state(), checkpoint_id=folder / self.method)
        everything = self.everything()  # a collective
        if dist.get_rank() == 0:
            torch.save(everything, folder / f"{self.method}.pt")

    def load(self, folder):
        state = self.state()
        dcp.load(state, checkpoint_id=folder / self.method)
        set_state_dict(
            self.laid.net, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        if self.target:
            self.target.load_state_dict(state["target"])

    def everything(self):
        """Weights, state and options, undivided."""
        result = {name: full(p) for name, p in self.laid.net.named_parameters()}
        for name, p in self.laid.net.named_parameters():
            for key, value in self.optimizer.state[p].items():
                result[f"{name}.{key}"] = full(value)
        result["options"] = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        result["target"] = repr(self.target.state_dict()) if self.target else ""
        return result


def assert_identical(found, expected, what):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        assert same, (what, key, found[key], value)


def assert_near(run, stop):
    """One process that was never interrupted gets there too."""
    whole = Run(run.method, Laid(network()))
    whole.steps(range(stop))
    for (name, p), q in zip(run.laid.net.named_parameters(), whole.laid.net.parameters(), strict=True):
        torch.testing.assert_close(full(p), q.detach(), rtol=1e-7, atol=1e-9, msg=f"{run.method} {name}")


def _begin(rank, folder):
    for method in METHODS:
        run = Run(method, by_rows())
        run.steps(range(5))
        run.save(folder / "of_two")
        run.steps(range(5, 10))
        run.save(folder / "undisturbed")
        if method == "latent":
            assert all(bool((full(p) == 0).any()) for p in run.laid.net.parameters() if p.ndim > 1)


def _go_on_with_more_ranks(rank, folder):
    for method in METHODS:
        run = Run(method, by_rows())
        run.load(folder / "of_two")
        assert_identical(run.everything(), torch.load(folder / "of_two" / f"{method}.pt"), method)
        run.steps(range(5, 10))
        assert_near(run, 10)
        run.save(folder / "of_four")


def _go_on_with_fewer_ranks_and_with_as_many(rank, folder):
    for method in METHODS:
        run = Run(method, by_rows())
        run.load(folder / "of_four")
        assert_identical(run.everything(), torch.load(folder / "of_four" / f"{method}.pt"), method)
        run.steps(range(10, 15))
        assert_near(run, 15)
        again = Run(method, by_rows())
        again.load(folder / "of_two")
        again.steps(range(5, 10))
        assert_identical(again.everything(), torch.load(folder / "undisturbed" / f"{method}.pt"), method)


def test_a_run_goes_on_with_any_number_of_ranks():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("of_two", "of_four", "undisturbed"):
            (folder / part).mkdir()
        run_processes(_begin, 2, folder)
        run_processes(_go_on_with_more_ranks, 4, folder)
        run_processes(_go_on_with_fewer_ranks_and_with_as_many, 2, folder)
