"""What SparsityTarget is tested with: its measure worked out with a sort, and a small network to drive."""

import math

import torch
from torch import nn

from wcr_optim import WCR, SparsityTarget, param_groups
from wcr_optim.penalties import ScaleFree


def plain_tail(tensors, sparsity: float) -> float:
    """Sort all weights, square, sum."""
    m = torch.cat([w.detach().double().abs().reshape(-1) for w in tensors]).sort().values.square()
    return (m[: round(sparsity * m.numel())].sum() / m.sum()).item()


def density(weights) -> float:
    """The geometric mean of mu^2 / q over layers, as it is written."""
    return math.prod((w.abs().mean().square() / w.square().mean()).item() for w in weights) ** (1 / len(weights))


# A task on which pruning matters: few of many inputs count.
def teacher_batch(step: int, inputs: int = 32, size: int = 64):
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, inputs, generator=generator)
    return x, (x[:, :3].sum(1, keepdim=True) * x[:, 3:4].sign())


def student(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))


BASES = {
    "sgd": lambda groups, lr=0.05: torch.optim.SGD(groups, lr=lr, momentum=0.9),
    "adamw": lambda groups, lr=3e-3: torch.optim.AdamW(groups, lr=lr),
}


def fit(net, optimizer, target, steps, scheduler=None, first=0) -> float:
    loss = torch.tensor(math.nan)
    for step in range(first, first + steps):
        x, y = teacher_batch(step)
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        if target is not None:
            target.step(loss)
        if scheduler is not None:
            scheduler.step()
    return loss.item()


def weights_of(optimizer):
    return [p for p in optimizer.param_groups[0]["params"] if p.ndim > 1]


def driven(base="sgd", wrap=lambda b: WCR(b, form="per_unit"), steps=300, seed=0, lr=None, **options):
    """Train with a target and a cosine schedule; return network, optimizer, target and the last loss."""
    net = student(seed)
    groups = param_groups(net)
    optimizer = wrap(BASES[base](groups) if lr is None else BASES[base](groups, lr))
    for group in optimizer.param_groups[1:]:
        group[optimizer.param_groups[0].get("option", getattr(optimizer, "penalty", ScaleFree()).option)] = 0.0
    target = SparsityTarget(optimizer, **({"sparsity": 0.9, "total_steps": steps} | options))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = fit(net, optimizer, target, steps, scheduler)
    return net, optimizer, target, loss
