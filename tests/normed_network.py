"""A small network with BatchNorm, for tests of units whose size it does not see."""

import torch
from torch import nn

SMALL = 0.3  # of its size, what a unit is brought down to: 0.09 of its energy


def normed(seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3),  # with a bias, which BatchNorm takes away again
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 3),
    )


def images(step, size=32):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 1, 6, 6, generator=generator)
    return x, (x[:, 0, 2, 2] > 0).long() + (x[:, 0, 3, 3] > 0).long()


def gradients(net, step):
    x, y = images(step)
    net.zero_grad()
    loss = nn.functional.cross_entropy(net(x.to(next(net.parameters()))), y)
    loss.backward()
    return loss


def layers_of(net):
    return [p for p in net.parameters() if p.ndim > 1]


def matrices(net):
    return {name: p for name, p in net.named_parameters() if p.ndim > 1}


def shrunk(net):
    """Bring the first half of the units of every weight down to the same small size."""
    with torch.no_grad():
        for w in matrices(net).values():
            w[: len(w) // 2] *= SMALL
    return net


def energies(w):
    return w.detach().double().square().flatten(1).sum(1)


def train(net, optimizer, steps, target=None, first=0, closure=False):
    for step in range(first, first + steps):
        if closure:
            loss = optimizer.step(lambda step=step: gradients(net, step))
        else:
            loss = gradients(net, step)
            optimizer.step()
        if target is not None:
            target.step(loss)
