"""Every method in every layout over four ranks takes the steps of one process, with the fewest exchanges."""

import pytest
import torch
import torch.distributed as dist
from layouts import LAYOUTS, RANKS, Laid, assert_copies_equal, full, network
from processes import run_processes

from benchmarks.scaling import Collectives
from wcr_optim import SAM, SSAM, WCR, CrAM, HoyerDecay, L1Decay, SparsityTarget
from wcr_optim.layout import local
from wcr_optim.pruning import magnitude_masks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

STEPS = 4
PENALTIES = {
    "wcr": lambda base: WCR(base, 1e-2),
    "scale_free": lambda base: WCR(base, 1e-2, form="scale_free"),
    "per_unit": lambda base: WCR(base, 1e-2, form="per_unit"),
    "latent": lambda base: WCR(base, 0.3, form="per_unit", latent_weights=True),
    "latent_l1": lambda base: L1Decay(base, 0.1, latent_weights=True),
    "hoyer": lambda base: HoyerDecay(base, 1e-3),
    "l1": lambda base: L1Decay(base, 1e-3),
}
TWO_PASS = {
    "sam": lambda base: WCR(SAM(base), 1e-2),
    "asam": lambda base: SAM(WCR(base, 1e-2), adaptive=True, eta=0.01),
    "ssam": lambda base: WCR(SSAM(base), 1e-2),
    "cram": lambda base: WCR(CrAM(base), 1e-2),
}
# The tensors of two dimensions are 3; those that a rank exchanges nothing for are replicated.
EXCHANGES = {
    "by_rows": [3],
    "by_hybrid": [3],
    "by_rows_and_columns": [3, 2],  # all matrices over the data ranks, two of them over the tensor ranks
    "by_rows_beside_copies": [2],
}


def base_of(net):
    return torch.optim.AdamW(net.parameters(), lr=1e-2)


def steps(laid, optimizer, with_closure):
    """Train; return the all-reduces of each optimizer.step() without a closure."""
    seen = []
    for step in range(STEPS):
        if with_closure:
            optimizer.step(laid.closure(optimizer, step))
            continue
        optimizer.zero_grad()
        laid.loss(step)
        with Collectives() as collectives:
            optimizer.step()
        seen.append(collectives.reductions())
    return seen


def assert_close(expected, laid, what):
    for (name, p), q in zip(laid.net.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(full(p), q.detach(), rtol=1e-9, atol=1e-11, msg=f"{what} {name}")


def exchanges(layout, method, laid):
    """Return the bytes of every all-reduce of a step: two numbers in float64 for each sum."""
    if method in ("l1", "latent_l1"):  # which asks for no moments
        return []
    if method in (
        "per_unit",
        "latent",
    ):  # whose rows are whole on a rank, but those of the layer that is split by columns
        return [16 * len(local(laid.net[2].weight))] if layout == "by_rows_and_columns" else []
    return [16 * rows for rows in EXCHANGES[layout]]


def _every_method_equals_one_process(rank):
    for layout, lay in LAYOUTS.items():
        for method, make in {**PENALTIES, **TWO_PASS}.items():
            laid, whole = lay(), Laid(network())
            closure = method in TWO_PASS
            seen = steps(laid, make(base_of(laid.net)), closure)
            steps(whole, make(base_of(whole.net)), closure)
            assert_close(whole.net, laid, (layout, method))
            assert_copies_equal(laid.net)
            assert seen == ([] if closure else [exchanges(layout, method, laid)] * STEPS), (layout, method)


def test_every_method_equals_one_process():
    run_processes(_every_method_equals_one_process, RANKS)


def driven(laid):
    groups = [{"params": [p for p in laid.net.parameters() if p.ndim > 1]}]
    optimizer = WCR(torch.optim.AdamW(groups, lr=1e-2), form="scale_free")
    target = SparsityTarget(optimizer, 0.7, total_steps=20, tail_energy=0.05, every=2)
    for step in range(8):
        optimizer.zero_grad()
        loss = laid.loss(step)
        optimizer.step()
        target.step(loss)
    return target


def _sparsity_target_and_masks(rank):
    for layout, lay in LAYOUTS.items():
        laid, whole = lay(), Laid(network())
        found, expected = driven(laid), driven(whole)
        assert found.last_tail == pytest.approx(expected.last_tail, rel=1e-9), layout
        assert found.strengths() == pytest.approx(expected.strengths(), rel=1e-9), layout
        assert_close(whole.net, laid, layout)
        assert_copies_equal(laid.net)
        gathered = network()
        with torch.no_grad():
            for p, q in zip(gathered.parameters(), laid.net.parameters(), strict=True):
                p.copy_(full(q))
        assert magnitude_masks(laid.net, 0.8) == magnitude_masks(gathered, 0.8), layout


def test_sparsity_target_and_masks():
    run_processes(_sparsity_target_and_masks, RANKS)
