"""A closure that adds to gradients which it has not cleared would make a wrong step without a word: it is refused."""

import copy

import pytest
import torch
from reference import assert_same, make_closure, small_batch, small_net
from torch import nn

from wcr_optim import SAM, SSAM, WCR, CrAM, SparseSAM

OPTIMIZERS = {
    "sam": SAM,
    "cram": CrAM,
    "sparse_sam": lambda base: SparseSAM(base, mask="dynamic", total_steps=10),
    "ssam": SSAM,
    "wcr_sam": lambda base: WCR(SAM(base), 1e-3),
    "ssam_wcr": lambda base: SSAM(WCR(base, 1e-3)),
}


def made(name):
    net = small_net()
    return net, OPTIMIZERS[name](torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))


def backward(net, step):
    x, y = small_batch(step)
    loss = nn.functional.mse_loss(net(x), y)
    loss.backward()
    return loss


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulated_outside_the_closure(name):
    net, optimizer = made(name)
    optimizer.step(make_closure(net, optimizer, 0))
    before = copy.deepcopy(net)
    optimizer.zero_grad()
    backward(net, 1)
    with pytest.raises(RuntimeError, match="did not clear the gradients"):
        optimizer.step(lambda: backward(net, 2))
    assert_same(net, before)
    optimizer.step(make_closure(net, optimizer, 3))  # and all is well again


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_closure_that_does_nothing(name):
    net, optimizer = made(name)
    backward(net, 1)
    with pytest.raises(RuntimeError, match="did not clear the gradients"):
        optimizer.step(lambda: None)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clearing_in_place_past_the_optimizer_is_refused_with_the_way_out(name):
    net, optimizer = made(name)
    backward(net, 1)
    with pytest.raises(RuntimeError, match=r"or cleared them in place .* have it call optimizer\.zero_grad\(\)"):
        optimizer.step(lambda: (net.zero_grad(set_to_none=False), backward(net, 2))[1])


@pytest.mark.parametrize("how", ["optimizer", "optimizer_zeros", "model", "loop", "loop_zeros"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_usual_way_of_clearing(name, how):
    (net, optimizer), (expected, reference) = made(name), made(name)
    clear = {
        "optimizer": optimizer.zero_grad,
        "optimizer_zeros": lambda: optimizer.zero_grad(set_to_none=False),
        "model": net.zero_grad,
        "loop": optimizer.zero_grad,
        "loop_zeros": lambda: optimizer.zero_grad(set_to_none=False),
    }[how]
    for step in range(4):
        if how.startswith("loop"):
            clear()
            optimizer.step(lambda: backward(net, step))  # noqa: B023
        else:
            optimizer.step(lambda: (clear(), backward(net, step))[1])  # noqa: B023
        reference.step(make_closure(expected, reference, step))
    assert_same(net, expected)
