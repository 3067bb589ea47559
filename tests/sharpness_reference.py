"""METHODS' formulas, written down once more in the plainest way, on lists of tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wcr_optim.sharpness import SAM, SSAM, CrAM, SparseSAM

OPTIMIZERS = {"sam": SAM, "ssam": SSAM, "sparse_sam": SparseSAM, "cram": CrAM}
TWO_PASS = ("sam", "sparse_sam", "cram")


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small convolutional network, the same at every call."""
    generator = torch.Generator().manual_seed(3)
    made = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)
    ).to(dtype)
    for p in made.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3)
    return made


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The batch of a step, the same at every call."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(12, 2, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step, next(model.parameters()).dtype)
    return (model(x) - y).square().mean()


def groups(model: nn.Module, rhos=(0.05, 0.2, 0.0)) -> list[dict]:
    """Three groups, each with a rho of its own."""
    params = list(model.parameters())
    return [{"params": part, "rho": rho} for part, rho in zip((params[:3], params[3:6], params[6:]), rhos, strict=True)]


def base_of(params, name: str = "sgd") -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=1e-2)


def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int):
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps, closure: bool = True) -> list[float]:
    """Take the numbered steps; returns the losses."""
    losses = []
    for step in steps:
        evaluate = closure_of(model, optimizer, step)
        if closure:
            losses.append(optimizer.step(evaluate).item())
        else:
            losses.append(evaluate().item())
            optimizer.step()
    return losses


def gradients_at(model: nn.Module, params: list[Tensor], values: list[Tensor], step: int) -> list[Tensor]:
    """The gradients of a step's loss at any weights; the model's own are untouched."""
    names = {id(p): name for name, p in model.named_parameters()}
    given = {names[id(p)]: v.clone().requires_grad_() for p, v in zip(params, values, strict=True)}
    x, y = batch(step, values[0].dtype)
    loss = (torch.func.functional_call(model, given, (x,)) - y).square().mean()
    return list(torch.autograd.grad(loss, list(given.values())))


def plain_norm(tensors: list[Tensor]) -> float:
    return float(sum((t.double() ** 2).sum() for t in tensors)) ** 0.5


class Plain:
    """A method by its formula around a torch optimizer, with the gradient that `gradient` computes."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer) -> None:
        self.model, self.base = model, base
        self.params = [p for group in base.param_groups for p in group["params"]]
        self.rhos = [group["rho"] for group in base.param_groups for _ in group["params"]]

    def at(self, values: list[Tensor], step: int) -> list[Tensor]:
        return gradients_at(self.model, self.params, values, step)

    def step(self, step: int) -> None:
        w = [p.detach().clone() for p in self.params]
        for p, g in zip(self.params, self.gradient(w, step), strict=True):
            p.grad = g
        self.base.step()


class PlainSAM(Plain):
    def __init__(self, model, base, adaptive=False, eta=0.0) -> None:
        super().__init__(model, base)
        self.adaptive, self.eta = adaptive, eta

    def gradient(self, w, step):
        g = self.at(w, step)
        a = [v.abs() + self.eta if self.adaptive and v.ndim >= 2 else torch.ones_like(v) for v in w]
        norm = plain_norm([x * y for x, y in zip(a, g, strict=True)])
        moved = [v + x**2 * y * rho / (norm + 1e-12) for v, x, y, rho in zip(w, a, g, self.rhos, strict=True)]
        return self.at(moved, step)


class PlainSSAM(Plain):
    last = None

    def gradient(self, w, step):
        if self.last is None:
            self.last = self.at(w, step)
        else:
            norm = plain_norm(self.last)
            moved = [v + rho * g / (norm + 1e-12) for v, g, rho in zip(w, self.last, self.rhos, strict=True)]
            self.last = self.at(moved, step)
        return self.last


class PlainFisherSAM(Plain):
    """The mask is made of the squared gradients of the num_samples steps that end at each refresh."""

    def __init__(self, model, base, sparsity, update_freq, num_samples) -> None:
        super().__init__(model, base)
        self.sparsity, self.update_freq, self.num_samples = sparsity, update_freq, num_samples
        self.squares: list[list[Tensor]] = []
        self.masks: list[Tensor] = []

    def gradient(self, w, step):
        g = self.at(w, step)
        self.squares.append([x**2 for x in g])
        if step % self.update_freq == 0:
            window = self.squares[-self.num_samples :]
            fisher = [sum(column) for column in zip(*window, strict=True)]
            self.masks = plain_top(fisher, self.sparsity)
        norm = plain_norm(g)
        moved = [v + m * rho * x / (norm + 1e-7) for v, m, x, rho in zip(w, self.masks, g, self.rhos, strict=True)]
        return self.at(moved, step)


class PlainCrAM(Plain):
    def __init__(self, model, base, sparsities, plus, sparse_grad) -> None:
        super().__init__(model, base)
        self.sparsities, self.plus, self.sparse_grad = sparsities, plus, sparse_grad

    def gradient(self, w, step):
        g = self.at(w, step)
        moved = [v + rho * x for v, x, rho in zip(w, g, self.rhos, strict=True)]
        matrices = [v for v in moved if v.ndim > 1]
        kept = iter(plain_top([v.abs() for v in matrices], self.sparsities[step]))
        masks = [next(kept) if v.ndim > 1 else torch.ones_like(v) for v in moved]
        h = self.at([v * m for v, m in zip(moved, masks, strict=True)], step)
        if self.sparse_grad:
            h = [x * m for x, m in zip(h, masks, strict=True)]
        return [x + y for x, y in zip(h, g, strict=True)] if self.plus else h


def plain_top(scores: list[Tensor], sparsity: float) -> list[Tensor]:
    """Ones for the largest scores of all tensors together, zeros for a share of round(sparsity * n)."""
    together = torch.cat([s.flatten() for s in scores])
    kept = torch.zeros_like(together)
    kept[together.argsort(descending=True, stable=True)[: len(together) - round(sparsity * len(together))]] = 1
    return [part.view(s.shape) for part, s in zip(kept.split([s.numel() for s in scores]), scores, strict=True)]


def assert_close(model: nn.Module, reference: nn.Module, tolerance: float = 1e-12) -> None:
    for (name, p), q in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def assert_same(a, b):
    """Equal to the last bit, through lists and dictionaries."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b
